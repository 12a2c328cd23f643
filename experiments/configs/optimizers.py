"""Hyper-parameters of each optimiser."""

import dataclasses
from typing import Literal

from experiments.configs.checks import check_choice, check_integer, check_number
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
