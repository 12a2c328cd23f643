"""The damping study's configuration and its sizes; JAX is not needed."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.configs.checks import (
    check_choice,
    check_integer,
    check_number,
    digest,
    json_values,
)
from experiments.errors import ConfigError

SizeName = Literal["tiny", "small", "paper"]
DATASETS = ("digits", "mnist")
SGD, ADAPTIVE, JUDGED, FIXED = "sgd", "adaptive", "levenberg_marquardt", "fixed"
DEFAULT = "default"
TaskName = Literal["autoencoder", "mlp", "lenet", "resnet"]

# Which cells are run, how often and where files lie decides nothing about a trial.
NOT_IN_FINGERPRINT = (
    "size",
    "only",
    "dampings",
    "trials",
    "seeds",
    "tasks",
    "task_rates",
    "data_dir",
    "out",
)


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
class DampingStudy:
    """Training loss of K-FAC by damping, learning rates and momenta tuned for each."""

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
        """Checks the values."""
        check_choice("dataset", self.dataset, DATASETS)
        for name in ("trials", "seeds", "hidden", "width", "batch_size", "eval_every"):
            check_integer(name.replace("_", "-"), getattr(self, name), at_least=1)
        check_integer("inverse-interval", self.inverse_interval, at_least=1)
        check_integer("eval-examples", self.eval_examples, at_least=1)
        for damping in self.dampings:
            check_number("dampings", damping, above=0)
        for rate in self.task_rates:
            check_number("task-rates", rate, above=0)
        if self.kl_clip is not None:
            check_number("kl-clip", self.kl_clip, above=0)
        if self.steps % self.eval_every or self.steps < 1:
            raise ConfigError(
                f"steps is {self.steps}; wanted a multiple of eval-every, "
                f"{self.eval_every}."
            )
        known = [cell.name for cell in self.all_cells()]
        for name in self.only:
            check_choice("only", name, (*known, "sensitivity", "tasks"))

    def all_cells(self) -> list[Cell]:
        """All cells, the fixed dampings from small to large."""
        fixed = [Cell(FIXED, damping) for damping in sorted(self.dampings)]
        return [Cell(SGD), *fixed, Cell(ADAPTIVE), Cell(JUDGED)]

    def cells(self) -> list[Cell]:
        """The cells that are wanted."""
        return [c for c in self.all_cells() if not self.only or c.name in self.only]

    @property
    def wants_sensitivity(self) -> bool:
        """Whether the sensitivity runs are wanted."""
        return not self.only or "sensitivity" in self.only

    @property
    def wants_tasks(self) -> bool:
        """Whether the runs on other tasks are wanted."""
        return bool(self.tasks) and (not self.only or "tasks" in self.only)

    def shared(self) -> dict[str, Any]:
        """What decides a trial beside its cell and values, as JSON values."""
        return json_values(self, NOT_IN_FINGERPRINT)

    def fingerprint(self) -> str:
        """Short digest of `shared`."""
        return digest(self.shared())


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
class DampingReport:
    """Makes the page and the plots of a damping study from its finished trials."""

    folder: Path = Path("experiments/studies/results/damping")
    """The study's results."""
    out: Path | None = None
    """Folder of page and plots; that of the results if not given."""
