"""The sizes of the Bayesian study: for tests, for two cores, for a cluster."""

import dataclasses
import itertools
from pathlib import Path
from typing import ClassVar, Literal

from experiments.configs.checks import (
    check,
    check_number,
)
from experiments.errors import ConfigError
from experiments.studies.study import RESULTS, Report, Study

SizeName = Literal["tiny", "small", "paper"]
DatasetName = Literal["digits", "mnist5k", "mnist", "fashion_mnist", "cifar10"]
NetworkName = Literal["mlp", "lenet5", "resnet"]

ADAM, SGD, KFAC = POINTS = ("adam", "sgd", "kfac")
NOISY, VOGN, IVON = POSTERIORS = ("noisy_kfac", "vogn", "ivon")
TRAINED = (*POINTS, *POSTERIORS)
# What is made of the weights of trained methods: the method, and how.
DERIVED = {
    "adam_laplace": (ADAM, "kronecker"),
    "adam_last_layer": (ADAM, "last_layer"),
    "kfac_laplace": (KFAC, "kronecker"),
    "kfac_last_layer": (KFAC, "last_layer"),
    "adam_ensemble": (ADAM, "ensemble"),
}
METHODS = (*TRAINED, *DERIVED)
ACTIVE = ("active_bald", "active_random", "active_entropy")
REGRESSION = ("regression_noisy_kfac", "regression_laplace")
FURTHER = (*ACTIVE, *REGRESSION)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method on a network and a data set."""

    dataset: str
    network: str
    method: str  # one of `METHODS`

    @property
    def name(self) -> str:
        """The name of its file and on the command line."""
        return f"{self.dataset}_{self.network}_{self.method}"

    def of(self, method: str) -> "Cell":
        """Another method on the same problem."""
        return dataclasses.replace(self, method=method)


class Grid:
    """Values that are tried in every combination; a field is a hyper-parameter."""

    def trials(self) -> list[dict[str, float]]:
        """All combinations, the last field changing first."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        }
        combined = itertools.product(*fields.values())
        return [dict(zip(fields, values, strict=True)) for values in combined]


@dataclasses.dataclass(frozen=True)
class PointGrid(Grid):
    """Hyper-parameters of Adam, SGD and K-FAC."""

    learning_rate: tuple[float, ...]
    """Learning rate of the first step; it falls to 0 as a cosine."""
    weight_decay: tuple[float, ...]
    """Decoupled weight decay."""


@dataclasses.dataclass(frozen=True)
class PosteriorGrid(Grid):
    """Hyper-parameters of noisy K-FAC and VOGN."""

    learning_rate: tuple[float, ...]
    """Learning rate of the first step; it falls to 0 as a cosine."""
    prior_precision: tuple[float, ...]
    """Precision of the normal prior of the weights."""
    temperature: tuple[float, ...]
    """Weight of the divergence from the prior; 1 is Bayes' rule."""


@dataclasses.dataclass(frozen=True)
class IVONGrid(PosteriorGrid):
    """Hyper-parameters of IVON."""

    initial: tuple[float, ...]
    """Curvature before the first step."""


@dataclasses.dataclass(frozen=True)
class ActiveLearning:
    """Which images to label next; hyper-parameters are set by hand, not searched."""

    dataset: DatasetName = "fashion_mnist"
    """Images."""
    hidden: tuple[int, ...] = (100,)
    """Hidden widths of the network, an MLP."""
    pool_examples: int = 5_000
    """Images without labels at the start, always the same ones."""
    test_examples: int = 5_000
    """Test images."""
    start: int = 100
    """Labelled images of the first round, drawn at random."""
    acquired: int = 50
    """Images labelled after every round."""
    rounds: int = 10
    """How often images are acquired; one training more."""
    steps: int = 300
    """Steps of every round's training, which begins anew."""
    batch_size: int = 50
    """Images per step."""
    samples: int = 32
    """Draws of the weights for mutual information and predictions."""
    noisy_learning_rate: float = 0.03
    """Of noisy K-FAC."""
    noisy_damping: float = 0.03
    """Of noisy K-FAC's steps."""
    prior_precision: float = 10.0
    """Of noisy K-FAC."""
    adam_learning_rate: float = 3e-3
    """Of Adam."""
    adam_weight_decay: float = 0.03
    """Of Adam."""
    seeds: int = 5
    """Runs of each way to acquire, from seed 1."""


@dataclasses.dataclass(frozen=True)
class Regression:
    """A cubic with noise and a gap: synthetic data of a fixed seed."""

    examples: int = 60
    """Points."""
    hidden: tuple[int, ...] = (32, 32)
    """Hidden widths of the network; tanh."""
    noise: float = 0.1
    """Standard deviation of the observations, known to the model."""
    steps: int = 2_000
    """Full-batch steps."""
    learning_rate: float = 0.03
    """Of noisy K-FAC, and of K-FAC for Laplace's approximation."""
    damping: float = 1e-3
    """Of the steps."""
    prior_precision: float = 1.0
    """Of both methods' prior."""
    samples: int = 200
    """Draws of the weights for the band."""


@dataclasses.dataclass(frozen=True)
class BayesStudy(Study):
    """Calibration of point estimates and posteriors, each tuned for itself."""

    LEFT_OUT: ClassVar[str] = "datasets networks further"

    size: SizeName = "small"
    """Rung of the ladder; decides the defaults of all other options."""
    only: tuple[str, ...] = ()
    """Names of the cells to run, such as cifar10_lenet5_adam, active_bald or
    regression_laplace; all if empty. Cells made of others' weights need those first."""
    datasets: tuple[DatasetName, ...] = ("fashion_mnist", "cifar10")
    """Images."""
    networks: tuple[NetworkName, ...] = ("lenet5", "resnet")
    """Networks; images of digits are too small for lenet5."""
    further: bool = True
    """Whether active learning and the regression example are run, too."""
    seeds: int = 5
    """Seeds of each cell's winner, from 1; the trials have seed 0."""
    pool: int = 2
    """Images are averaged over squares of so many pixels."""
    hidden: tuple[int, ...] = (32,)
    """Hidden widths of mlp."""
    blocks: tuple[int, ...] = (1, 1)
    """Residual blocks per stage of resnet."""
    width: int = 8
    """Channels of the stem of resnet; doubled at every stage after the first."""
    train_examples: int = 8_192
    """Training images, always the same ones."""
    validation_examples: int = 2_000
    """Images held out of the training set for the search."""
    test_examples: int = 5_000
    """Test images; the first ones."""
    outside_examples: int = 2_000
    """Images of each strange or shifted set."""
    severities: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Standard deviations of the noise on shifted images, of the brightest pixel."""
    batch_size: int = 128
    """Images per step."""
    epochs: int = 12
    """Passes over the training images, the same for all methods."""
    samples: int = 32
    """Draws of the weights for predictions on test images."""
    search_samples: int = 8
    """Draws of the weights for predictions on validation images."""
    bins: int = 15
    """Bins of the calibration errors."""
    refresh_every: int = 10
    """Steps between refreshes of the factors of K-FAC and noisy K-FAC."""
    damping: float = 0.03
    """Damping of the steps of K-FAC and noisy K-FAC."""
    vogn_damping: float = 1e-3
    """Damping of VOGN's steps."""
    kl_clip: float = 1e-2
    """Trust region of K-FAC and noisy K-FAC."""
    momentum: float = 0.9
    """Of all methods; Adam's first."""
    ivon_decay: float = 0.999
    """Weight of IVON's old curvature."""
    adam: PointGrid = PointGrid((2e-3, 5e-3, 0.01, 0.03), (0.03, 0.3, 1.0))
    """Grid of Adam with decoupled weight decay."""
    sgd: PointGrid = PointGrid((0.03, 0.1, 0.3), (1e-3, 3e-3, 0.01))
    """Grid of SGD."""
    kfac: PointGrid = PointGrid((0.01, 0.03, 0.1), (0.01, 0.03, 0.1))
    """Grid of K-FAC."""
    noisy_kfac: PosteriorGrid = PosteriorGrid(
        (0.01, 0.03, 0.1), (30.0, 100.0), (0.1, 0.3)
    )
    """Grid of noisy K-FAC."""
    vogn: PosteriorGrid = PosteriorGrid((3e-3, 0.01), (10.0, 100.0), (0.03, 0.3))
    """Grid of VOGN."""
    ivon: IVONGrid = IVONGrid((0.05, 0.1, 0.3), (30.0,), (0.1, 1.0), (0.1, 0.3))
    """Grid of IVON."""
    active: ActiveLearning = ActiveLearning()
    """Active learning."""
    regression: Regression = Regression()
    """The regression example."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = Path("runs/studies/bayes")
    """Folder of the finished runs, a file for each cell, and of the report."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="seeds pool width train_examples validation_examples test_examples "
            "outside_examples batch_size epochs samples search_samples bins "
            "refresh_every",
            positive="damping vogn_damping kl_clip severities",
            decays="momentum ivon_decay",
        )
        check(self.active, "active.")
        for method in TRAINED:
            for values in self.trials(method):
                for name, value in values.items():
                    check_number(f"{method}.{name}", value, above=0)
            trials, most = len(self.trials(method)), len(self.trials(ADAM))
            if not 1 <= trials <= most:
                raise ConfigError(
                    f"{method} has {trials} trials; wanted from 1 to {most}, those of "
                    "adam, which the others are compared with."
                )
        if self.batch_size > self.train_examples:
            raise ConfigError(
                f"batch-size is {self.batch_size}; wanted at most train-examples, "
                f"{self.train_examples}."
            )
        self.check_only(*FURTHER)

    def all_cells(self) -> list[Cell]:
        """All cells; what is made of others' weights comes after them."""
        problems = itertools.product(self.datasets, self.networks)
        return [Cell(*problem, method) for problem in problems for method in METHODS]

    def further_cells(self) -> list[str]:
        """The further parts that are wanted."""
        if self.only:
            return [name for name in FURTHER if name in self.only]
        return list(FURTHER) if self.further else []

    def trials(self, method: str) -> list[dict[str, float]]:
        return getattr(self, method).trials()

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; an incomplete last batch is left out."""
        return self.train_examples // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class BayesReport(Report):
    """Makes the page and the plots of a Bayesian study from its finished runs."""

    folder: Path = RESULTS / "bayes"


TINY = BayesStudy(
    size="tiny",
    datasets=("digits",),
    networks=("mlp",),
    seeds=2,
    pool=1,
    hidden=(8,),
    train_examples=256,
    validation_examples=64,
    test_examples=100,
    outside_examples=50,
    severities=(0.2,),
    batch_size=64,
    epochs=2,
    samples=4,
    search_samples=2,
    bins=5,
    refresh_every=2,
    adam=PointGrid((3e-3, 0.01), (0.01,)),
    sgd=PointGrid((0.1,), (1e-3,)),
    kfac=PointGrid((0.03,), (0.01,)),
    noisy_kfac=PosteriorGrid((0.03,), (10.0,), (0.1, 1.0)),
    vogn=PosteriorGrid((0.01,), (10.0,), (0.1,)),
    ivon=IVONGrid((0.1,), (10.0,), (1.0,), (0.1,)),
    active=ActiveLearning(
        dataset="digits",
        hidden=(8,),
        pool_examples=80,
        test_examples=50,
        start=10,
        acquired=5,
        rounds=1,
        steps=4,
        batch_size=8,
        samples=3,
        seeds=2,
    ),
    regression=Regression(examples=12, hidden=(4,), steps=4, samples=5),
)
SMALL = BayesStudy()
PAPER = BayesStudy(
    size="paper",
    pool=1,
    blocks=(3, 3, 3),
    width=16,
    train_examples=45_000,
    validation_examples=5_000,
    test_examples=10_000,
    outside_examples=10_000,
    epochs=100,
)
SIZES: dict[str, BayesStudy] = {c.size: c for c in (TINY, SMALL, PAPER)}
