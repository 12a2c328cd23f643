"""The damping study's configuration and its sizes; JAX is not needed."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from experiments.configs.checks import (
    check,
)
from experiments.errors import ConfigError
from experiments.studies.study import RESULTS, Report, Study

SizeName = Literal["tiny", "small", "paper"]
SGD, ADAPTIVE, JUDGED, FIXED = "sgd", "adaptive", "levenberg_marquardt", "fixed"
DEFAULT = "default"
TaskName = Literal["autoencoder", "mlp", "lenet", "resnet"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is searched: an optimiser with its damping."""

    method: str  # ``sgd``, ``fixed``, ``adaptive`` or ``levenberg_marquardt``
    damping: float | None = None  # of ``fixed``; None otherwise

    @property
    def name(self) -> str:
        """The name of its file and on the command line."""
        return self.method if self.damping is None else f"fixed_{self.damping:.0e}"


@dataclasses.dataclass(frozen=True)
class DampingStudy(Study):
    """Training loss of K-FAC by damping, learning rates and momenta tuned for each."""

    LEFT_OUT: ClassVar[str] = "dampings trials tasks task_rates"

    size: SizeName = "small"
    """Rung of the ladder; decides the defaults of all other options."""
    only: tuple[str, ...] = ()
    """Names of the cells to run, such as sgd, adaptive, fixed_1e-03, sensitivity or
    tasks; all if empty."""
    dampings: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Fixed dampings; also the first ones of the sensitivity runs."""
    trials: int = 30
    """Trials of each cell's search; the paper had 300."""
    seeds: int = 3
    """Seeds of the sensitivity runs, and of the winners on other tasks."""
    dataset: Literal["digits", "mnist"] = "mnist"
    """Images, scaled to [0, 1]."""
    hidden: int = 5
    """Hidden layers; the paper's network has six layers of weights."""
    width: int = 100
    """Units of each hidden layer; there is no nonlinearity."""
    batch_size: int = 128
    """Images per step."""
    steps: int = 420
    """Steps of a trial."""
    eval_every: int = 60
    """Steps between evaluations."""
    eval_examples: int = 10_000
    """Training images on which the training loss is measured."""
    fisher: Literal["empirical", "mc"] = "mc"
    """How the factors are estimated."""
    kl_clip: float | None = None
    """Trust region of the searches; None for none, as damping is what is studied."""
    inverse_interval: int = 5
    """Steps between inversions."""
    tasks: tuple[TaskName, ...] = ("autoencoder", "mlp", "lenet", "resnet")
    """Tasks of time_to_target on which adaptive and default damping are compared."""
    task_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Learning rates tried there."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = Path("runs/studies/damping")
    """Folder of the finished trials, a file for each cell, and of the report."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="trials seeds hidden width batch_size eval_every steps "
            "inverse_interval eval_examples",
            positive="dampings task_rates kl_clip",
        )
        if self.steps % self.eval_every:
            raise ConfigError(
                f"steps is {self.steps}; wanted a multiple of eval-every, "
                f"{self.eval_every}."
            )
        self.check_only("sensitivity", "tasks")

    def all_cells(self) -> list[Cell]:
        """All cells, the fixed dampings from small to large."""
        fixed = [Cell(FIXED, damping) for damping in sorted(self.dampings)]
        return [Cell(SGD), *fixed, Cell(ADAPTIVE), Cell(JUDGED)]

    @property
    def wants_sensitivity(self) -> bool:
        """Whether the sensitivity runs are wanted."""
        return not self.only or "sensitivity" in self.only

    @property
    def wants_tasks(self) -> bool:
        """Whether the runs on other tasks are wanted."""
        return bool(self.tasks) and (not self.only or "tasks" in self.only)


TINY = DampingStudy(
    size="tiny",
    dampings=(1e-3, 1.0),
    trials=3,
    seeds=1,
    dataset="digits",
    hidden=2,
    width=16,
    batch_size=64,
    steps=40,
    eval_every=10,
    eval_examples=500,
    tasks=("mlp",),
    task_rates=(0.1, 0.3),
)
SMALL = DampingStudy()
PAPER = DampingStudy(size="paper", trials=300)
SIZES: dict[str, DampingStudy] = {c.size: c for c in (TINY, SMALL, PAPER)}


@dataclasses.dataclass(frozen=True)
class DampingReport(Report):
    """Makes the page and the plots of a damping study from its finished trials."""

    folder: Path = RESULTS / "damping"
