"""A cell's data, network, loss and training."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments import datasets
from experiments.datasets.lookup import import_package, split
from experiments.studies.images import pooled
from experiments.survey.config import Setting, SurveyConfig

TABLES = {"wine": "Wine", "breast_cancer": "Breast cancer"}
TABLE_SOURCE = "packaged with scikit-learn"
# Side of the squares of pixels that are averaged: to 8 x 8, 7 x 7, 7 x 7 and 6 x 6.
WINDOWS = {"digits": 1, "mnist": 4, "fashion_mnist": 4, "cifar10": 5}


class Data(NamedTuple):
    """A data set."""

    title: str  # its name
    source: str  # where it was found, without folders
    classes: int  # number of labels
    x_train: np.ndarray  # ``[n, h, w, c]`` float32
    y_train: np.ndarray  # ``[n]`` int32
    x_test: np.ndarray  # as for training
    y_test: np.ndarray  # as for training


def load(name: str, config: SurveyConfig) -> Data:
    """Loads, cuts, averages and standardises a data set.

    Args:
        name: one of the survey's data sets.
        config: the survey.

    Returns:
        The data set.
    """
    raw = load_table(name) if name in TABLES else load_images(name, config.data_dir)
    train, test = slice(config.train_examples), slice(config.test_examples)
    x_train, x_test = raw.x_train[train], raw.x_test[test]
    if config.pooled and name in WINDOWS:
        x_train, x_test = (averaged(x, WINDOWS[name]) for x in (x_train, x_test))
    axes = (0,) if name in TABLES else (0, 1, 2)
    mean, deviation = x_train.mean(axes), x_train.std(axes)
    scale = np.where(deviation > 0, deviation, 1)
    return raw._replace(
        source=re.sub(r"\S*/", "", raw.source),
        x_train=((x_train - mean) / scale).astype(np.float32),
        y_train=raw.y_train[train],
        x_test=((x_test - mean) / scale).astype(np.float32),
        y_test=raw.y_test[test],
    )


@functools.lru_cache(maxsize=1)
def load_images(name: str, data_dir: Path | None) -> Data:
    """Images as they are; the last set is kept for the next cell."""
    found = datasets.load(name, data_dir)
    x = found.x_train, found.x_test
    return Data(
        found.title, found.source, found.num_classes, x[0], found.y_train, x[1],
        found.y_test,
    )  # fmt: skip


def load_table(name: str) -> Data:
    """A table: two thirds to train, a third to test, the labels in equal shares."""
    module = import_package("sklearn.datasets", "scikit-learn")
    x, y = getattr(module, f"load_{name}")(return_X_y=True)
    x, y = x.reshape(len(x), 1, -1, 1), y.astype(np.int32)
    train, test = split(x, y, num_test=len(x) // 3)
    classes = int(y.max()) + 1
    return Data(TABLES[name], TABLE_SOURCE, classes, *train, *test)


def averaged(images: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of pixels; a border that fills no square is cut off.

    Args:
        images: ``[n, h, w, c]``.
        side: of the squares.

    Returns:
        ``[n, h // side, w // side, c]``.
    """
    height, width = (size // side * side for size in images.shape[1:3])
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return pooled(images[:, top : top + height, left : left + width], side)


def batch_rows(num_train: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Numbers of every step's examples: epochs, each shuffled, one after the other.

    Returns:
        ``[steps, batch_size]`` int32.
    """
    rng, wanted = np.random.default_rng(seed), steps * batch_size
    epochs = [rng.permutation(num_train) for _ in range(-(-wanted // num_train))]
    rows = np.concatenate(epochs)[:wanted].astype(np.int32)
    return rows.reshape(steps, batch_size)


HEADS = 2
# Hidden layers of the deep networks.
DEEP = 4


class Dense(nn.Module):
    """Fully connected network."""

    widths: tuple[int, ...]  # of the hidden layers
    classes: int  # width of the output
    activation: Callable[[jax.Array], jax.Array] = nn.relu  # between layers
    norm: bool = False  # whether a layer norm comes before each activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.Dense(width)(x)
            x = nn.LayerNorm()(x) if self.norm else x
            x = self.activation(x)
        return nn.Dense(self.classes)(x)


def clipped(x: jax.Array, side: int) -> tuple[int, int]:
    """A window of ``side`` x ``side``, no larger than the images ``[n, h, w, c]``."""
    return min(side, x.shape[1]), min(side, x.shape[2])


def pool(x: jax.Array) -> jax.Array:
    window = clipped(x, 2)
    return nn.avg_pool(x, window, strides=window)


class Conv(nn.Module):
    """Two convolutions with pools, and a dense layer."""

    width: int  # channels
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        for _ in range(2):
            x = pool(nn.relu(nn.Conv(self.width, clipped(x, 3))(x)))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


class LeNet(nn.Module):
    """LeNet-5's order of layers with narrower ones.

    References:
        LeCun, Bottou, Bengio & Haffner, 1998, Proc. IEEE 86(11), Fig. 2.
    """

    width: int  # channels of the second convolution
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        x = pool(nn.tanh(nn.Conv(max(1, self.width // 2), clipped(x, 5))(x)))
        x = nn.Conv(self.width, clipped(x, 5), padding="VALID")(x)
        x = pool(nn.tanh(x)).reshape(len(x), -1)
        for _ in range(2):
            x = nn.tanh(nn.Dense(2 * self.width)(x))
        return nn.Dense(self.classes)(x)


class Residual(nn.Module):
    """Residual convolutions with group norm, a mean over positions, a dense layer.

    References:
        He, Zhang, Ren & Sun, 2015, arXiv:1512.03385; Wu & He, 2018, arXiv:1803.08494
        (one group: all channels of an example).
    """

    width: int  # channels
    depth: int  # blocks of two convolutions
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        x = nn.relu(self.conv(x))
        for _ in range(self.depth):
            y = nn.relu(self.conv(x))
            x = nn.relu(x + self.conv(y))
            x = pool(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))

    def conv(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, clipped(x, 3), use_bias=False)(x)
        return nn.GroupNorm(num_groups=1)(x)


class Attention(nn.Module):
    """A transformer over the rows of an image, or over the features of a table.

    References:
        Vaswani et al., 2017, arXiv:1706.03762; Xiong et al., 2020, arXiv:2002.04745
        (the norm before each layer).
    """

    width: int  # features of a token
    depth: int  # layers
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        n, h, w, _ = x.shape
        x = x.reshape(n, h if h > 1 else w, -1)
        x = nn.Dense(self.width)(x) + positions(x.shape[1], self.width)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
            y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


def positions(length: int, width: int) -> np.ndarray:
    """Sines and cosines of the position, ``[length, width]``; not trained."""
    half = np.arange(width) // 2
    angle = np.arange(length)[:, None] / 100 ** (2 * half / width)
    wave = np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle))
    return wave.astype(np.float32)


def make_model(name: str, width: int, depth: int, classes: int) -> nn.Module:
    """Makes a network.

    Returns:
        The module, from ``[n, h, w, c]`` to logits ``[n, classes]``.
    """
    deep = (width,) * DEEP
    networks: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: Dense((), classes),
        "mlp": lambda: Dense((width,), classes),
        "deep_mlp": lambda: Dense(deep, classes),
        "tanh_mlp": lambda: Dense((width, width), classes, jnp.tanh),
        "deep_linear": lambda: Dense(deep, classes, lambda x: x),
        "norm_mlp": lambda: Dense((width, width), classes, norm=True),
        "conv": lambda: Conv(width, classes),
        "lenet": lambda: LeNet(width, classes),
        "residual": lambda: Residual(width, depth, classes),
        "attention": lambda: Attention(width, depth, classes),
    }
    return networks[name]()


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
            tagged.layers, rate, damping=damping, momentum=MOMENTUM, weight_decay=decay
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
