"""The files of a study's finished runs, one for each cell."""

from pathlib import Path
from typing import Any, Protocol

from experiments import metrics
from experiments.benchmarks.common import machine
from experiments.errors import MetricsError

Record = dict[str, Any]


class Study(Protocol):
    """What the files need to know of a study's configuration."""

    @property
    def out(self) -> Path:
        """Folder of the files."""
        ...

    def shared(self) -> dict[str, Any]:
        """What decides a run beside its cell, as JSON values."""
        ...

    def fingerprint(self) -> str:
        """Short digest of `shared`."""
        ...


class Cells:
    """The files of the finished runs, one for each cell."""

    def __init__(self, config: Study):
        """Remembers the folder."""
        self.config, self.machine = config, machine()

    def read(self, name: str) -> list[Record]:
        """What a cell has finished."""
        path = self.path(name)
        found = metrics.read_records(path)
        for record in found:
            if record["fingerprint"] != self.config.fingerprint():
                raise MetricsError(
                    f"{path} holds runs of another configuration: "
                    f"{record['config']}, not {self.config.shared()}. Give another "
                    "folder with --out."
                )
        return found

    def path(self, name: str) -> Path:
        """The file of a cell."""
        return self.config.out / f"{name}.jsonl"

    def append(self, name: str, kind: str, step: int, **values: Any) -> Record:
        """Writes a finished run."""
        shared = {"fingerprint": self.config.fingerprint()}
        shared |= {"config": self.config.shared(), "machine": self.machine}
        path = self.path(name)
        drop_half_line(path)
        file = metrics.MetricsFile(path)
        file.append(kind, step, **values, **shared)
        file.close()
        return {"kind": kind, "step": step, **metrics.to_json(values)}


def drop_half_line(path: Path) -> None:
    """Cuts off a last line without its end, which a killed run has left."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
