"""The deep linear network, its data, and a trial's program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments import datasets
from experiments.studies.damping.config import (
    ADAPTIVE,
    FIXED,
    JUDGED,
    SGD,
    DampingStudy,
)

FACTOR_DECAY = 0.95
Values = dict[str, Any]


class Images(NamedTuple):
    """Training images ``[n, pixels]`` in [0, 1], labels ``[n]``, and their source."""

    x: jax.Array
    y: jax.Array
    classes: int
    title: str


def load(config: DampingStudy) -> Images:
    """The training images."""
    data = datasets.load(config.dataset, config.data_dir)
    x = np.asarray(data.x_train, np.float32) / data.maximum
    flat = jnp.asarray(x.reshape(len(x), -1))
    return Images(flat, jnp.asarray(data.y_train), data.num_classes, data.title)


def make_init(config: DampingStudy, images: Images) -> Callable[[jax.Array], list]:
    """Makes initial parameters: all uniform in ``±1/√(fan-in)``, as PyTorch's."""
    hidden = [config.width] * config.hidden
    sizes = [images.x.shape[-1], *hidden, images.classes]

    def init(key):
        params = []
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            key, of_w, of_b = jax.random.split(key, 3)
            bound = n_in**-0.5
            draw = {"minval": -bound, "maxval": bound}
            w = jax.random.uniform(of_w, (n_in, n_out), **draw)
            params.append({"w": w, "b": jax.random.uniform(of_b, (n_out,), **draw)})
        return params

    return init


def loss(params: list, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy of the linear network."""
    for layer in params:
        x = x @ layer["w"] + layer["b"]
    logits = kfac.categorical(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Program(NamedTuple):
    """A method, compiled once; hyper-parameters are arguments."""

    start: Callable[..., Any]  # ``(seed, values) -> carry``
    # ``(carry, values, batches [k, B], keys [k]) -> carry``; the carry is donated.
    advance: Callable[..., Any]
    measure: Callable[[Any], jax.Array]  # ``carry -> training loss``
    # ``carry -> gradient of the training loss``, a tree.
    gradients: Callable[[Any], Any]


def make_program(
    config: DampingStudy, images: Images, method: str, kl_clip: float | None
) -> Program:
    """Builds a method's functions."""
    init = make_init(config, images)
    shapes = jax.eval_shape(init, jax.random.key(0))
    part = images.x[: config.eval_examples], images.y[: config.eval_examples]
    batch = images.x[: config.batch_size], images.y[: config.batch_size]
    tagged = kfac.tag(loss, shapes, *batch, fisher=config.fisher)

    def make_tx(values: Values) -> optax.GradientTransformationExtraArgs:
        def rate(count):
            # Linear from the first value to its share `end`.
            return values["rate"] * (1 - (1 - values["end"]) * count / config.steps)

        if method == SGD:
            sgd = optax.sgd(rate, momentum=values["momentum"])
            return optax.with_extra_args_support(sgd)
        rules = {ADAPTIVE: kfac.damping.adaptive, JUDGED: judged}
        return kfac.kfac(
            tagged.layers,
            rate,
            damping=values["damping"] if method == FIXED else rules[method](),
            momentum=values["momentum"],
            kl_clip=kl_clip,
            factor_decay=FACTOR_DECAY,
            inverse_interval=config.inverse_interval,
        )

    def step(carry, values, picked, key):
        params, state = carry
        x, y = images.x[picked], images.y[picked]
        if method == SGD:
            grads = jax.grad(loss)(params, x, y)
            updates, state = make_tx(values).update(grads, state, params)
            return optax.apply_updates(params, updates), state
        _, grads, statistics = tagged.value_and_grad(
            params, x, y, opt_state=state, key=key, deferred=True
        )
        more = {"statistics": statistics}
        if method == JUDGED:
            more["model"] = kfac.quadratic_model(tagged, params, x, y)
        updates, state = make_tx(values).update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    def advance(carry, values, picked, keys):
        def turn(carry, drawn):
            return step(carry, values, *drawn), None

        return jax.lax.scan(turn, carry, (picked, keys))[0]

    def start(seed, values):
        params = init(jax.random.key(seed))
        state: Any = make_tx(values).init(params)
        if method == ADAPTIVE and "damping" in values:  # another first damping
            state = state._replace(damping=jnp.float32(values["damping"]))
        return params, state

    return Program(
        start,
        jax.jit(advance, donate_argnums=0),
        jax.jit(lambda carry: loss(carry[0], *part)),
        jax.jit(lambda carry: jax.grad(loss)(carry[0], *part)),
    )


def damping_of(carry: Any) -> float | None:
    """The damping in force; None for SGD."""
    try:
        return kfac.report(carry[1])[0]["damping"]
    except ValueError:
        return None


def judged() -> kfac.damping.LevenbergMarquardt:
    """Levenberg-Marquardt with its defaults."""
    return kfac.damping.levenberg_marquardt()


def batches(config: DampingStudy, images: Images, seed: int) -> np.ndarray:
    """Numbers of the images of every step, ``[steps, batch]``: epochs without rest."""
    rng, per_epoch = np.random.default_rng(seed), len(images.x) // config.batch_size
    used = per_epoch * config.batch_size
    epochs = -(-config.steps // per_epoch)
    orders = [rng.permutation(len(images.x))[:used] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, config.batch_size)[: config.steps]
