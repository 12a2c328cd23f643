"""The optimisers, their hyper-parameters being arguments of the compiled step.

A rule is written for one trial; `experiments.tuning.trials` maps it over many.

References:
    Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks";
    Liu et al., 2025, arXiv:2502.16982, Sec. 2.2 (Muon's steps as large as AdamW's).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfac_jax_lite as kfac
from experiments.configs.tune import TuneConfig
from experiments.models import Task

MUON_RMS = 0.2
BETA2 = 0.999

# ``(learning rate, values) -> optimiser``; both may be traced.
MakeTx = Callable[[Any, dict[str, Any]], optax.GradientTransformation]


class Rule(NamedTuple):
    """How one trial is trained."""

    # Parameters and hyper-parameters to the optimiser's state.
    init: Callable[[Any, dict[str, Any]], Any]
    # ``(carry, values, rate, batch, key) -> (carry, loss)`` with the carry ``(params,
    # model_state, state)``.
    step: Callable[..., tuple[Any, jax.Array]]


def rate_at(values: dict[str, Any], number: Any, steps: int) -> jax.Array:
    """The learning rate of a step: ``η``, from step ``e T`` on ``γ η``."""
    late = jnp.asarray(number, jnp.float32) >= values["decay_epoch"] * steps
    return values["learning_rate"] * jnp.where(late, values["lr_decay"], 1.0)


def make_sgd(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    """SGD; weight decay and momentum in the order of ``kfac.kfac``."""
    return optax.chain(
        optax.add_decayed_weights(values["weight_decay"]),
        optax.trace(values["momentum"]),
        optax.scale_by_learning_rate(rate),
    )


def make_adam(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    return optax.adam(rate, b1=values["beta1"], b2=BETA2)


def make_adamw(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    decay = values["weight_decay"]
    return optax.adamw(rate, b1=values["beta1"], b2=BETA2, weight_decay=decay)


def make_muon(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    """Muon for kernels, a convolution's as a matrix; Adam for everything else."""
    return optax.contrib.muon(
        rate,
        beta=values["momentum"],
        weight_decay=values["weight_decay"],
        adam_b2=BETA2,
        adam_weight_decay=values["weight_decay"],
        muon_weight_dimension_numbers=kernels,
        consistent_rms=MUON_RMS,
    )


def kernels(params: Any) -> Any:
    """How Muon sees each parameter: the last axis of a kernel is its output."""

    def numbers(path, leaf):
        if leaf.ndim < 2 or getattr(path[-1], "key", None) != "kernel":
            return None
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=tuple(range(leaf.ndim - 1)), output_axis=leaf.ndim - 1
        )

    return jax.tree.map_with_path(numbers, params)


MAKERS: dict[str, MakeTx] = {
    "sgd": make_sgd,
    "adam": make_adam,
    "adamw": make_adamw,
    "muon": make_muon,
}


def make_rule(config: TuneConfig, task: Task, example: tuple[Any, Any]) -> Rule:
    """The chosen optimiser as a rule."""
    if config.optimizer == "kfac":
        return kfac_rule(config, task, example)
    make_tx = MAKERS[config.optimizer]

    def init(params, values):
        return make_tx(values["learning_rate"], values).init(params)

    def step(carry, values, rate, batch, key):
        del key
        params, model_state, state = carry
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (loss, model_state), grads = gradient(params, model_state, *batch)
        updates, state = make_tx(rate, values).update(grads, state, params)
        return (optax.apply_updates(params, updates), model_state, state), loss

    return Rule(init, step)


def kfac_rule(config: TuneConfig, task: Task, example: tuple[Any, Any]) -> Rule:
    """K-FAC as a rule.

    Statistics are left to ``update``, whose gates are loops: mapped over trials, a loop
    turns if any trial wants it, where a conditional would compute both branches always.
    """
    chosen = config.curvature
    start = jax.eval_shape(task.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda *batch: batch, *example)
    tagged = kfac.tag(task.loss, *start, *shapes, fisher=chosen.fisher, has_aux=True)

    def make_tx(rate, values):
        return kfac.kfac(
            tagged.layers,
            rate,
            damping=values["damping"],
            momentum=values["momentum"],
            weight_decay=values["weight_decay"],
            kl_clip=chosen.kl_clip,
            factor_decay=values["factor_decay"],
            interval=kfac.intervals.every(chosen.every),
            inverse=chosen.inverse,
            inverse_interval=chosen.inverse_interval,
        )

    def init(params, values):
        return make_tx(values["learning_rate"], values).init(params)

    def step(carry, values, rate, batch, key):
        params, model_state, state = carry
        (loss, model_state), grads, statistics = tagged.value_and_grad(
            params, model_state, *batch, opt_state=state, key=key, deferred=True
        )
        tx = make_tx(rate, values)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return (optax.apply_updates(params, updates), model_state, state), loss

    return Rule(init, step)
