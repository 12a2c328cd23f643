"""The batch-size study's configuration and its sizes; JAX is not needed."""

import dataclasses
import itertools
from pathlib import Path
from typing import ClassVar, Literal

from experiments.configs.checks import (
    check,
)
from experiments.errors import ConfigError
from experiments.studies.study import RESULTS, Report, Study
from experiments.tuning.spaces import (
    AdamWSpace,
    KFACSpace,
    Linear,
    Log,
    MuonSpace,
    SGDSpace,
    Space,
)

SizeName = Literal["tiny", "small", "paper"]
OptimizerName = Literal["sgd", "adamw", "muon", "kfac"]
DatasetName = Literal["digits", "mnist5k", "mnist", "fashion_mnist", "cifar10"]
OPTIMIZERS = ("sgd", "adamw", "muon", "kfac")

# The decay of the learning rate has the same range for all.
LATER = {"lr_decay": Log(0.02, 1.0, 0.1), "decay_epoch": Linear(0.4, 0.95, 0.7)}
MOMENTUM = Linear(0.7, 0.97, 0.9)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is searched: an optimiser at a batch size."""

    optimizer: str
    batch_size: int  # examples per step

    @property
    def name(self) -> str:
        """The name of its file and on the command line."""
        return f"{self.optimizer}_{self.batch_size}"


@dataclasses.dataclass(frozen=True)
class BatchStudy(Study):
    """Test accuracy of tuned optimisers by batch size, all for the same epochs."""

    LEFT_OUT: ClassVar[str] = "optimizers batch_sizes trials"

    size: SizeName = "small"
    """Rung of the ladder; decides the defaults of all other options."""
    only: tuple[str, ...] = ()
    """Names of the cells to run, such as sgd_128 or kfac_2048; all if empty."""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    """Optimisers; adamw is the paper's Adam with decoupled weight decay."""
    batch_sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Examples per step."""
    trials: int = 6
    """Trials of each cell's search; more of them go on with it."""
    seeds: int = 5
    """Seeds of each cell's winner, from 1; the trials have seed 0."""
    dataset: DatasetName = "cifar10"
    """Images."""
    pool: int = 2
    """Images are averaged over squares of so many pixels."""
    model: Literal["lenet5", "mlp"] = "lenet5"
    """Network; images of digits are too small for lenet5."""
    hidden: tuple[int, ...] = (32,)
    """Hidden widths of mlp."""
    train_examples: int = 16_384
    """Training images, always the same ones."""
    validation_examples: int = 2_000
    """Images held out of the training set for the search."""
    augmentation: Literal["none", "crop-flip"] = "crop-flip"
    """Random changes of the training images, the same for all optimisers."""
    epochs: int = 10
    """Passes over the training images, at every batch size."""
    startup_trials: int = 3
    """Trials before the sampler and the pruner look at results; the first has usual
    values, the others are drawn at random."""
    prune_from: int = 6
    """First epoch after which a trial worse than the median may end; 0 for never."""
    fisher: Literal["empirical", "mc"] = "mc"
    """Labels of K-FAC's factors: sampled, or those of the data. Two short runs at batch
    128 saw no difference on validation images, so it is the true Fisher's estimate."""
    refresh_examples: int = 1_280
    """K-FAC refreshes and inverts its factors whenever it has seen so many examples,
    at most once per step."""
    kl_clip: float | None = 1e-2
    """K-FAC's trust region; None for none."""
    sgd: SGDSpace = SGDSpace(
        **LATER,
        learning_rate=Log(1e-2, 1.0, 0.1),
        momentum=MOMENTUM,
        weight_decay=Log(1e-5, 1e-2, 5e-4),
    )
    """Ranges of SGD."""
    adamw: AdamWSpace = AdamWSpace(
        **LATER,
        learning_rate=Log(5e-4, 2e-2, 3e-3),
        beta1=MOMENTUM,
        weight_decay=Log(1e-4, 0.3, 1e-2),
    )
    """Ranges of AdamW."""
    muon: MuonSpace = MuonSpace(
        **LATER,
        learning_rate=Log(2e-3, 0.1, 2e-2),
        momentum=MOMENTUM,
        weight_decay=Log(1e-4, 0.3, 1e-2),
    )
    """Ranges of Muon."""
    kfac: KFACSpace = KFACSpace(
        **LATER,
        learning_rate=Log(3e-3, 0.3, 0.02),
        momentum=MOMENTUM,
        weight_decay=Log(1e-4, 0.1, 5e-3),
        factor_decay=Linear(0.5, 0.99, 0.95),
        damping=Log(3e-3, 1.0, 0.05),
    )
    """Ranges of K-FAC."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = Path("runs/studies/batch_size")
    """Folder of the finished runs, a file for each cell, and of the report."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="batch_sizes trials seeds pool train_examples epochs "
            "validation_examples startup_trials refresh_examples",
            integers="prune_from",
            positive="kl_clip",
        )
        if max(self.batch_sizes) > self.train_examples:
            raise ConfigError(
                f"batch-sizes has {max(self.batch_sizes)}; wanted at most "
                f"train-examples, {self.train_examples}."
            )
        self.check_only()

    def all_cells(self) -> list[Cell]:
        """All cells; the optimisers of a batch size before the next."""
        pairs = itertools.product(self.batch_sizes, self.optimizers)
        return [Cell(optimizer, size) for size, optimizer in pairs]

    def space(self, optimizer: str) -> Space:
        return getattr(self, optimizer)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps of an epoch; an incomplete last batch is left out."""
        return self.train_examples // batch_size

    def steps(self, batch_size: int) -> int:
        return self.epochs * self.steps_per_epoch(batch_size)

    def refresh_every(self, batch_size: int) -> int:
        """Steps between refreshes of K-FAC's factors."""
        return max(1, self.refresh_examples // batch_size)


TINY = BatchStudy(
    size="tiny",
    batch_sizes=(32, 128),
    trials=2,
    seeds=2,
    dataset="digits",
    pool=1,
    model="mlp",
    train_examples=512,
    validation_examples=128,
    epochs=2,
    startup_trials=1,
    prune_from=1,
    refresh_examples=64,
)
SMALL = BatchStudy()
PAPER = BatchStudy(
    size="paper",
    trials=100,
    pool=1,
    train_examples=45_000,
    validation_examples=5_000,
    epochs=100,
    startup_trials=10,
    prune_from=20,
)
SIZES: dict[str, BatchStudy] = {c.size: c for c in (TINY, SMALL, PAPER)}


@dataclasses.dataclass(frozen=True)
class BatchReport(Report):
    """Makes the page and the plots of a batch-size study from its finished runs."""

    folder: Path = RESULTS / "batch_size"
