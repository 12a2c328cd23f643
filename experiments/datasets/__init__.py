"""Data sets of images and of text as arrays in memory.

`load` (images) and `load_text` look in this order and say which source they took:

1. the folder given by ``--data-dir`` or ``KFAC_DATA_DIR``;
2. a directory prepared by TensorFlow Datasets (TFDS);
3. a TFDS download, if the network answers;
4. the small real sets that come inside a package.
"""

from experiments.datasets.arrays import Dataset, Examples, batches
from experiments.datasets.augment import Augmentation, make_augmentation
from experiments.datasets.lookup import load
from experiments.datasets.text import TextDataset, load_text

__all__ = [
    "Augmentation",
    "Dataset",
    "Examples",
    "TextDataset",
    "batches",
    "load",
    "load_text",
    "make_augmentation",
]
