"""Tasks, sizes, options and search spaces of the study; JAX is not needed.

A size is a set of tasks with a number of trials and seeds. What decides a run's
numbers is in `TaskSize`; its fingerprint goes into every record.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import optuna

from experiments.configs import NetConfig
from experiments.configs.checks import check_integer, digest, json_values
from experiments.errors import ConfigError
from experiments.tuning.spaces import Choice, Log

SizeName = Literal["tiny", "small", "medium", "gpu", "reach"]
TaskName = Literal["autoencoder", "mlp", "lenet", "resnet", "transformer"]
OptimiserName = Literal[
    "sgd", "adamw", "muon", "soap", "kfac_jax", "ours", "kfac_jax_auto", "ours_auto"
]

TASKS: tuple[TaskName, ...] = ("autoencoder", "mlp", "lenet", "resnet", "transformer")
OPTIMISERS: tuple[OptimiserName, ...] = (
    "sgd", "adamw", "muon", "soap", "kfac_jax", "ours"
)  # fmt: skip
# Both K-FACs with steps and damping of their own, only when they are asked for.
AUTOMATIC: tuple[OptimiserName, ...] = ("kfac_jax_auto", "ours_auto")
FIRST_ORDER: tuple[OptimiserName, ...] = ("sgd", "adamw")


@dataclasses.dataclass(frozen=True)
class Curvature:
    """How the two K-FACs estimate and refresh; fixed, not searched."""

    fisher: str = "mc"  # how our statistics are made
    # Our refresh interval grows by a step at every refresh, up to this.
    longest: int = 10
    # Our least number of steps between inversions; in the beginning a fifth of the
    # steps taken, if that is less.
    inverse_interval: int = 10
    factor_decay: float = 0.9  # weight of the old statistics, for both
    peer_interval: int = 5  # steps between kfac-jax's refreshes
    peer_inverse: int = 25  # steps between its inversions
    # Further arguments of ``kfac.kfac``.
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """A task of a size."""

    model: str  # name of the network, as in ``experiments.models``
    dataset: str  # name of the data set
    net: NetConfig  # sizes of the network
    train: int | None  # training examples used; None for all that are not held out
    # Examples held out of the training set (of a text: windows of its last tenth) for
    # the loss that decides.
    validation: int
    batch: int  # examples per step
    steps: int  # the budget: no run takes more
    eval_every: int  # steps between evaluations
    curvature: Curvature = Curvature()  # of the K-FACs

    def __post_init__(self) -> None:
        for name in ("validation", "batch", "steps", "eval_every"):
            check_integer(name, getattr(self, name), at_least=1)

    def shared(self) -> dict[str, Any]:
        return json_values(self)

    def fingerprint(self, optimiser: str | None = None) -> str:
        """Short digest of what decides the runs of an optimiser."""
        values = self.shared()
        curvature = values.pop("curvature")
        peer = {k: v for k, v in curvature.items() if k.startswith("peer_")}
        if optimiser == "kfac_jax":
            values |= {**peer, "factor_decay": curvature["factor_decay"]}
        elif optimiser == "ours":
            values |= {k: v for k, v in curvature.items() if k not in peer}
        return digest(values)


@dataclasses.dataclass(frozen=True)
class Size:
    """A rung of the ladder."""

    tasks: dict[TaskName, TaskSize]  # the tasks by name
    trials: int  # trials of each optimiser on each task, at least 2
    seeds: int  # runs of each winner


CONV = Curvature(longest=20, inverse_interval=20, peer_interval=10, peer_inverse=50)

TINY = Size(
    {
        "autoencoder": TaskSize(
            "autoencoder", "digits", NetConfig(code=(8, 4)), 64, 32, 16, 4, 2
        ),
        "mlp": TaskSize("mlp", "digits", NetConfig(hidden=(8,)), 64, 32, 16, 4, 2),
        "lenet": TaskSize("lenet5", "mnist5k", NetConfig(), 64, 32, 16, 4, 2, CONV),
        "resnet": TaskSize(
            "resnet", "digits", NetConfig(blocks=(1,), width=4), 64, 32, 16, 4, 2, CONV
        ),
        "transformer": TaskSize(
            "lm",
            "tinyshakespeare",
            NetConfig(context=8, layers=1, heads=1, features=4),
            32, 4, 4, 4, 2,
        ),
    },
    trials=2,
    seeds=2,
)  # fmt: skip
# An hour of one core.
SMALL = Size(
    {
        "autoencoder": TaskSize(
            "autoencoder",
            "mnist",
            NetConfig(code=(256, 64, 30)),
            10_000, 2_000, 256, 600, 10,
        ),
        "mlp": TaskSize(
            "mlp",
            "fashion_mnist",
            NetConfig(hidden=(512, 512)),
            20_000, 2_000, 256, 300, 10,
        ),
        "lenet": TaskSize(
            "lenet5", "cifar10", NetConfig(), 10_000, 2_000, 128, 500, 10, CONV
        ),
        "resnet": TaskSize(
            "resnet",
            "cifar10",
            NetConfig(blocks=(1, 1, 1), width=8),
            5_000, 1_000, 64, 240, 10, CONV,
        ),
        "transformer": TaskSize(
            "lm",
            "tinyshakespeare",
            NetConfig(context=64, layers=2, heads=4, features=64),
            None, 256, 32, 300, 10,
        ),
    },
    trials=8,
    seeds=5,
)  # fmt: skip
# Hours of two cores.
MEDIUM = Size(
    {
        "autoencoder": TaskSize(
            "autoencoder",
            "mnist",
            NetConfig(code=(1000, 500, 250, 30)),
            None, 5_000, 512, 1_000, 20,
        ),
        "mlp": TaskSize(
            "mlp",
            "fashion_mnist",
            NetConfig(hidden=(1000, 1000)),
            None, 5_000, 512, 600, 20,
        ),
        "lenet": TaskSize(
            "lenet5", "cifar10", NetConfig(), None, 5_000, 128, 2_000, 50, CONV
        ),
        "resnet": TaskSize(
            "resnet",
            "cifar10",
            NetConfig(blocks=(1, 1, 1), width=16),
            None, 2_000, 128, 800, 20, CONV,
        ),
        "transformer": TaskSize(
            "lm",
            "tinyshakespeare",
            NetConfig(context=64, layers=2, heads=4, features=128),
            None, 1_000, 32, 800, 20,
        ),
    },
    trials=16,
    seeds=5,
)  # fmt: skip
# Ten minutes of one accelerator; compiling is most of it.
GPU = dataclasses.replace(MEDIUM, trials=4)
# The tasks of reach_loss: the autoencoder of the K-FAC paper, and two more.
REACH = Size(
    {
        "autoencoder": TaskSize(
            "autoencoder",
            "mnist",
            NetConfig(code=(1000, 500, 250, 30)),
            None, 5_000, 1_000, 480, 10,
        ),
        "mlp": TaskSize(
            "mlp", "mnist", NetConfig(hidden=(256, 256)), None, 5_000, 500, 1_200, 60
        ),
        "transformer": TaskSize(
            "lm",
            "tinyshakespeare",
            NetConfig(context=64, layers=2, heads=4, features=96),
            None, 640, 32, 400, 20,
        ),
    },
    trials=8,
    seeds=1,
)  # fmt: skip
SIZES: dict[str, Size] = {"tiny": TINY, "small": SMALL, "medium": MEDIUM, "gpu": GPU}
SIZES["reach"] = REACH


@dataclasses.dataclass(frozen=True)
class Study:
    """Steps and seconds to a target that tuned first-order runs set beforehand."""

    size: SizeName = "small"
    """Rung of the ladder: small is an hour of one core, medium hours of two, gpu ten
    minutes of an accelerator, reach that of reach_loss, tiny a test."""
    tasks: tuple[TaskName, ...] = TASKS
    """Tasks, in this order."""
    optimisers: tuple[OptimiserName, ...] = OPTIMISERS
    """Optimisers; sgd and adamw set the targets and always take part."""
    slack: float = 0.02
    """The target is the best first-order loss plus this share of it, so that other
    seeds of that run come there too."""
    redo: tuple[OptimiserName, ...] = ()
    """Forget the finished runs of these optimisers; sgd and adamw are not possible,
    because the targets are theirs."""
    core: int | None = None
    """Run on this core alone, one thread at a time; None for all."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    out: Path = Path("runs/benchmarks/time_to_target")
    """Folder of the records, the summary and the plots."""
    report: bool = False
    """Only make summary and plots again from the records."""

    def __post_init__(self) -> None:
        wrong = [name for name in self.redo if name in FIRST_ORDER]
        if wrong:
            raise ConfigError(
                f"redo is {', '.join(wrong)}; the targets are theirs. Give another "
                "folder with --out."
            )
        wanted = *FIRST_ORDER, *self.optimisers
        every = [n for n in (*OPTIMISERS, *AUTOMATIC) if n in wanted]
        object.__setattr__(self, "optimisers", tuple(every))

    @property
    def lines(self) -> Path:
        return self.out / "time_to_target.jsonl"

    @property
    def rung(self) -> Size:
        """Tasks, trials and seeds of the size."""
        return SIZES[self.size]


@dataclasses.dataclass(frozen=True)
class Space:
    """The hyper-parameters of an optimiser; those that are None it does not have."""

    learning_rate: Log  # the highest of the schedule
    usual: dict[str, float]  # the first trial's values, without the horizon
    # Share of the budget after which the schedule has come down.
    horizon: Log = Log(0.2, 1.0)
    weight_decay: Log | None = None  # decoupled, multiplied by the learning rate
    beta2: Choice | None = None  # decay of second moments
    damping: Log | None = None  # of the factors
    # Bound on the squared step in the Fisher metric.
    kl_clip: Log | Choice | None = None
    momentum: Choice | None = None  # heavy ball

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What Optuna draws from, by name."""
        ranges = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: space.distribution()
            for name, space in ranges.items()
            if isinstance(space, (Log, Choice))
        }


DECAY = Log(1e-4, 0.1)
BETAS = Choice((0.95, 0.99, 0.999))
MOMENTA = Choice((0.0, 0.9))
# Steps of kfac-jax are compiled for a bound: few values, few programs.
BOUNDS = Choice((1e-3, 1e-2, 1e-1))
# The same for both K-FACs.
KFAC = Space(
    Log(0.01, 0.5),
    {"learning_rate": 0.05, "damping": 0.1, "kl_clip": 1e-2, "momentum": 0.9},
    damping=Log(1e-3, 1.0),
    kl_clip=BOUNDS,
    momentum=MOMENTA,
)
SPACES: dict[OptimiserName, Space] = {
    "sgd": Space(
        Log(3e-3, 0.5),
        {"learning_rate": 0.05, "weight_decay": 5e-4},
        weight_decay=DECAY,
    ),
    "adamw": Space(
        Log(3e-4, 3e-2),
        {"learning_rate": 3e-3, "weight_decay": 1e-2, "beta2": 0.99},
        weight_decay=DECAY,
        beta2=BETAS,
    ),
    "muon": Space(
        Log(3e-3, 0.3),
        {"learning_rate": 0.02, "weight_decay": 1e-2, "beta2": 0.99},
        weight_decay=DECAY,
        beta2=BETAS,
    ),
    "soap": Space(
        Log(3e-4, 3e-2),
        {"learning_rate": 3e-3, "weight_decay": 1e-2, "beta2": 0.95},
        weight_decay=DECAY,
        beta2=Choice((0.9, 0.95, 0.99)),
    ),
    "kfac_jax": KFAC,
    "ours": KFAC,
    **dict.fromkeys(AUTOMATIC, Space(Log(1.0, 1.0), {"learning_rate": 1.0})),
}
# The autoencoder's loss is a sum over 784 pixels: smaller steps of SGD, larger bounds.
# SOAP's steps with AdamW's learning rates are too short for its plateau, as Muon's are.
KFAC_AUTOENCODER = dataclasses.replace(
    KFAC,
    usual={"learning_rate": 0.3, "damping": 0.1, "kl_clip": 1.0, "momentum": 0.0},
    kl_clip=Choice((0.01, 0.1, 1.0)),
)
KFAC_TRANSFORMER = dataclasses.replace(
    KFAC,
    usual={"learning_rate": 0.1, "damping": 1e-3, "kl_clip": 1e-2, "momentum": 0.0},
    damping=Log(1e-5, 0.1),
)
SPECIAL: dict[tuple[TaskName, OptimiserName], Space] = {
    ("autoencoder", "sgd"): dataclasses.replace(
        SPACES["sgd"],
        learning_rate=Log(1e-4, 2e-2),
        usual={"learning_rate": 2e-3, "weight_decay": 5e-4},
    ),
    ("autoencoder", "soap"): dataclasses.replace(
        SPACES["soap"],
        learning_rate=Log(3e-3, 0.3),
        usual={"learning_rate": 0.02, "weight_decay": 1e-2, "beta2": 0.95},
    ),
    ("autoencoder", "kfac_jax"): KFAC_AUTOENCODER,
    ("autoencoder", "ours"): KFAC_AUTOENCODER,
    ("transformer", "kfac_jax"): KFAC_TRANSFORMER,
    ("transformer", "ours"): KFAC_TRANSFORMER,
}


def space_of(task: TaskName, optimiser: OptimiserName) -> Space:
    """The search space of an optimiser on a task."""
    return SPECIAL.get((task, optimiser), SPACES[optimiser])


def to_step(values: dict[str, Any], steps: int) -> dict[str, Any]:
    """A trial's values as a step takes them: the horizon becomes a number of steps."""
    return values | {"horizon": values["horizon"] * steps}
