"""Trained weights of a study as small files, for what is made of them afterwards."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.errors import MetricsError
from experiments.studies.bayes.config import BayesStudy, Cell


def path_of(config: BayesStudy, cell: Cell, seed: int) -> Path:
    """The file of a cell's weights from a seed."""
    return config.out / "weights" / f"{cell.name}_{seed}.npz"


def save(path: Path, tree: Any) -> None:
    """Writes the leaves of a tree, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, *leaves)
    os.replace(temporary, path)


def read(path: Path, like: Any) -> Any:
    """Reads a tree."""
    if not path.exists():
        raise MetricsError(
            f"{path} does not exist: the weights are those of another cell, which has "
            "to be run first, into the same folder."
        )
    leaves, structure = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as file:
        found = [file[f"arr_{i}"] for i in range(len(file.files))]
    if [x.shape for x in found] != [tuple(x.shape) for x in leaves]:
        raise MetricsError(f"{path} holds weights of another network.")
    return jax.tree.unflatten(structure, [jax.numpy.asarray(x) for x in found])
