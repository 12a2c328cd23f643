"""What the configurations of all studies have in common; JAX is not needed."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from experiments.configs.checks import check_choice, digest, json_values

RESULTS = Path("experiments/studies/results")
# Which cells are run, how often and where files lie decides nothing about a run.
ALWAYS_LEFT_OUT = ("size", "only", "seeds", "data_dir", "out")


class Study:
    """The configuration of a study, a frozen dataclass; its cells have names."""

    LEFT_OUT: ClassVar[str] = ""  # further fields that decide nothing about a run
    out: Any  # folder of the finished runs, or their file

    def all_cells(self) -> list[Any]:
        """All cells, in the order in which they are run."""
        raise NotImplementedError

    def cells(self) -> list[Any]:
        only = getattr(self, "only", ())
        return [c for c in self.all_cells() if not only or c.name in only]

    def check_only(self, *more: str) -> None:
        """Checks the names given with ``--only``."""
        for name in getattr(self, "only", ()):
            check_choice("only", name, [*(c.name for c in self.all_cells()), *more])

    def shared(self) -> dict[str, Any]:
        """What decides a run beside its cell, values and seed, as JSON values."""
        return json_values(self, (*ALWAYS_LEFT_OUT, *self.LEFT_OUT.split()))

    def fingerprint(self) -> str:
        return digest(self.shared())


@dataclasses.dataclass(frozen=True)
class Report:
    """Makes the page and the plots of a study from its finished runs."""

    folder: Path
    """The study's results."""
    out: Path | None = None
    """Folder of page and plots; that of the results if not given."""
