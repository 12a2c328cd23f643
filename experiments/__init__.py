"""Training runs and studies that use the package; not installed with it."""

import ctypes
import os

# On CPU, XLA calls LAPACK from its own threads. Threads of OpenBLAS on top of them wait
# for one another and make factorisations many times slower; OpenBLAS reads this when it
# is loaded, so it has to be set before numpy and scipy are imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Makes glibc keep freed buffers for the next step of a training loop.

    By default it returns buffers above 32 MB to the system, and the next step faults
    every page of its temporary buffers in again. Threads other than the first cannot
    keep more than 64 MB at all, unless they share the first one's heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    limits = {
        M_MMAP_THRESHOLD: 1 << 30,
        M_TRIM_THRESHOLD: (1 << 31) - 1,
        M_ARENA_MAX: 1,
    }
    return all(mallopt(name, value) == 1 for name, value in limits.items())


keep_freed_memory()
