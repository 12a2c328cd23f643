"""The survey's configuration, its sizes and its columns; JAX is not needed."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import tyro

from experiments.configs.checks import (
    check,
)
from experiments.errors import ConfigError
from experiments.studies.study import Study

SizeName = Literal["tiny", "small", "full"]
DatasetName = Literal[
    "digits", "wine", "breast_cancer", "mnist", "fashion_mnist", "cifar10"
]
ModelName = Literal[
    "linear",
    "mlp",
    "deep_mlp",
    "tanh_mlp",
    "deep_linear",
    "norm_mlp",
    "conv",
    "lenet",
    "residual",
    "attention",
]
OptimizerName = Literal["sgd", "adam", "kfac"]
Cell = tuple[str, str]
DATASETS: tuple[DatasetName, ...] = (
    "digits", "wine", "breast_cancer", "mnist", "fashion_mnist", "cifar10",
)  # fmt: skip
MODELS: tuple[ModelName, ...] = (
    "linear", "mlp", "deep_mlp", "tanh_mlp", "deep_linear", "norm_mlp", "conv",
    "lenet", "residual", "attention",
)  # fmt: skip
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adam", "kfac")
# In the order of the columns ``cosines`` and ``overlaps``.
MATRICES = ("hessian", "fisher", "mc_fisher", "gradient_covariance")
APPROXIMATIONS = ("full", "block_diagonal", "kronecker", "diagonal")
# How many eigenvalues and eigenvectors are looked at.
TOP = 10

RESULTS = Path("experiments/survey/results")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The hyper-parameters of a run."""

    optimizer: OptimizerName  # ``sgd`` (with momentum), ``adam`` or ``kfac``
    learning_rate: float  # constant
    batch_size: int  # examples of a step
    weight_decay: float  # decoupled, multiplied by the learning rate
    seed: int  # of the parameters, the batches and the sampled labels

    @property
    def name(self) -> str:
        """The setting as a word, the end of a run's id."""
        return (
            f"{self.optimizer}-{self.learning_rate:g}-{self.batch_size}-"
            f"{self.weight_decay:g}-{self.seed}"
        )


@dataclasses.dataclass(frozen=True)
class SurveyConfig(Study):
    """Curvature matrices of many networks, measured while they are trained."""

    LEFT_OUT: ClassVar[str] = (
        "datasets models optimizers sgd_rates adam_rates kfac_rates "
        "batch_sizes weight_decays workers "
    )

    size: SizeName = "small"
    """Rung of the ladder; decides the defaults of all other options."""
    datasets: tuple[DatasetName, ...] = DATASETS
    """Data sets; a cell is one of them and a model."""
    models: tuple[ModelName, ...] = ("mlp", "deep_mlp", "conv", "attention")
    """Networks."""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    """Optimisers; a setting is one of them with a rate, a batch size and a decay."""
    sgd_rates: tuple[float, ...] = (0.03, 0.1)
    """Learning rates of SGD with momentum 0.9."""
    adam_rates: tuple[float, ...] = (0.003, 0.01)
    """Learning rates of Adam."""
    kfac_rates: tuple[float, ...] = (0.03, 0.1)
    """Learning rates of K-FAC."""
    batch_sizes: tuple[int, ...] = (16, 64)
    """Examples of a step."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Decoupled weight decays."""
    seeds: int = 1
    """Runs of every setting."""
    steps: int = 300
    """Steps of a run."""
    checkpoints: tuple[float, ...] = (0.0, 0.05, 0.3, 1.0)
    """When the matrices are measured, as shares of the steps."""
    train_examples: int | None = 256
    """Training examples at most; None for all."""
    test_examples: int | None = 1000
    """Test examples at most; None for all."""
    pooled: bool = True
    """Whether larger images are averaged down to about 8 x 8 pixels."""
    width: int = 6
    """Units of a hidden layer, channels, and features of a token."""
    depth: int = 1
    """Residual blocks, and layers of attention."""
    damping: float = 1e-3
    """Added to the eigenvalues by the measures that need it."""
    dense_below: int = 2000
    """Parameters of the largest network whose matrices are formed."""
    rows: int = 256
    """Examples that are measured at once."""
    kfac_damping: float = 1e-2
    """Damping of K-FAC's steps."""
    sharpness_radius: float = 0.1
    """Length of the step in which the sharpest rise of the loss is looked for."""
    sharpness_steps: int = 5
    """Gradients of that search."""
    workers: int = 1
    """Processes; each takes whole cells."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = Path("runs/survey")
    """Folder of the finished runs, a file for each cell."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="seeds steps width depth rows sharpness_steps workers batch_sizes "
            "train_examples test_examples",
            positive="sgd_rates adam_rates kfac_rates damping kfac_damping "
            "sharpness_radius",
            not_negative="weight_decays",
            shares="checkpoints",
        )
        for name, known in (("datasets", DATASETS), ("models", MODELS)):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; wanted some of {', '.join(known)}")

    def cells(self) -> list[Cell]:
        """Data set and model of every cell."""
        return [(data, model) for data in self.datasets for model in self.models]

    def settings(self) -> list[Setting]:
        """All settings; those that share a compiled step are next to each other."""
        rates = {
            "sgd": self.sgd_rates,
            "adam": self.adam_rates,
            "kfac": self.kfac_rates,
        }
        return [
            Setting(optimizer, rate, batch_size, decay, seed)
            for optimizer in self.optimizers
            for batch_size in self.batch_sizes
            for rate in rates[optimizer]
            for decay in self.weight_decays
            for seed in range(self.seeds)
        ]

    def measured_steps(self) -> list[int]:
        """The steps after which matrices are measured, ascending."""
        return sorted({round(share * self.steps) for share in self.checkpoints})


TINY = SurveyConfig(
    size="tiny",
    datasets=("digits", "wine"),
    models=("linear", "mlp"),
    optimizers=("sgd", "kfac"),
    sgd_rates=(0.1,),
    kfac_rates=(0.1,),
    batch_sizes=(16,),
    weight_decays=(0.0,),
    steps=10,
    checkpoints=(0.0, 1.0),
    train_examples=64,
    test_examples=64,
    width=2,
    rows=64,
    sharpness_steps=2,
)
SMALL = SurveyConfig()
FULL = SurveyConfig(
    size="full",
    models=MODELS,
    sgd_rates=(0.003, 0.01, 0.03, 0.1),
    adam_rates=(0.0003, 0.001, 0.003, 0.01),
    kfac_rates=(0.003, 0.01, 0.03, 0.1),
    batch_sizes=(32, 128, 512),
    weight_decays=(0.0, 1e-4, 1e-3, 1e-2),
    seeds=3,
    steps=5000,
    checkpoints=(0.0, 0.01, 0.05, 0.2, 0.5, 1.0),
    train_examples=None,
    test_examples=None,
    pooled=False,
    width=64,
    depth=3,
    rows=500,
)
SIZES: dict[str, SurveyConfig] = {c.size: c for c in (TINY, SMALL, FULL)}


@dataclasses.dataclass(frozen=True)
class SurveyReport:
    """Makes the table, the page and the plots of the survey from its finished runs."""

    folder: Path = RESULTS
    """The survey's results: a file for each cell, or the table."""
    out: Path | None = None
    """Folder of table, page and plots; that of the results if not given."""


@dataclasses.dataclass(frozen=True)
class SurveyQuery:
    """Asks the survey's table."""

    sql: Annotated[str, tyro.conf.Positional]
    """DuckDB's SQL over the view ``survey``."""
    folder: Path = RESULTS
    """The survey's results: a file for each cell, or the table."""


MATRIX_TITLES = {
    "hessian": "Hessian",
    "fisher": "Fisher",
    "mc_fisher": "MC Fisher",
    "gradient_covariance": "gradient covariance",
}
APPROXIMATION_TITLES = {
    "full": "full",
    "block_diagonal": "block diagonal",
    "kronecker": "Kronecker",
    "diagonal": "diagonal",
}
ORDER = ", ".join(MATRICES)


class Column(NamedTuple):
    """A column."""

    name: str  # in the table
    kind: str  # DuckDB's type
    meaning: str  # one line
    field: str | None = None  # of the JSON lines, where it is not the name

    @property
    def source(self) -> str:
        return self.field or self.name


RUN_COLUMNS = (
    Column("run", "VARCHAR", "name of the run"),
    Column("dataset", "VARCHAR", "data set"),
    Column("data", "VARCHAR", "the data set in full: what it is, in words"),
    Column("model", "VARCHAR", "network"),
    Column("num_params", "INTEGER", "parameters of the network, P"),
    Column("num_train", "INTEGER", "training examples, N"),
    Column("num_test", "INTEGER", "test examples"),
    Column("optimizer", "VARCHAR", "sgd, adam or kfac"),
    Column("learning_rate", "DOUBLE", "learning rate"),
    Column("batch_size", "INTEGER", "examples of a step"),
    Column("weight_decay", "DOUBLE", "decoupled weight decay"),
    Column("seed", "INTEGER", "of parameters, batches and sampled labels"),
    Column("damping", "DOUBLE", "λ of the measures"),
    Column("seconds", "FLOAT", "wall-clock seconds of the run with its measurements"),
)
CHECKPOINT_COLUMNS = (
    Column("step", "INTEGER", "steps taken"),
    Column("epoch", "FLOAT", "epochs taken"),
    Column("train_loss", "FLOAT", "mean loss of the training examples"),
    Column("test_loss", "FLOAT", "mean loss of the test examples"),
    Column("train_accuracy", "FLOAT", "share of the training examples that are right"),
    Column("test_accuracy", "FLOAT", "share of the test examples that are right"),
    Column("gradient_norm", "FLOAT", "length of the training loss's gradient"),
    Column("sharpness", "FLOAT", "greatest rise of the training loss in a small ball"),
)
MATRIX_COLUMNS = (
    Column("matrix", "VARCHAR", f"M: {ORDER}"),
    Column("approximation", "VARCHAR", f"A, of M: {', '.join(APPROXIMATIONS)}"),
    Column("eigenvalues", "FLOAT[]", "the ten largest of A, descending"),
    Column("trace", "FLOAT", "tr A"),
    Column("frobenius", "FLOAT", "‖A‖ of Frobenius"),
    Column("stable_rank", "FLOAT", "‖A‖² of Frobenius over that of the spectral norm"),
    Column("effective_dimension", "FLOAT", "tr A (A + λI)⁻¹"),
    Column("condition_number", "FLOAT", "of A + λI"),
    Column("log_det", "FLOAT", "log det(A + λI)"),
    Column("tic", "FLOAT", "tr C (A + λI)⁻¹ / N, C the full gradient covariance"),
    Column("error", "FLOAT", "‖A − M‖ / ‖M‖, Frobenius norms"),
    Column("spectral_error", "FLOAT", "‖A − M‖ / ‖M‖, spectral norms"),
    Column("cosine", "FLOAT", "⟨A, M⟩ / (‖A‖ ‖M‖), Frobenius norms"),
    Column("overlap", "FLOAT", "‖UᵀV‖² / 10, ten leading eigenvectors of A and of M"),
    Column("cosines", "FLOAT[]", f"cosine of A with the same of {ORDER}"),
    # OVERLAPS is a reserved word of SQL.
    Column(
        "subspace_overlaps",
        "FLOAT[]",
        f"overlap of A with the same of {ORDER}",
        "overlaps",
    ),
)
ROW_COLUMNS = CHECKPOINT_COLUMNS + MATRIX_COLUMNS
# Nested, the same in all rows of a run.
RECORD_COLUMNS = ("fingerprint", "config", "machine")
