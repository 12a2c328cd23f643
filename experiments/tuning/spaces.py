"""What is searched for each optimiser; JAX is not needed.

The columns are those of the damping study's tables: learning rate, its decay and when
it is applied, momentum, weight decay and, for K-FAC, factor decay and damping. Every
bound can be given on the command line, ``--kfac.damping.low 1e-4``; bounds that are
equal fix a hyper-parameter.
"""

import dataclasses
from typing import TYPE_CHECKING

from experiments.configs.checks import check_number
from experiments.errors import ConfigError

if TYPE_CHECKING:  # Optuna is imported when it is used, not for --help
    from optuna.distributions import BaseDistribution


@dataclasses.dataclass(frozen=True)
class Linear:
    """Values from `low` to `high`, uniform."""

    low: float
    """Least value."""
    high: float
    """Greatest value; the least one again leaves nothing to search."""
    usual: float | None = None
    """Value of the first trial; moved into the range if it lies outside."""

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Log:
    """Values from `low` to `high`, uniform in their logarithm."""

    low: float
    """Least value, above 0."""
    high: float
    """Greatest value; the least one again leaves nothing to search."""
    usual: float | None = None
    """Value of the first trial; moved into the range if it lies outside."""

    def __post_init__(self) -> None:
        check_number("low", self.low, above=0)
        check_bounds(self.low, self.high)

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=True)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[float, ...]
    """The values."""
    usual: float | None = None
    """Value of the first trial; the first of the values if it is none of them."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("values is empty; wanted at least one number.")

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


Range = Linear | Log | Choice


def check_bounds(low: float, high: float) -> None:
    """Raises unless both are finite and in order."""
    check_number("low", low)
    check_number("high", high, at_least=low)


def usual_of(space: Range) -> float | None:
    """The first trial's value of a hyper-parameter."""
    if space.usual is None:
        return None
    if isinstance(space, Choice):
        return space.usual if space.usual in space.values else space.values[0]
    return min(max(space.usual, space.low), space.high)


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOMENTUM = Linear(0.0, 0.99, 0.9)
WEIGHT_DECAY = Log(1e-6, 1e-2, 1e-4)
# Adam's and Muon's steps do not shrink with the gradient: decay works in larger doses.
DECOUPLED = Log(1e-4, 1.0, 1e-2)
SHARES = ("lr_decay", "decay_epoch")
DECAYS = ("momentum", "factor_decay", "beta1")


@dataclasses.dataclass(frozen=True)
class Space:
    """What every optimiser has."""

    learning_rate: Log = Log(1e-3, 1.0, 0.1)
    """Step size of the first steps."""
    lr_decay: Log = Log(1e-2, 1.0, 0.1)
    """What the learning rate is multiplied by, once."""
    decay_epoch: Linear = Linear(0.3, 1.0, 0.7)
    """Share of the run after which that is done."""

    def __post_init__(self) -> None:
        for name, space in self.ranges().items():
            for bound in bounds(space):
                if name in SHARES:
                    check_number(name, bound, above=0, at_most=1)
                elif name in DECAYS:
                    check_number(name, bound, at_least=0, below=1)
                else:
                    check_number(name, bound, at_least=0)

    def ranges(self) -> dict[str, Range]:
        """The range of each hyper-parameter, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def distributions(self) -> dict[str, "BaseDistribution"]:
        """What Optuna draws from, by name."""
        return {name: space.distribution() for name, space in self.ranges().items()}

    def usual(self) -> dict[str, float]:
        """The first trial's values, by name; those that are given."""
        found = {name: usual_of(space) for name, space in self.ranges().items()}
        return {name: value for name, value in found.items() if value is not None}


def bounds(space: Range) -> tuple[float, ...]:
    """The least and the greatest value, or all of them."""
    return space.values if isinstance(space, Choice) else (space.low, space.high)


@dataclasses.dataclass(frozen=True)
class SGDSpace(Space):
    """SGD with heavy-ball momentum."""

    momentum: Linear = MOMENTUM
    """Decay of the velocity."""
    weight_decay: Log = WEIGHT_DECAY
    """Multiplied by the learning rate."""


@dataclasses.dataclass(frozen=True)
class AdamSpace(Space):
    """Adam; the second moment's decay is 0.999."""

    learning_rate: Log = Log(1e-4, 1e-1, 2e-3)
    """Step size of the first steps."""
    beta1: Linear = Linear(0.5, 0.99, 0.9)
    """Decay of the first moment."""


@dataclasses.dataclass(frozen=True)
class AdamWSpace(AdamSpace):
    """Adam with decoupled weight decay."""

    weight_decay: Log = DECOUPLED
    """Decoupled, multiplied by the learning rate."""


@dataclasses.dataclass(frozen=True)
class MuonSpace(Space):
    """Muon for kernels, Adam for everything else."""

    learning_rate: Log = Log(1e-3, 0.3, 0.02)
    """Step size of the first steps, for both."""
    momentum: Linear = Linear(0.5, 0.99, 0.95)
    """Decay of Muon's first moment."""
    weight_decay: Log = DECOUPLED
    """Decoupled, multiplied by the learning rate."""


@dataclasses.dataclass(frozen=True)
class KFACSpace(SGDSpace):
    """K-FAC; what is not searched is under ``--curvature``."""

    learning_rate: Log = Log(1e-3, 1.0, 0.05)
    """Step size of the first steps."""
    factor_decay: Linear = Linear(0.5, 0.99, 0.95)
    """Weight of the old statistics in the factors' moving average."""
    damping: Log = Log(1e-4, 1.0, 0.05)
    """Added to the curvature."""
