"""Where the records of ``kfac.report`` go: a CSV file, TensorBoard, a live table.

Every log has the verbs ``write(step, opt_state)`` and ``close()`` and is a context
manager. ``rich`` and ``tensorboardX`` are imported by the log that needs them.
"""

import contextlib
import csv
import importlib
import numbers
import os
from collections.abc import Sequence
from typing import Any, TextIO

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.report import check_spectra, report

# What the live table shows of a record, where it has it, and the heading.
COLUMNS = {
    "name": "layer",
    "interval": "interval",
    "since_refresh": "since refresh",
    "since_inversion": "since inversion",
    "diff": "change",
    "failures": "failures",
    "effective_rank_a": "rank of A",
    "effective_rank_g": "rank of G",
    "condition": "condition",
}
WHOLE = ("steps", "skipped", "damping", "trust", "retreats")


def optional(name: str, log: str) -> Any:
    """An optional package's module, or an error that says what to install."""
    package = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"kfac.logs.{log} needs {package}: pip install {package}"
        ) from error


class Log(contextlib.AbstractContextManager[Any]):
    """What all logs share: they report, and they can be closed."""

    def __init__(self, layers: Sequence[LayerTag] | None = None, spectra: bool = False):
        """Takes what ``kfac.report`` is given."""
        check_spectra(layers, spectra)
        self.layers: Sequence[LayerTag] | None = layers
        self.spectra: bool = spectra

    def write(self, step: int, opt_state: Any) -> None:
        """Writes the records of a state.

        Args:
            step: The number to write them under.
            opt_state: Any optax state that contains a ``KFACState``.
        """
        self.put(int(step), report(opt_state, self.layers, self.spectra))

    def put(self, step: int, records: list[dict[str, Any]]) -> None:
        """Writes what ``kfac.report`` returned."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is written after this."""

    def __exit__(self, *error: Any) -> None:
        """Closes it."""
        self.close()


class CSV(Log):
    """A CSV file: one line per step and layer; None is an empty cell.

    Args:
        path: The file; one that is there is continued.
        layers: ``tagged.layers``, for ``kfac.report``.
        spectra: The same.

    Raises:
        ValueError: By ``write``: the file has other columns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: Sequence[LayerTag] | None = None,
        spectra: bool = False,
    ):
        super().__init__(layers, spectra)
        self.path = path
        self.columns: list[str] = []
        if os.path.exists(path):
            with open(path, newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), [])
        self.file: TextIO = open(path, "a", newline="", encoding="utf-8")

    def put(self, step: int, records: list[dict[str, Any]]) -> None:
        columns = ["step", *dict.fromkeys(key for r in records for key in r)]
        if not self.columns:
            self.columns = columns
            csv.writer(self.file).writerow(columns)
        if set(columns) != set(self.columns):
            other = sorted(set(columns) ^ set(self.columns))
            raise ValueError(
                f"{self.path} has other columns than these records: {', '.join(other)}."
                " Write to another file, or report with the same options."
            )
        writer = csv.DictWriter(self.file, self.columns, restval="")
        writer.writerows({"step": step, **record} for record in records)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard(Log):
    """Scalars ``<layer>/<key>`` for TensorBoard, of everything that is a number.

    Args:
        writer: A folder, for which ``tensorboardX.SummaryWriter`` is made (and closed
            by ``close``); or anything with ``add_scalar(tag, value, step)``, which
            stays open.
        layers: ``tagged.layers``, for ``kfac.report``.
        spectra: The same.
    """

    def __init__(
        self,
        writer: Any,
        layers: Sequence[LayerTag] | None = None,
        spectra: bool = False,
    ):
        super().__init__(layers, spectra)
        self.owned: bool = isinstance(writer, (str, os.PathLike))
        if self.owned:
            module = optional("tensorboardX", "TensorBoard")
            writer = module.SummaryWriter(os.fspath(writer))
        self.writer = writer

    def put(self, step: int, records: list[dict[str, Any]]) -> None:
        for record in records:
            for key, value in record.items():
                if isinstance(value, numbers.Real):
                    self.writer.add_scalar(f"{record['name']}/{key}", value, step)

    def close(self) -> None:
        if self.owned:
            self.writer.close()


class Table(Log):
    """A table in the terminal that follows the run; ``close`` leaves the last one."""

    def __init__(
        self,
        layers: Sequence[LayerTag] | None = None,
        spectra: bool = False,
        console: Any = None,
    ):
        super().__init__(layers, spectra)
        live = optional("rich.live", "Table")
        self.live: Any = live.Live(console=console, auto_refresh=False)
        self.live.start()

    def put(self, step: int, records: list[dict[str, Any]]) -> None:
        first = records[0] if records else {}
        whole = [f"{k} {text(first[k])}" for k in WHOLE if first.get(k) is not None]
        module = optional("rich.table", "Table")
        table = module.Table(title=", ".join([f"step {step}", *whole]))
        columns = [k for k in COLUMNS if any(k in record for record in records)]
        for key in columns:
            table.add_column(COLUMNS[key], justify="left" if key == "name" else "right")
        for record in records:
            table.add_row(*(text(record.get(key)) for key in columns))
        self.live.update(table, refresh=True)

    def close(self) -> None:
        self.live.stop()


def text(value: Any) -> str:
    """A cell: three digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
