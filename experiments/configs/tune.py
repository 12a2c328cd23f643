"""The configuration of ``tune``: what a trial trains, what is searched, who works."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.configs.checks import (
    check,
    digest,
    json_values,
)
from experiments.configs.train import (
    DatasetName,
    ModelName,
    NetConfig,
    default_config,
)
from experiments.errors import ConfigError
from experiments.tuning.spaces import (
    AdamSpace,
    AdamWSpace,
    KFACSpace,
    MuonSpace,
    SGDSpace,
    Space,
)

TunedName = Literal["kfac", "sgd", "adam", "adamw", "muon"]
TUNED = ("kfac", "sgd", "adam", "adamw", "muon")
# Short runs: a search trains dozens of networks.
EPOCHS = {"digits": 10, "mnist5k": 4, "tinyshakespeare": 1, "pydoc": 1}
# Where data and trials lie, who works on them and how many there are decides nothing
# about a single trial.
NOT_IN_FINGERPRINT = (
    "data_dir",
    "workdir",
    "storage",
    "study",
    "trials",
    "batch",
    "mapping",
    "worker",
    "heartbeat",
    "grace",
    "retries",
)


@dataclasses.dataclass(frozen=True)
class CurvatureConfig:
    """What K-FAC's trials have in common."""

    fisher: Literal["empirical", "mc"] = "empirical"
    """Which Fisher matrix the factors estimate."""
    every: int = 5
    """Steps between refreshes of the factors."""
    inverse: Literal[
        "cholesky", "eigh", "ekfac", "newton_schulz", "low_rank", "auto"
    ] = "cholesky"
    """How the damped curvature is inverted."""
    inverse_interval: int = 10
    """Steps between inverse refreshes."""
    kl_clip: float | None = 3e-3
    """Bound of the step's quadratic form (trust region); None for no bound."""

    def __post_init__(self) -> None:
        check(self, "curvature.", counts="every inverse_interval", positive="kl_clip")


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Searches an optimiser's hyper-parameters; many trials run as one program."""

    optimizer: TunedName = "kfac"
    """Optimiser whose hyper-parameters are searched."""
    dataset: DatasetName = "mnist5k"
    """Data set; digits, mnist5k and pydoc come with packages and need no network."""
    model: ModelName = "mlp"
    """Network, as in train."""
    trials: int = 40
    """Trials of the whole study, over all workers; more of them continue it."""
    batch: int = 8
    """Trials that this worker trains at once."""
    mapping: Literal["auto", "vmap", "loop"] = "auto"
    """Trials of the program side by side, or in a loop; by default side by side, but
    K-FAC in a loop on a CPU."""
    epochs: int = 4
    """Passes over the training examples in a trial."""
    batch_size: int = 200
    """Examples per step."""
    evaluations: int = 8
    """Evaluations of a trial, evenly over its steps."""
    validation_examples: int | None = None
    """Last training examples held out for the objective; a fifth if not given."""
    train_examples: int | None = None
    """Use only this many training examples, those held out among them."""
    seed: int = 0
    """Seed of parameters, order of the data, sampled labels, and the search."""
    common_start: bool = True
    """All trials start from the same parameters; otherwise each from its own."""
    startup_trials: int = 10
    """Trials drawn at random before the sampler looks at results."""
    prune_from: int = 3
    """First evaluation at which a trial worse than the median may end; 0 for never."""
    storage: str | None = None
    """URL of a database, postgresql+psycopg://user@host/name; by default a journal
    file in the run folder."""
    study: str | None = None
    """Name of the study in the storage; by default made of the configuration."""
    worker: int = 0
    """Number of this worker; workers of one study must have different ones."""
    heartbeat: int = 10
    """Seconds between signs of life (databases only)."""
    grace: int = 60
    """Seconds without a sign of life after which others take over a trial."""
    retries: int = 3
    """How often a trial whose worker died is started again."""
    data_dir: Path | None = None
    """Folder with the data; KFAC_DATA_DIR if not given."""
    workdir: Path | None = None
    """Folder of the run; by default one under runs/ named after the configuration."""
    net: NetConfig = NetConfig()
    """Sizes of the networks."""
    curvature: CurvatureConfig = CurvatureConfig()
    """What K-FAC's trials have in common."""
    kfac: KFACSpace = KFACSpace()
    """Ranges of K-FAC."""
    sgd: SGDSpace = SGDSpace()
    """Ranges of SGD."""
    adam: AdamSpace = AdamSpace()
    """Ranges of Adam."""
    adamw: AdamWSpace = AdamWSpace()
    """Ranges of AdamW."""
    muon: MuonSpace = MuonSpace()
    """Ranges of Muon."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="trials batch epochs batch_size evaluations startup_trials "
            "heartbeat grace validation_examples train_examples",
            integers="seed prune_from worker retries",
        )
        if self.grace < 2 * self.heartbeat:
            raise ConfigError(
                f"grace is {self.grace}; wanted at least twice the heartbeat, "
                f"{2 * self.heartbeat}: one sign of life may be late."
            )

    @property
    def space(self) -> Space:
        """The ranges of the chosen optimiser."""
        return getattr(self, self.optimizer)

    def shared(self) -> dict[str, Any]:
        """What decides a trial beside its values, as JSON values."""
        left_out = {*NOT_IN_FINGERPRINT, *TUNED} - {self.optimizer}
        if self.optimizer != "kfac":
            left_out.add("curvature")
        return json_values(self, left_out)

    def name(self) -> str:
        """Name of the study and of its folder."""
        if self.study is not None:
            return self.study
        parts = (self.dataset, self.model, self.optimizer, digest(self.shared())[:8])
        return "tune-" + "-".join(parts)

    def folder(self) -> Path:
        """The run folder: `workdir`, or one under ``runs``."""
        return Path("runs") / self.name() if self.workdir is None else self.workdir


def default_tuning(dataset: str = "mnist5k", model: str = "mlp") -> TuneConfig:
    """The default search on a data set with a model."""
    train = default_config(dataset, model)
    return TuneConfig(
        dataset=train.dataset,
        model=train.model,
        epochs=EPOCHS.get(dataset, 4),
        batch_size=train.batch_size,
        net=train.net,
    )
