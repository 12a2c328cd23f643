"""One step of every method, and a run of them.

All hyper-parameters are arguments of a method's program, so that it is compiled once.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.models import Task
from experiments.studies.bayes.config import (
    ADAM,
    IVON,
    KFAC,
    NOISY,
    POINTS,
    SGD,
    VOGN,
)
from experiments.tuning.trials import as_floats
from kfac_jax_lite import bayes

BETA2 = 0.999
Values = dict[str, Any]
# ``(loss, gradients, statistics)`` of parameters, model state, batch, state and key.
Gradient = Callable[..., tuple[Any, Any, Any]]


class Settings(NamedTuple):
    """What the runs of a method have in common."""

    method: str  # its name
    num_data: int  # training images
    steps: int  # of a run
    damping: float = 0.03  # of K-FAC's steps, noisy or not
    vogn_damping: float = 1e-3  # of VOGN's steps
    refresh_every: int = 10  # steps between refreshes of the factors
    kl_clip: float = 1e-2  # trust region of K-FAC
    momentum: float = 0.9  # of all
    ivon_decay: float = 0.999  # weight of IVON's old curvature


class Program(NamedTuple):
    """A method, compiled once."""

    # ``(seed, values) -> carry``: parameters, model state, optimiser's state.
    start: Callable[..., Any]
    # ``(carry, values, images, labels, rows, number, key) -> (carry, loss)``; the carry
    # is donated.
    step: Callable[..., tuple[Any, jax.Array]]


class Run(NamedTuple):
    """A finished run."""

    carry: Any  # parameters, model state, optimiser's state
    loss: float  # mean loss of the last epoch's batches
    seconds: float  # wall-clock seconds of a step, the median after the first ones


def tag_for(settings: Settings, task: Task, example: tuple[Any, Any]) -> Any:
    """The tagged loss of a method; None where it needs no statistics of layers."""
    if settings.method in (ADAM, SGD, IVON):
        return None
    start = jax.eval_shape(task.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda *batch: batch, *example)
    options: Any = {"fisher": "mc"}
    if settings.method == VOGN:
        options = {"statistics": "squares"}
    return kfac.tag(task.loss, *start, *shapes, has_aux=True, **options)


def make_tx(
    settings: Settings, layers: Any, values: Values
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a method."""
    method, n, momentum = settings.method, settings.num_data, settings.momentum
    rate = optax.cosine_decay_schedule(values["learning_rate"], settings.steps)
    curved: Values = {
        "momentum": momentum,
        "kl_clip": settings.kl_clip,
        "interval": kfac.intervals.every(settings.refresh_every),
        "inverse_interval": settings.refresh_every,
    }
    names = ("prior_precision", "temperature")
    prior: Values = {name: values[name] for name in names if name in values}
    n = values.get("num_data", n)  # a value where it changes
    if method == NOISY:
        damping = settings.damping
        return bayes.noisy_kfac(layers, n, rate, damping=damping, **prior, **curved)
    if method == VOGN:
        damping = settings.vogn_damping
        own: Values = {"damping": damping, "momentum": momentum}
        return bayes.vogn(layers, n, rate, **prior, **own)
    if method == IVON:
        own = {"momentum": momentum, "decay": settings.ivon_decay}
        return bayes.ivon(n, rate, initial=values["initial"], **prior, **own)
    decay = values["weight_decay"]
    if method == KFAC:
        damping = settings.damping
        return kfac.kfac(layers, rate, damping, weight_decay=decay, **curved)
    if method == ADAM:
        tx = optax.adamw(rate, b1=momentum, b2=BETA2, weight_decay=decay)
    else:
        # The order of ``kfac.kfac``: the decay passes through the momentum.
        tx = optax.chain(
            optax.add_decayed_weights(decay),
            optax.trace(momentum),
            optax.scale_by_learning_rate(rate),
        )
    return optax.with_extra_args_support(tx)


def gradient_of(settings: Settings, task: Task, tagged: Any) -> Gradient:
    """How a method takes its gradient."""

    def plain(params, model_state, batch, state, key):
        del state, key
        taken = jax.value_and_grad(task.loss, has_aux=True)
        value, grads = taken(params, model_state, *batch)
        return value, grads, None

    def with_factors(params, model_state, batch, state, key):
        return tagged.value_and_grad(
            params, model_state, *batch, opt_state=state, key=key
        )

    def drawn(params, model_state, batch, state, key):
        loss = task.loss if tagged is None else tagged
        return bayes.value_and_grad(
            loss, params, model_state, *batch, opt_state=state, key=key, has_aux=True
        )

    if settings.method == KFAC:
        return with_factors
    return plain if settings.method in POINTS else drawn


def make_program(settings: Settings, task: Task, example: tuple[Any, Any]) -> Program:
    """Builds a method's functions.

    A step is a call of its own: inside `jax.lax.scan`, jaxlib 0.10.2 computes the
    convolutions on CPUs ten times more slowly.
    """
    tagged = tag_for(settings, task, example)
    layers = None if tagged is None else tagged.layers
    gradient = gradient_of(settings, task, tagged)

    def start(seed, values):
        params, model_state = task.init(jax.random.key(seed))
        state = make_tx(settings, layers, values).init(params)
        return params, model_state, state

    def step(carry, values, images, labels, rows, number, key):
        params, model_state, state = carry
        batch = images[rows], labels[rows]
        key = jax.random.fold_in(key, number)
        (loss, model_state), grads, found = gradient(
            params, model_state, batch, state, key
        )
        extra = {} if found is None else {"statistics": found}
        tx = make_tx(settings, layers, values)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), model_state, state), loss

    return Program(jax.jit(start), jax.jit(step, donate_argnums=0))


def train(
    program: Program,
    values: Values,
    seed: int,
    images: jax.Array,
    labels: jax.Array,
    epochs: list[np.ndarray],
) -> Run:
    """A run.

    Args:
        program: the method.
        values: hyper-parameters.
        seed: of parameters, drawn weights and sampled labels.
        images: all training images.
        labels: their labels.
        epochs: numbers of the images of every step, ``[steps, batch]`` each.

    Returns:
        The run; it ends after an epoch whose loss is not finite.
    """
    numbers = as_floats(values)
    carry = program.start(seed, numbers)
    key, number, seconds, loss = jax.random.key(seed + 1), 0, [], np.nan
    for rows_of_epoch in epochs:
        losses = []
        before = time.perf_counter()
        for rows in rows_of_epoch:
            at = jnp.int32(number)
            carry, value = program.step(carry, numbers, images, labels, rows, at, key)
            losses.append(value)
            number += 1
        loss = float(np.mean(jax.device_get(losses)))
        seconds.append((time.perf_counter() - before) / len(rows_of_epoch))
        if not np.isfinite(loss):
            break
    # The first epoch may have compiled.
    return Run(carry, loss, float(np.median(seconds[1:] or seconds)))


def orders(count: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The order of the images in every epoch, the same for all methods of a seed.

    Returns:
        Integers ``[steps, batch]`` for every epoch.
    """
    steps = count // batch_size
    found = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        rows = order[: steps * batch_size].astype(np.int32)
        found.append(rows.reshape(steps, batch_size))
    return found
