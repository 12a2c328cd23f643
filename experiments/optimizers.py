"""From configurations to optax transformations."""

import dataclasses
from typing import Any

import jax
import optax

import kfac_jax_lite as kfac
from experiments.configs import KFACConfig, ScheduleConfig, SGDConfig, TrainConfig
from experiments.configs.checks import check_choice
from experiments.configs.train import OPTIMIZERS
from experiments.models import Task

TITLES = {
    "kfac": "K-FAC",
    "sgd": "SGD + momentum",
    "adam": "Adam",
    "adamw": "AdamW",
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A transformation and, for K-FAC, the tagged loss that makes its statistics."""

    # The transformation; it takes and may ignore ``statistics``.
    tx: optax.GradientTransformationExtraArgs
    tagged: Any = None  # the tagged loss, or None
    needs_key: bool = False  # whether the statistics are sampled


def make_schedule(
    value: float, config: ScheduleConfig, total_steps: int
) -> optax.Schedule:
    """Returns the schedule of a hyper-parameter."""
    steps = max(1, total_steps - config.warmup_steps)
    end = value * config.final_scale
    match config.kind:
        case "constant":
            decay = optax.constant_schedule(value)
        case "linear":
            decay = optax.linear_schedule(value, end, steps)
        case "cosine":
            decay = optax.cosine_decay_schedule(value, steps, config.final_scale)
        case "exponential":
            decay = optax.exponential_decay(
                value, steps, config.final_scale, end_value=end
            )
        case "polynomial":
            decay = optax.polynomial_schedule(value, end, config.power, steps)
    if config.warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, value, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_momentum(config: KFACConfig | SGDConfig, total_steps: int) -> Any:
    """Returns the momentum, a number or the schedule of the learning rate, scaled.

    ``m(t) = m₀ η(t) / η₀`` with ``η₀`` the learning rate before it decays.

    References:
        Osawa et al., 2020, arXiv:2002.06015.
    """
    if not config.tie_momentum:
        return config.momentum
    return make_schedule(config.momentum, config.schedule, total_steps)


def make_sgd(config: SGDConfig, total_steps: int) -> optax.GradientTransformation:
    rate = make_schedule(config.learning_rate, config.schedule, total_steps)
    momentum = make_momentum(config, total_steps)
    make: Any = optax.sgd
    # Only with a schedule: another state would turn away checkpoints of other runs.
    if callable(momentum):
        make = optax.inject_hyperparams(optax.sgd)
    return make(rate, momentum=momentum, nesterov=config.nesterov)


def make_optimizer(
    name: str, config: TrainConfig, task: Task, example: tuple, total_steps: int
) -> Optimizer:
    """Builds one of the compared optimisers."""
    check_choice("optimizers", name, OPTIMIZERS)
    if name == "kfac":
        return make_kfac(config.kfac, task, example, total_steps)
    if name == "sgd":
        tx = make_sgd(config.sgd, total_steps)
    elif name == "adam":
        adam = config.adam
        rate = make_schedule(adam.learning_rate, adam.schedule, total_steps)
        tx = optax.adam(rate, b1=adam.b1, b2=adam.b2, eps=adam.eps)
    else:
        adamw = config.adamw
        rate = make_schedule(adamw.learning_rate, adamw.schedule, total_steps)
        tx = optax.adamw(
            rate,
            b1=adamw.b1,
            b2=adamw.b2,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
        )
    return Optimizer(optax.with_extra_args_support(tx))


def make_kfac(
    config: KFACConfig, task: Task, example: tuple, total_steps: int
) -> Optimizer:
    """Tags the loss and builds K-FAC for its layers."""
    tagged = kfac.tag(
        task.loss,
        *jax.eval_shape(lambda *args: args, *example),
        fisher=config.fisher,
        weight_sharing=config.weight_sharing,
        has_aux=True,
    )
    tx = kfac.kfac(
        tagged.layers,
        make_schedule(config.learning_rate, config.schedule, total_steps),
        damping=make_schedule(config.damping, config.damping_schedule, total_steps),
        momentum=make_momentum(config, total_steps),
        weight_decay=config.weight_decay,
        kl_clip=config.kl_clip,
        factor_decay=config.factor_decay,
        interval=make_interval(config),
        inverse=config.inverse,
        inverse_interval=config.inverse_interval,
    )
    return Optimizer(tx, tagged, needs_key=config.fisher == "mc")


def make_interval(config: KFACConfig) -> Any:
    """Returns the rule for the steps at which factors are refreshed."""
    if config.interval == "every":
        return kfac.intervals.every(config.every)
    if config.interval == "adaptive":
        return kfac.intervals.adaptive(
            config.threshold, rule=config.rule, max_interval=config.max_interval
        )
    return kfac.intervals.staleness(
        threshold=config.threshold, max_interval=config.max_interval
    )
