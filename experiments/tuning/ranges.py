"""Ranges of hyper-parameters, and how Optuna draws from them; JAX is not needed."""

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
        """Checks the bounds."""
        check_bounds(self.low, self.high)

    def distribution(self) -> "BaseDistribution":
        """The same for Optuna."""
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
        """Checks the bounds."""
        check_number("low", self.low, above=0)
        check_bounds(self.low, self.high)

    def distribution(self) -> "BaseDistribution":
        """The same for Optuna."""
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
        """Checks that there is a value."""
        if not self.values:
            raise ConfigError("values is empty; wanted at least one number.")

    def distribution(self) -> "BaseDistribution":
        """The same for Optuna."""
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
