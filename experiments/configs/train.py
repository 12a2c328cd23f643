"""The configuration of one comparison, and its defaults by data set and model."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from experiments.configs.checks import check_choice, check_integer, check_number, digest
from experiments.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine", "exponential", "polynomial")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How a value changes over the run, from its start to `final_scale` times it."""

    kind: Literal["constant", "linear", "cosine", "exponential", "polynomial"] = (
        "constant"
    )
    """Shape of the decay over all steps of the run."""
    warmup_steps: int = 0
    """Steps of linear growth from zero before the decay starts."""
    final_scale: float = 0.1
    """Last value divided by the first; not used by a constant schedule. Zero only for
    a polynomial one."""
    power: float = 2.0
    """Power of a polynomial schedule."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_choice("schedule.kind", self.kind, SCHEDULES)
        check_integer("schedule.warmup-steps", self.warmup_steps, at_least=0)
        if self.kind == "polynomial":
            check_number(
                "schedule.final-scale", self.final_scale, at_least=0, at_most=1
            )
        else:
            check_number("schedule.final-scale", self.final_scale, above=0, at_most=1)
        check_number("schedule.power", self.power, above=0)


@dataclasses.dataclass(frozen=True)
class SGDConfig:
    """Stochastic gradient descent with momentum."""

    learning_rate: float = 0.1
    """Step size at the start of the schedule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate."""
    momentum: float = 0.9
    """Decay of the velocity."""
    tie_momentum: bool = False
    """Let the momentum follow the learning rate's schedule, warm-up included."""
    nesterov: bool = True
    """Use Nesterov's form of momentum."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_number("sgd.learning-rate", self.learning_rate, above=0)
        check_number("sgd.momentum", self.momentum, at_least=0, below=1)


@dataclasses.dataclass(frozen=True)
class AdamConfig:
    """Adam."""

    learning_rate: float = 1e-3
    """Step size at the start of the schedule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_number("adam.learning-rate", self.learning_rate, above=0)
        check_number("adam.b1", self.b1, at_least=0, below=1)
        check_number("adam.b2", self.b2, at_least=0, below=1)
        check_number("adam.eps", self.eps, above=0)


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """Adam with decoupled weight decay."""

    learning_rate: float = 1e-3
    """Step size at the start of the schedule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-2
    """Decoupled weight decay, multiplied by the learning rate."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_number("adamw.learning-rate", self.learning_rate, above=0)
        check_number("adamw.b1", self.b1, at_least=0, below=1)
        check_number("adamw.b2", self.b2, at_least=0, below=1)
        check_number("adamw.eps", self.eps, above=0)
        check_number("adamw.weight-decay", self.weight_decay, at_least=0)


@dataclasses.dataclass(frozen=True)
class KFACConfig:
    """K-FAC as built by `kfac_jax_lite.kfac`."""

    learning_rate: float = 0.02
    """Step size at the start of the schedule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the learning rate."""
    damping: float = 0.05
    """Added to the curvature; at the start of its schedule."""
    damping_schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the damping."""
    momentum: float = 0.9
    """Decay of the velocity."""
    tie_momentum: bool = False
    """Let the momentum follow the learning rate's schedule, warm-up included."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    kl_clip: float | None = 3e-3
    """Bound of the step's quadratic form (trust region); None for no bound."""
    factor_decay: float = 0.95
    """Weight of the old value in the factors' moving average."""
    fisher: Literal["empirical", "mc", "exact"] = "empirical"
    """Which Fisher matrix the factors estimate."""
    weight_sharing: Literal["expand", "reduce"] = "expand"
    """How positions that share a weight enter the factors."""
    interval: Literal["every", "adaptive", "staleness"] = "every"
    """Rule for the steps at which a layer's factors are refreshed."""
    every: int = 5
    """Steps between refreshes under interval=every."""
    threshold: float = 0.1
    """Relative change below which an interval grows (adaptive, staleness)."""
    rule: Literal["multiple", "elapsed"] = "elapsed"
    """When an adaptive interval is due: at its multiples, or once it has passed."""
    max_interval: int | None = None
    """Longest interval (adaptive, staleness)."""
    inverse: Literal[
        "cholesky", "eigh", "ekfac", "newton_schulz", "low_rank", "auto"
    ] = "cholesky"
    """How the damped curvature is inverted."""
    inverse_interval: int = 10
    """Steps between inverse refreshes."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_number("kfac.learning-rate", self.learning_rate, above=0)
        check_number("kfac.damping", self.damping, above=0)
        if self.damping_schedule.warmup_steps:
            raise ConfigError(
                "kfac.damping-schedule.warmup-steps is "
                f"{self.damping_schedule.warmup_steps}; wanted 0, because a warm-up "
                "starts at zero and the damping must stay positive."
            )
        check_number(
            "kfac.damping-schedule.final-scale",
            self.damping_schedule.final_scale,
            above=0,
        )
        check_number("kfac.momentum", self.momentum, at_least=0, below=1)
        check_number("kfac.weight-decay", self.weight_decay, at_least=0)
        if self.kl_clip is not None:
            check_number("kfac.kl-clip", self.kl_clip, above=0)
        check_number("kfac.factor-decay", self.factor_decay, at_least=0, below=1)
        check_choice("kfac.fisher", self.fisher, ("empirical", "mc", "exact"))
        check_choice("kfac.weight-sharing", self.weight_sharing, ("expand", "reduce"))
        check_choice("kfac.interval", self.interval, ("every", "adaptive", "staleness"))
        check_integer("kfac.every", self.every, at_least=1)
        check_number("kfac.threshold", self.threshold, above=0)
        check_choice("kfac.rule", self.rule, ("multiple", "elapsed"))
        if self.max_interval is not None:
            check_integer("kfac.max-interval", self.max_interval, at_least=1)
        check_choice(
            "kfac.inverse",
            self.inverse,
            ("cholesky", "eigh", "ekfac", "newton_schulz", "low_rank", "auto"),
        )
        check_integer("kfac.inverse-interval", self.inverse_interval, at_least=1)


IMAGES = ("digits", "mnist5k", "mnist", "fashion_mnist", "cifar10")
TEXTS = ("tinyshakespeare", "pydoc")
DATASETS = IMAGES + TEXTS
MODELS = ("mlp", "mlp_nnx", "lenet5", "resnet", "autoencoder", "lm")
AUGMENTATIONS = ("none", "crop-flip")
OPTIMIZERS = ("kfac", "sgd", "adam", "adamw")

DatasetName = Literal[
    "digits", "mnist5k", "mnist", "fashion_mnist", "cifar10", "tinyshakespeare", "pydoc"
]
ModelName = Literal["mlp", "mlp_nnx", "lenet5", "resnet", "autoencoder", "lm"]
OptimizerName = Literal["kfac", "sgd", "adam", "adamw"]

# Where the data lies, how runs are kept and on how many devices they are computed
# decides nothing about the curve.
NOT_IN_FINGERPRINT = (
    "data_dir",
    "workdir",
    "fresh",
    "optimizers",
    "baseline",
    "devices",
)


@dataclasses.dataclass(frozen=True)
class NetConfig:
    """Sizes of the networks; each model reads its own."""

    hidden: tuple[int, ...] = (1000, 1000)
    """Hidden widths of mlp and mlp_nnx."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks per stage of resnet."""
    width: int = 16
    """Channels of the first stage of resnet; doubled at every stage."""
    code: tuple[int, ...] = (1000, 500, 250, 30)
    """Widths of the autoencoder from the image down to its code."""
    context: int = 64
    """Characters that lm sees: the length of a text's windows."""
    layers: int = 2
    """Blocks of lm."""
    heads: int = 4
    """Attention heads per block of lm."""
    features: int = 96
    """Width of lm; a multiple of the number of heads."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("hidden", "blocks", "code"):
            for width in getattr(self, name):
                check_integer(f"net.{name}", width, at_least=1)
        if not self.blocks or not self.code:
            raise ConfigError("net.blocks and net.code need at least one number.")
        for name in ("width", "context", "layers", "heads", "features"):
            check_integer(f"net.{name}", getattr(self, name), at_least=1)
        if self.features % self.heads:
            raise ConfigError(
                f"net.features is {self.features}; wanted a multiple of net.heads, "
                f"{self.heads}."
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One comparison: every listed optimiser from the same start on the same data."""

    dataset: DatasetName = "mnist5k"
    """Data set; digits, mnist5k and pydoc come with packages and need no network."""
    model: ModelName = "mlp"
    """Network; mlp_nnx is the mlp written with flax.nnx; lm wants a text."""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    """Optimisers to run, one after the other."""
    baseline: OptimizerName = "adam"
    """The optimiser whose best training loss the table measures the others by."""
    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 200
    """Examples per step; the last, incomplete batch of an epoch is left out."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data and sampled labels."""
    train_examples: int | None = None
    """Use only this many training examples."""
    eval_examples: int = 10_000
    """Training examples, and test examples, on which the loss is evaluated."""
    augment: Literal["none", "crop-flip"] = "none"
    """Random crops of images padded by an eighth of their size, mirrored or not."""
    mixup_alpha: float = 0.0
    """Parameter of the beta distribution of running mixup; 0 for no mixup."""
    evals_per_epoch: int = 2
    """Evaluations per epoch; their time is not training time."""
    log_every: int = 10
    """Steps between records of the batch loss."""
    checkpoint_every: int = 100
    """Steps between checkpoints; rounded up to a multiple of log_every."""
    devices: int | None = None
    """Devices that share each batch, over all processes; 0 for all; one if not given,
    or all if there are several processes."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    workdir: Path | None = None
    """Folder of the run; by default one under runs/ named after the configuration."""
    fresh: bool = False
    """Delete what is in the run folder instead of continuing from it."""
    net: NetConfig = NetConfig()
    """Sizes of the networks."""
    kfac: KFACConfig = KFACConfig()
    """K-FAC."""
    sgd: SGDConfig = SGDConfig()
    """SGD with momentum."""
    adam: AdamConfig = AdamConfig()
    """Adam."""
    adamw: AdamWConfig = AdamWConfig()
    """AdamW."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_choice("dataset", self.dataset, DATASETS)
        check_choice("model", self.model, MODELS)
        if not self.optimizers:
            raise ConfigError(
                f"optimizers is empty; choose of {', '.join(OPTIMIZERS)}."
            )
        for name in self.optimizers:
            check_choice("optimizers", name, OPTIMIZERS)
        if len(set(self.optimizers)) != len(self.optimizers):
            raise ConfigError(f"optimizers has a name twice: {self.optimizers}.")
        check_choice("baseline", self.baseline, OPTIMIZERS)
        for name in ("epochs", "batch_size", "eval_examples", "evals_per_epoch"):
            check_integer(name.replace("_", "-"), getattr(self, name), at_least=1)
        check_integer("log-every", self.log_every, at_least=1)
        check_integer("checkpoint-every", self.checkpoint_every, at_least=1)
        check_integer("seed", self.seed, at_least=0)
        if self.devices is not None:
            check_integer("devices", self.devices, at_least=0)
        check_choice("augment", self.augment, AUGMENTATIONS)
        check_number("mixup-alpha", self.mixup_alpha, at_least=0)
        if self.dataset in TEXTS and (self.augment != "none" or self.mixup_alpha):
            raise ConfigError(
                f"augment is {self.augment} and mixup-alpha {self.mixup_alpha}; wanted "
                f"none and 0, because {self.dataset} is a text."
            )
        if self.train_examples is not None:
            check_integer("train-examples", self.train_examples, at_least=1)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints; a multiple of `log_every`.

        A record of the batch loss is a mean over `log_every` steps. A checkpoint in
        the middle of one would split it, and a resumed run would log another curve.
        """
        return -(-self.checkpoint_every // self.log_every) * self.log_every

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def run_dict(self, optimizer: str) -> dict[str, Any]:
        """Returns what decides the curve of one optimiser's run, as JSON values."""
        values = self.to_dict()
        for name in (*NOT_IN_FINGERPRINT, *OPTIMIZERS):
            values.pop(name)
        return values | {"optimizer": optimizer, optimizer: self.to_dict()[optimizer]}

    def folder(self) -> Path:
        """Returns the run folder: `workdir`, or one named after the configuration."""
        if self.workdir is not None:
            return Path(self.workdir)
        values = self.to_dict()
        for name in NOT_IN_FINGERPRINT:
            values.pop(name)
        return Path("runs") / f"{self.dataset}-{self.model}-{digest(values)[:8]}"


# How long to train: smaller sets get more epochs.
LENGTH: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 20, "batch_size": 100},
    "mnist5k": {"epochs": 10, "batch_size": 200},
    "mnist": {"epochs": 10, "batch_size": 512},
    "fashion_mnist": {"epochs": 10, "batch_size": 512},
    "cifar10": {"epochs": 10, "batch_size": 128},
    "tinyshakespeare": {
        "epochs": 1,
        "batch_size": 32,
        "eval_examples": 512,
        "evals_per_epoch": 10,
    },
    "pydoc": {
        "epochs": 2,
        "batch_size": 32,
        "eval_examples": 512,
        "evals_per_epoch": 5,
    },
}

COSINE = ScheduleConfig("cosine", warmup_steps=50, final_scale=0.01)
LONG_WARMUP = ScheduleConfig("cosine", warmup_steps=150, final_scale=0.01)

OPTIMISERS: dict[str, dict[str, Any]] = {
    "mlp": {
        "kfac": KFACConfig(),
        "sgd": SGDConfig(learning_rate=0.1),
        "adam": AdamConfig(learning_rate=2e-3),
        "adamw": AdamWConfig(learning_rate=2e-3),
    },
    "lenet5": {
        "kfac": KFACConfig(),
        "sgd": SGDConfig(learning_rate=0.03),
        "adam": AdamConfig(learning_rate=2e-3),
        "adamw": AdamWConfig(learning_rate=2e-3),
    },
    "resnet": {
        "kfac": KFACConfig(every=10, inverse_interval=20),
        "sgd": SGDConfig(learning_rate=0.1),
        "adam": AdamConfig(learning_rate=2e-3),
        "adamw": AdamWConfig(learning_rate=2e-3),
    },
    "autoencoder": {
        "kfac": KFACConfig(damping=1.0, kl_clip=None),
        "sgd": SGDConfig(learning_rate=0.01),
        "adam": AdamConfig(learning_rate=1e-3),
        "adamw": AdamWConfig(learning_rate=1e-3),
    },
    "lm": {
        # The curvature of the inner layers is small and changes fast at the start:
        # little damping, no momentum, and a warm-up beside the trust region.
        "kfac": KFACConfig(
            learning_rate=0.02,
            schedule=COSINE,
            damping=4e-5,
            momentum=0.0,
            kl_clip=2.5e-3,
            factor_decay=0.9,
            fisher="mc",
            inverse_interval=5,
        ),
        "sgd": SGDConfig(learning_rate=0.1, schedule=COSINE),
        "adam": AdamConfig(learning_rate=8e-3, b2=0.98, schedule=LONG_WARMUP),
        "adamw": AdamWConfig(learning_rate=8e-3, b2=0.98, schedule=LONG_WARMUP),
    },
}
OPTIMISERS["mlp_nnx"] = OPTIMISERS["mlp"]


def default_config(dataset: str = "mnist5k", model: str = "mlp") -> TrainConfig:
    """Returns the default configuration of a data set and a model."""
    check_choice("dataset", dataset, DATASETS)
    check_choice("model", model, MODELS)
    config = TrainConfig(
        dataset=dataset,  # pyright: ignore[reportArgumentType]
        model=model,  # pyright: ignore[reportArgumentType]
        **LENGTH[dataset],
        **OPTIMISERS[model],
    )
    if dataset == "mnist5k":
        config = dataclasses.replace(config, net=NetConfig(hidden=(500, 300)))
    if dataset == "digits":
        config = dataclasses.replace(
            config, net=NetConfig(hidden=(128, 128), code=(64, 16))
        )
    if model == "autoencoder" and dataset in ("mnist", "fashion_mnist"):
        config = dataclasses.replace(config, batch_size=1000, epochs=8)
    return config
