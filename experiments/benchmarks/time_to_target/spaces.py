"""What is searched for each optimiser, and the trial with which its search starts."""

import dataclasses
from typing import Any

import optuna

from experiments.benchmarks.time_to_target.sizes import OptimiserName, TaskName
from experiments.tuning.ranges import Choice, Log


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
