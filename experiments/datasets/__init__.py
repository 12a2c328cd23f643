"""Image data sets as arrays in memory.

`load` looks in this order and says which source it took:

1. the folder given by ``--data-dir`` or ``KFAC_DATA_DIR``;
2. a directory prepared by TensorFlow Datasets (TFDS);
3. a TFDS download, if the network answers;
4. the small real sets that come inside a package.
"""

from experiments.datasets.arrays import Dataset, batches
from experiments.datasets.lookup import load

__all__ = ["Dataset", "batches", "load"]
