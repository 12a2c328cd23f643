"""The interval study's configuration, and its ladder of sizes; JAX is not needed.

A cell of the study is a refresh rule, its threshold and a seed. Everything else is the
same in every cell.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import ClassVar, Literal

from experiments.configs.checks import (
    check,
)
from experiments.errors import ConfigError
from experiments.studies.study import RESULTS, Study

SizeName = Literal["tiny", "small", "medium", "paper"]
RuleName = Literal["multiple", "elapsed", "staleness"]
ModelName = Literal["resnet", "resnet50"]
DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "imagenet"]

EVERY = "every"
RULES = ("multiple", "elapsed", "staleness")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the study."""

    rule: str  # one of `RULES`, or ``every``
    threshold: float | None  # ``λ`` of the rule; None for ``every``
    seed: int  # of the initial parameters and of the order of the data

    @property
    def title(self) -> str:
        """What the cell is called on the screen."""
        value = "" if self.threshold is None else f" {self.threshold:g}"
        return f"{self.rule}{value}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class IntervalStudy(Study):
    """Factor traffic and accuracy of the refresh rules, beside every-step refreshes."""

    LEFT_OUT: ClassVar[str] = "rules thresholds"

    size: SizeName = "small"
    """Rung of the ladder; decides the defaults of all other options."""
    rules: tuple[RuleName, ...] = RULES
    """Refresh rules."""
    thresholds: tuple[float, ...] = (0.2, 0.25, 0.3)
    """Thresholds λ of the relative change, for every rule."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; all cells of a seed are run before the next."""
    dataset: DatasetName = "cifar10"
    """Images; see the README for where they are looked for."""
    pool: int = 2
    """Images are averaged over squares of so many pixels."""
    train_examples: int | None = None
    """Use only this many training images."""
    model: ModelName = "resnet"
    """Residual network with batch norm; resnet50 is that of the paper."""
    blocks: tuple[int, ...] = (0, 1, 1)
    """Residual blocks per stage of resnet."""
    width: int = 4
    """Channels of the stem of resnet; doubled at every stage after the first."""
    batch_size: int = 1024
    """Images per step, over all devices."""
    steps: int = 300
    """Steps of a run."""
    host_devices: int | None = 8
    """Devices the CPU is split into; None uses the accelerators there are."""
    learning_rate: float = 0.1
    """Learning rate of the first step."""
    decay_power: float = 1.0
    """Power of the polynomial on which the learning rate falls to 0; 0 is constant."""
    damping: float = 0.03
    """Damping of the factors."""
    momentum: float = 0.9
    """Heavy-ball momentum."""
    factor_decay: float = 0.95
    """Weight of the old statistics in the moving averages."""
    record_every: int = 10
    """Steps between records of intervals, bytes and batch loss."""
    eval_every: int = 50
    """Steps between evaluations on the test set."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = Path("runs/studies/intervals.jsonl")
    """Where finished cells are appended, one per line."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="pool width batch_size steps record_every eval_every train_examples "
            "host_devices",
            integers="seeds",
            positive="thresholds learning_rate damping",
            not_negative="decay_power",
            decays="momentum factor_decay",
        )
        if self.eval_every % self.record_every or self.steps % self.record_every:
            raise ConfigError(
                f"steps is {self.steps}, eval-every {self.eval_every}; wanted "
                f"multiples of record-every, {self.record_every}."
            )
        if self.host_devices and self.batch_size % self.host_devices:
            raise ConfigError(
                f"batch-size is {self.batch_size}; wanted a multiple of host-devices, "
                f"{self.host_devices}."
            )

    def cells(self) -> list[Cell]:
        """All runs, those of the first seed first, each seed's baseline in front."""
        grid = list(itertools.product(self.rules, self.thresholds))
        return [
            Cell(rule, threshold, seed)
            for seed in self.seeds
            for rule, threshold in [(EVERY, None), *grid]
        ]


# Two cells of a moment, for tests and to try the command.
TINY = IntervalStudy(
    size="tiny",
    rules=("elapsed",),
    thresholds=(0.3,),
    seeds=(0,),
    dataset="digits",
    pool=1,
    blocks=(1, 1),
    width=4,
    batch_size=256,
    steps=20,
    eval_every=10,
)
# Minutes per cell on the CPU.
SMALL = IntervalStudy()
# One machine with accelerators; a network and a batch ten times as large.
MEDIUM = IntervalStudy(
    size="medium",
    pool=1,
    blocks=(3, 3, 3),
    width=16,
    batch_size=8192,
    steps=600,
    host_devices=None,
)
# The paper's size: 36 epochs of ImageNet; learning rate and damping are not tuned.
PAPER = IntervalStudy(
    size="paper",
    rules=("multiple", "elapsed", "staleness"),
    seeds=(0, 1),
    dataset="imagenet",
    pool=1,
    model="resnet50",
    batch_size=16_384,
    steps=2_814,
    record_every=14,
    eval_every=98,
    host_devices=None,
)
SIZES: dict[str, IntervalStudy] = {
    config.size: config for config in (TINY, SMALL, MEDIUM, PAPER)
}


@dataclasses.dataclass(frozen=True)
class IntervalReport:
    """Makes the table and the plots of an interval study from its JSON lines."""

    file: Path = RESULTS / "intervals.jsonl"
    """The study's results."""
    out: Path | None = None
    """Folder of summary and plots; that of the results if not given."""
    heat_threshold: float = 0.3
    """Threshold whose intervals are drawn as heat maps."""
