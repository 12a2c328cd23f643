"""The configuration of one comparison: data, network, optimisers, bookkeeping."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from experiments.configs.checks import check_choice, check_integer, check_number
from experiments.configs.fingerprint import digest
from experiments.configs.optimizers import (
    AdamConfig,
    AdamWConfig,
    KFACConfig,
    SGDConfig,
)
from experiments.errors import ConfigError

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
