"""Checkpoints of a training state, written with orbax.

A checkpoint is a folder ``step_<n>`` with every leaf of the state under its path. It
appears under that name only when it is complete, so a run that is killed while writing
continues from the one before.
"""

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import CheckpointError
from experiments.parallel import replicate

PyTree = Any
KEEP = 2
PREFIX = "step_"
TEMPORARY = "*.orbax-checkpoint-tmp*"


def save(folder: Path, step: int, state: PyTree) -> None:
    """Writes a checkpoint and removes all but the newest ones."""
    path = (folder / f"{PREFIX}{step:08d}").absolute()
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    # orbax refuses arrays without elements; there is nothing in them to restore.
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.size}
    try:
        write(path, leaves)
        for old in complete(folder)[:-KEEP]:
            shutil.rmtree(path_of(folder, old))
    except Exception as error:  # orbax passes on what its backends raise
        for rest in folder.glob(TEMPORARY):
            shutil.rmtree(rest, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {folder}: "
            f"{reason(error)}. {last_good(folder)}"
        ) from error


def write(path: Path, leaves: dict[str, np.ndarray]) -> None:
    with quiet(), checkpointer_of_this_process() as checkpointer:
        checkpointer.save(path, leaves, force=True)


def checkpointer_of_this_process() -> ocp.Checkpointer:
    """Returns a checkpointer that waits for no other process."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"{own}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def restore(folder: Path, step: int, like: PyTree) -> PyTree:
    path = path_of(folder, step)
    wanted = {
        name: (tuple(np.shape(leaf)), str(np.asarray(leaf).dtype))
        for name, leaf in named_leaves(like).items()
        if np.size(leaf)
    }
    try:
        with quiet(), checkpointer_of_this_process() as checkpointer:
            found = checkpointer.metadata(path).item_metadata
            if found is None:
                raise CheckpointError(damaged(folder, step, "its index is not whole"))
            tree = found.tree
            seen = {
                name: (tuple(item.shape), str(np.dtype(item.dtype)))
                for name, item in tree.items()
            }
            compare(path, seen, wanted)
            arguments = {
                name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted
            }
            leaves = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=dict.fromkeys(wanted, 0), restore_args=arguments
                ),
            )
    except CheckpointError:
        raise
    except Exception as error:  # orbax passes on what its backends raise
        raise CheckpointError(damaged(folder, step, reason(error))) from error

    def place(path: Any, leaf: Any) -> Any:
        value = leaves.get(jax.tree_util.keystr(path), leaf)
        if isinstance(leaf, jax.Array):
            return replicate(np.asarray(value), leaf.sharding)
        return value

    return jax.tree_util.tree_map_with_path(place, like)


def damaged(folder: Path, step: int, why: str) -> str:
    """Says that a checkpoint is unreadable, and where a run can continue."""
    earlier = [other for other in complete(folder) if other < step]
    then = (
        f"continue from step {earlier[-1]}"
        if earlier
        else "begin anew; there is no earlier one"
    )
    return (
        f"The checkpoint {path_of(folder, step)} is damaged and cannot be read "
        f"({why}): delete that folder to {then}."
    )


def compare(path: Path, seen: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises if a checkpoint does not hold the wanted leaves."""
    for name in sorted(seen.keys() | wanted.keys()):
        if seen.get(name) != wanted.get(name):
            raise CheckpointError(
                f"The checkpoint {path} belongs to another model or optimiser. First "
                f"difference: {name} is {seen.get(name, 'missing')} in the checkpoint, "
                f"wanted {wanted.get(name, 'missing')}."
            )


def complete(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in order."""
    names = (path.name for path in folder.glob(PREFIX + "*") if path.is_dir())
    steps = (name.removeprefix(PREFIX) for name in names)
    return sorted(int(step) for step in steps if step.isdecimal())


def path_of(folder: Path, step: int) -> Path:
    """Returns the absolute path of a checkpoint; orbax takes no other."""
    return (folder / f"{PREFIX}{step:08d}").absolute()


def named_leaves(state: PyTree) -> dict[str, Any]:
    """Returns the leaves of a state by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def reason(error: Exception) -> str:
    """Says in one line why writing or reading failed."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "no space left on the device"
    return f"{type(error).__name__}: {text[:120]}"


def last_good(folder: Path) -> str:
    steps = complete(folder)
    if not steps:
        return "There is no earlier checkpoint."
    return f"The last good one is that of step {steps[-1]}."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from logging the failures that are raised as errors anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
