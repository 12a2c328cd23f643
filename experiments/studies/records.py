"""The records of studies: files of finished runs, and queries over them by DuckDB.

Every study appends a line per finished run to its cell's file. `query` makes them one
table, ``runs``, whatever file they are in: columns go by name, a field that a record
lacks is null, and so is a number that was not finite when it was written. A Parquet
file is read, too: its rows are the table.
"""

import contextlib
import glob
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb

from experiments import metrics
from experiments.benchmarks.common import machine
from experiments.errors import MetricsError
from experiments.studies.study import Study

Record = dict[str, Any]


class Cells:
    """The files of the finished runs, one for each cell."""

    def __init__(self, config: Study):
        self.config, self.machine = config, machine()

    def path(self, name: str) -> Path:
        """The file of a cell; a study may have a single one."""
        out = self.config.out
        return out if out.suffix == ".jsonl" else out / f"{name}.jsonl"

    def read(self, name: str) -> list[Record]:
        """What a cell has finished."""
        path, wanted = self.path(name), self.config.shared()
        found = metrics.read_records(path)
        for record in found:
            if record["fingerprint"] != self.config.fingerprint():
                seen = record["config"]
                fields = [k for k in wanted if seen.get(k) != wanted[k]]
                apart = [f"{k} {seen.get(k)!r}, not {wanted[k]!r}" for k in fields]
                raise MetricsError(
                    f"{path} holds runs of another configuration: {', '.join(apart)}. "
                    "Give another place with --out."
                )
        return found

    def append(self, name: str, kind: str, step: int, **values: Any) -> Record:
        """Writes a finished run; the record as it can be read again."""
        shared = {"fingerprint": self.config.fingerprint()}
        shared |= {"config": self.config.shared(), "machine": self.machine}
        path = self.path(name)
        drop_half_line(path)
        file = metrics.MetricsFile(path)
        file.append(kind, step, **(shared | values))
        file.close()
        return {"kind": kind, "step": step, **metrics.to_json(values)}

    def get(
        self, name: str, kind: str, make: Callable[[], Record], **key: Any
    ) -> tuple[Record, bool]:
        """The finished run of a key, or a new one, and whether it is new.

        A new one is made of `make`, whose values have their ``step``.
        """
        for record in self.read(name):
            if all(record.get(k) == v for k, v in {"kind": kind, **key}.items()):
                return record, False
        return self.append(name, kind, **(key | make())), True


def drop_half_line(path: Path) -> None:
    """Cuts off a last line without its end, which a killed run has left."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


Source = Path | Iterable[Path]
# Types are inferred from all records, and objects are structs however few records have
# a key. No string is taken for a date, which the formats below cannot match: what was
# written is what is read.
OPTIONS = (
    "filename = 'runs_file', union_by_name = true, sample_size = -1, "
    "maximum_sample_files = 1000000, map_inference_threshold = -1, "
    "field_appearance_threshold = 0, dateformat = 'never %Y', "
    "timestampformat = 'never %Y'"
)
# Nothing is downloaded; one thread keeps Parquet files the same byte for byte.
SETTINGS = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "threads": 1,
}
NOT_RECORDED = "not recorded"


def files_of(source: Source) -> list[Path]:
    """The files with records, by name."""
    if isinstance(source, Path):
        found = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    else:
        found = list(source)
    found = [path for path in found if path.is_file() and path.stat().st_size]
    if not found:
        wanted = source if isinstance(source, Path) else ", ".join(map(str, source))
        raise MetricsError(f"{wanted or 'No file'} holds no results: no JSON lines.")
    return found


def whole_lines(path: Path, scratch: Path) -> Path:
    """A file without a last line that has no end (a killed run)."""
    content = path.read_bytes()
    if content.endswith(b"\n"):
        return path
    copy = scratch / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content[: content.rfind(b"\n") + 1])
    return copy


@contextlib.contextmanager
def connect(source: Source) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory with the records in the table ``runs``."""
    with duckdb.connect(config=SETTINGS) as base:
        if isinstance(source, Path) and source.suffix == ".parquet":
            read_parquet(base, source)
        else:
            read_lines(base, files_of(source))
        yield base


def read_parquet(base: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Makes ``runs`` of the rows of a Parquet file."""
    name = {"file": glob.escape(str(path))}
    try:
        base.execute("CREATE TABLE runs AS FROM read_parquet($file)", name)
    except duckdb.Error as error:
        raise MetricsError(f"{path} cannot be read as Parquet: {error}") from error


def read_lines(base: duckdb.DuckDBPyConnection, files: list[Path]) -> None:
    """Makes ``runs`` of JSON lines."""
    shown = ", ".join(map(str, files))
    with tempfile.TemporaryDirectory() as scratch:
        whole = [whole_lines(p, Path(scratch, str(i))) for i, p in enumerate(files)]
        names = [glob.escape(str(path)) for path in whole]
        read = f"CREATE TABLE lines AS SELECT * FROM read_ndjson($files, {OPTIONS})"
        try:
            base.execute(read, {"files": names})
        except duckdb.Error as error:
            raise MetricsError(f"{shown} cannot be read as records: {error}") from error
    columns = [name for name, *_ in base.execute("DESCRIBE lines").fetchall()]
    if "kind" not in columns:
        raise MetricsError(f"{shown}: no record has a kind.")
    cell = "" if "cell" in columns else "parse_filename(runs_file, true) AS cell, "
    base.execute(f"CREATE VIEW runs AS SELECT {cell}* EXCLUDE (runs_file) FROM lines")


def query(source: Source, sql: str, **parameters: Any) -> list[dict[str, Any]]:
    with connect(source) as base:
        return ask(base, sql, **parameters)


def ask(
    base: duckdb.DuckDBPyConnection, sql: str, **parameters: Any
) -> list[dict[str, Any]]:
    rows = base.execute(
        f"SELECT to_json(answer) FROM ({sql}) AS answer", parameters or None
    ).fetchall()
    return [json.loads(text) for (text,) in rows]


def without_nulls(value: Any) -> Any:
    """Drops the null fields of objects, as of records that lack what others have."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def flat_columns(name: str, kind: Any, path: str = "") -> list[tuple[str, str]]:
    """Columns for Parquet: structs are unfolded, numbers and lists of them are kept."""
    expression = path + '"' + name.replace('"', '""') + '"'
    if kind.id == "struct":
        return [
            (inner, f"{name}.{label}")
            for child, child_kind in kind.children
            for inner, label in flat_columns(child, child_kind, f"{expression}.")
        ]
    if kind.id == "list":
        nested = dict(kind.children)["child"].id in ("struct", "list", "map")
        return [] if nested else [(expression, name)]
    return [(expression, name)]


def save_parquet(source: Source, path: Path) -> None:
    """Writes the flat columns of the records, for any program that reads Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with connect(source) as base:
        runs = base.table("runs")
        pairs = [
            pair
            for name, kind in zip(runs.columns, runs.types, strict=True)
            for pair in flat_columns(name, kind)
        ]
        names = [label.replace('"', '""') for _, label in pairs]
        chosen = [f'{e} AS "{n}"' for (e, _), n in zip(pairs, names, strict=True)]
        sql = f"SELECT {', '.join(chosen)} FROM runs"
        base.sql(sql).write_parquet(str(path), compression="zstd")


def all_machines(source: Source) -> list[dict[str, Any]]:
    """The different values of the records' ``machine``, in no order."""
    sql = "SELECT DISTINCT machine FROM runs WHERE machine IS NOT NULL"
    return [row["machine"] for row in query(source, sql)]


def machines(source: Source) -> dict[str, Any]:
    found = all_machines(source)
    merged = {}
    for name in found[0] if found else ():
        if name == "commit":
            continue
        seen = {json.dumps(machine[name]): machine[name] for machine in found}
        values = sorted((v for v in seen.values() if v is not None), key=str)
        if len(seen) == 1:
            merged[name] = found[0][name]
        elif len(values) > 3:
            first, last = min(values), max(values)
            merged[name] = f"from {text_of(first)} to {text_of(last)}"
        else:
            merged[name] = values
    return merged


def text_of(value: Any) -> str:
    """A value of `machines` as text: of a list its first item, as of the loads."""
    first = value[0] if isinstance(value, list) and value else value
    return f"{first:.3g}" if isinstance(first, float) else str(first)


def commits(source: Source) -> tuple[str, ...]:
    """The commits of the code that made the runs."""
    found = {machine.get("commit") or NOT_RECORDED for machine in all_machines(source)}
    return tuple(sorted(found))
