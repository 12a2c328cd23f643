"""The configuration of one comparison, and its defaults by data set and model."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from experiments.configs.checks import (
    check,
    check_choice,
    digest,
)
from experiments.errors import ConfigError


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
        check(
            self,
            "schedule.",
            integers="warmup_steps",
            positive="power",
            shares="final_scale",
        )
        if self.kind != "polynomial":
            check(self, "schedule.", positive="final_scale")


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
        check(self, "sgd.", positive="learning_rate", decays="momentum")


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
        check(self, "adam.", positive="learning_rate eps", decays="b1 b2")


@dataclasses.dataclass(frozen=True)
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay."""

    weight_decay: float = 1e-2
    """Decoupled weight decay, multiplied by the learning rate."""

    def __post_init__(self) -> None:
        names = {"positive": "learning_rate eps", "not_negative": "weight_decay"}
        check(self, "adamw.", decays="b1 b2", **names)


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
        check(
            self,
            "kfac.",
            counts="every max_interval inverse_interval",
            positive="learning_rate damping kl_clip threshold",
            not_negative="weight_decay",
            decays="momentum factor_decay",
        )
        schedule = self.damping_schedule
        if schedule.warmup_steps:
            raise ConfigError(
                f"kfac.damping-schedule.warmup-steps is "
                f"{schedule.warmup_steps}; wanted 0, because a warm-up starts at zero "
                "and the damping must stay positive."
            )
        check(schedule, "kfac.damping-schedule.", positive="final_scale")


IMAGES = ("digits", "mnist5k", "mnist", "fashion_mnist", "cifar10")
TEXTS = ("tinyshakespeare", "pydoc")
DATASETS = IMAGES + TEXTS
MODELS = ("mlp", "mlp_nnx", "lenet5", "resnet", "autoencoder", "lm")
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
        check(
            self,
            "net.",
            counts="hidden blocks code width context layers heads features",
        )
        if not self.blocks or not self.code:
            raise ConfigError("net.blocks and net.code need at least one number.")
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
        check(
            self,
            counts="epochs batch_size eval_examples evals_per_epoch log_every "
            "checkpoint_every train_examples",
            integers="seed devices",
            not_negative="mixup_alpha",
        )
        if not self.optimizers:
            raise ConfigError(
                f"optimizers is empty; choose of {', '.join(OPTIMIZERS)}."
            )
        if len(set(self.optimizers)) != len(self.optimizers):
            raise ConfigError(f"optimizers has a name twice: {self.optimizers}.")
        if self.dataset in TEXTS and (self.augment != "none" or self.mixup_alpha):
            raise ConfigError(
                f"augment is {self.augment} and mixup-alpha {self.mixup_alpha}; wanted "
                f"none and 0, because {self.dataset} is a text."
            )

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
