"""Training runs and studies that use the package; not installed with it."""

import os

# On CPU, XLA calls LAPACK from its own threads. Threads of OpenBLAS on top of them wait
# for one another and make factorisations many times slower; OpenBLAS reads this when it
# is loaded, so it has to be set before numpy and scipy are imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
