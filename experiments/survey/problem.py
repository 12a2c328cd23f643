"""A cell's network, loss and training; hyper-parameters are arguments of programs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.survey.config import Setting, SurveyConfig
from experiments.survey.data import Data, batch_rows
from experiments.survey.models import make_model

MOMENTUM = 0.9
# Examples that are evaluated together.
EVAL_ROWS = 1000
Batches = list[tuple[np.ndarray, np.ndarray]]


class Problem(NamedTuple):
    """A cell: a data set and a network."""

    data: Data  # the data set
    init: Callable[[jax.Array], Any]  # ``key -> params``
    # ``(params, x, y) -> mean cross-entropy``, its output marked; compiled.
    loss: Callable[..., jax.Array]
    # ``(params, x, y) -> (sum of the losses, number of right labels)``.
    scores: Callable[..., tuple[jax.Array, jax.Array]]
    # The loss with its layers, one object for all of a cell's programs.
    tagged: kfac.TaggedLoss
    batches: Batches  # the training set as it is measured

    def train_loss(self, params: Any) -> jax.Array:
        """The mean loss over all training examples, one batch after the other."""
        sums = [len(y) * self.loss(params, x, y) for x, y in self.batches]
        return sum(sums[1:], sums[0]) / len(self.data.y_train)


def make_problem(config: SurveyConfig, model: str, data: Data) -> Problem:
    """Builds a cell's functions."""
    network = make_model(model, config.width, config.depth, data.classes)
    one = data.x_train[:1]

    def init(key):
        return network.init(key, one)

    def loss(params, x, y):
        output: Any = network.apply(params, x)
        logits = kfac.categorical(output)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def scores(params, x, y):
        logits: Any = network.apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.sum(), (logits.argmax(-1) == y).sum()

    shapes = jax.eval_shape(init, jax.random.key(0))
    batches = whole_set(data.x_train, data.y_train, config.rows)
    tagged = kfac.tag(loss, shapes, *batches[0], fisher="mc", strict=True)
    programs = jax.jit(init), jax.jit(loss), jax.jit(scores)
    return Problem(data, *programs, tagged, batches)


def whole_set(x: np.ndarray, y: np.ndarray, rows: int) -> Batches:
    """A set as batches of nearly the same size, at most ``rows``."""
    parts = -(-len(x) // rows)
    pairs = zip(np.array_split(x, parts), np.array_split(y, parts), strict=True)
    return list(pairs)


def evaluate(problem: Problem, params: Any, x: np.ndarray, y: np.ndarray) -> tuple:
    """Mean loss and accuracy over a set."""
    found = [problem.scores(params, *b) for b in whole_set(x, y, EVAL_ROWS)]
    return tuple(float(sum(column)) / len(x) for column in zip(*found, strict=True))


class Program(NamedTuple):
    """An optimiser's steps."""

    start: Callable[..., Any]  # ``(params, rate, decay) -> carry``
    # ``(carry, rate, decay, key, x, y, rows [steps, B], first, last) -> carry``: the
    # steps from ``first`` to ``last``; compiled once for every batch size.
    advance: Callable[..., Any]


def make_transform(
    optimizer: str, tagged: kfac.TaggedLoss, rate: Any, decay: Any, damping: float
) -> optax.GradientTransformationExtraArgs:
    """The optimiser; rate and decay may be traced."""
    if optimizer == "kfac":
        return kfac.kfac(
            tagged.layers, rate, damping, momentum=MOMENTUM, weight_decay=decay
        )
    if optimizer == "adam":
        scale = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay))
    else:
        scale = optax.chain(optax.add_decayed_weights(decay), optax.trace(MOMENTUM))
    chain = optax.chain(scale, optax.scale_by_learning_rate(rate))
    return optax.with_extra_args_support(chain)


def make_program(config: SurveyConfig, problem: Problem, optimizer: str) -> Program:
    """Builds an optimiser's program; compiles nothing yet."""
    tagged, loss = problem.tagged, problem.loss

    def transform(rate, decay):
        return make_transform(optimizer, tagged, rate, decay, config.kfac_damping)

    def step(carry, rate, decay, key, x, y):
        params, state = carry
        if optimizer == "kfac":
            _, grads, statistics = tagged.value_and_grad(
                params, x, y, opt_state=state, key=key
            )
            more = {"statistics": statistics}
        else:
            grads, more = jax.grad(loss)(params, x, y), {}
        updates, state = transform(rate, decay).update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    def advance(carry, rate, decay, key, x, y, rows, first, last):
        def turn(number, carry):
            own = rows[number]
            one = jax.random.fold_in(key, number)
            return step(carry, rate, decay, one, x[own], y[own])

        return jax.lax.fori_loop(first, last, turn, carry)

    def start(params, rate, decay):
        return params, transform(rate, decay).init(params)

    return Program(jax.jit(start), jax.jit(advance, donate_argnums=0))


def train(
    config: SurveyConfig, problem: Problem, program: Program, setting: Setting
) -> Any:
    """Trains; a generator.

    Args:
        config: the survey.
        problem: the cell.
        program: of the setting's optimiser.
        setting: the hyper-parameters.

    Yields:
        Pairs of step and parameters, at the steps that are measured.
    """
    first, second = jax.random.split(jax.random.key(setting.seed))
    rate, decay = jnp.float32(setting.learning_rate), jnp.float32(setting.weight_decay)
    data = problem.data
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    rows = batch_rows(len(y), setting.batch_size, config.steps, setting.seed)
    carry, done = program.start(problem.init(first), rate, decay), 0
    for step in config.measured_steps():
        if step > done:
            carry = program.advance(carry, rate, decay, second, x, y, rows, done, step)
            done = step
        # The next steps are given the carry's own memory.
        yield step, jax.tree.map(jnp.copy, carry[0])
