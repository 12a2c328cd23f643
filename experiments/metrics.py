"""JSON-lines metrics, and the evaluation of a network on a whole data set.

A run's file holds one JSON object per line. Its ``kind`` is ``config`` (first line:
configuration, data, versions), ``train`` (mean batch loss over the steps since the last
one), ``eval``, ``layers`` (the report of K-FAC), ``note`` or ``end``.
"""

import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.errors import MetricsError
from experiments.models import Task
from experiments.parallel import Placement

FILE_NAME = "metrics.jsonl"
EVAL_BATCH = 1000


class MetricsFile:
    """Appends records; what a full disk refuses is kept and tried again."""

    def __init__(self, path: Path):
        self.path = path
        self.pending = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab", buffering=0)
        except OSError as error:
            raise MetricsError(f"{path} cannot be written: {error}.") from error

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Writes a record, or keeps it for the next time if the disk is full."""
        record = {"kind": kind, "step": step, **values}
        self.pending += json.dumps(to_json(record), allow_nan=False) + "\n"
        try:
            self.flush()
        except OSError:
            pass  # close() tells, and writes what is left elsewhere

    def flush(self) -> None:
        """Writes what is pending, whole or not at all."""
        end = self.file.seek(0, os.SEEK_END)
        content = self.pending.encode()
        try:
            written = self.file.write(content)
            if written != len(content):
                raise OSError(f"only {written} of {len(content)} bytes were written")
        except OSError:
            self.file.truncate(end)
            raise
        self.pending = ""

    def close(self) -> None:
        try:
            if self.pending:
                self.flush()
        except OSError as error:
            raise MetricsError(
                f"{self.path} cannot be written: {error}. Its last records:\n"
                f"{self.pending}"
            ) from error
        finally:
            self.file.close()


def to_json(value: Any) -> Any:
    """Converts numpy numbers and numbers that are not finite, in nested values."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line without its end (a killed run) is left out."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise MetricsError(f"{path} cannot be read: {error}.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            missing = {"kind", "step"} - record.keys()
        except (ValueError, AttributeError) as error:
            raise MetricsError(
                f"{path}, line {number} is not a metrics record: {line[:80]!r}."
            ) from error
        if missing:
            raise MetricsError(f"{path}, line {number} has no {sorted(missing)[0]}.")
        kinds = {"kind": (str, "a name"), "step": ((int, float), "a number")}
        for name, (kind, wanted) in kinds.items():
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                raise MetricsError(
                    f"{path}, line {number}: {name} is {record[name]!r}; wanted "
                    f"{wanted}."
                )
        records.append(record)
    return records


def keep_until(path: Path, step: int) -> None:
    """Drops the records after a step, which a continued run writes again."""
    if not path.exists():
        return
    records = [
        record
        for record in read_records(path)
        if record["step"] <= step and record["kind"] != "end"
    ]
    content = "".join(json.dumps(record) + "\n" for record in records)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MetricsError(f"{path} cannot be written: {error}.") from error


def make_evaluate(
    task: Task,
    images: np.ndarray,
    labels: np.ndarray,
    placement: Placement | None = None,
) -> Callable[[Any, Any], dict[str, float]]:
    """Returns the evaluation on fixed examples.

    Args:
        task: the network and its loss.
        images: images ``[n, h, w, c]``, or other inputs ``[n, ...]``.
        labels: labels ``[n]``, or whatever is to be predicted of the inputs.
        placement: devices that share the examples; None for one.
    """
    evaluate = jax.jit(task.evaluate)
    count = 1 if placement is None else placement.count
    shared = len(images) - len(images) % count
    cuts = [*range(0, shared, EVAL_BATCH - EVAL_BATCH % count), shared, len(images)]
    parts = [slice(*ends) for ends in itertools.pairwise(cuts) if ends[0] < ends[1]]

    def run(params: Any, model_state: Any) -> dict[str, float]:
        totals: dict[str, float] = {}
        for rows in parts:
            batch = images[rows], labels[rows]
            if placement is not None:
                batch = placement.rows(*batch)
            sums = evaluate(params, model_state, *batch)
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: value / len(images) for name, value in totals.items()}

    return run
