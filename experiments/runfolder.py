"""Run folders: one process at a time, and one configuration for ever."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import RunFolderError


def check_same_run(
    folder: Path, records: list[dict[str, Any]], wanted: dict[str, Any]
) -> None:
    """Raises if a run folder holds a run of another configuration or other data."""
    if not records:
        return
    seen = flatten(records[0])
    for name, value in flatten(wanted).items():
        if seen.get(name) != value:
            raise RunFolderError(
                f"{folder} holds a run with {name} = {seen.get(name)!r}; wanted "
                f"{value!r}. Choose another --workdir, or --fresh to delete it."
            )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process alone."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        fcntl = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be used: {error}.") from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunFolderError(
                    f"{folder} is in use by another process. Wait for it, or choose "
                    "another --workdir."
                ) from error
        yield
