"""Data, network and loss of a task, with examples held out for the target."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import kfac_jax_lite as kfac
from experiments import metrics
from experiments.benchmarks.time_to_target.sizes import TaskSize
from experiments.configs.train import TEXTS
from experiments.datasets import Examples, TextDataset, load, load_text
from experiments.errors import ConfigError
from experiments.models import Task, make_task
from experiments.models.registry import linen_functions, linen_module
from experiments.models.task import make_preprocess

Mark = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an optimiser is given."""

    size: TaskSize  # sizes and budget
    data: Examples  # the data set; its training part has no held-out examples
    task: Task  # initial parameters, loss and evaluation
    # ``(params, model_state, inputs, targets) -> (logits, what they should be, new
    # model_state)`` in training mode.
    outputs: Callable[..., tuple[jax.Array, jax.Array, Any]]
    # Parameters and model state to the means over the held-out examples.
    evaluate: Callable[[Any, Any], dict[str, float]]
    bernoulli: bool  # whether targets are probabilities of pixels

    def example(self) -> tuple[Any, Any]:
        """The first batch."""
        rows = slice(self.size.batch)
        return self.data.x_train[rows], self.data.y_train[rows]

    def peer_loss(self, mark: Mark) -> Callable[..., tuple[jax.Array, Any]]:
        """The loss, for a library that is told the output in its own way."""

        def loss(params, model_state, batch):
            logits, targets, model_state = self.outputs(params, model_state, *batch)
            logits = mark(logits, targets)
            if self.bernoulli:
                terms = optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
            else:
                terms = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return terms.mean(), model_state

        return loss

    def tagged(self) -> kfac.TaggedLoss:
        """The loss tagged by this package; nothing is computed."""
        start = jax.eval_shape(self.task.init, jax.random.key(0))
        fisher: Any = self.size.curvature.fisher
        return kfac.tag(
            self.task.loss, *start, *self.example(), fisher=fisher, has_aux=True
        )


def load_split(size: TaskSize, data_dir: Path | None) -> tuple[Examples, Any, Any]:
    """Loads the data and holds examples out.

    Returns:
        The data set with the examples for training, held-out inputs and targets. Of
        images the last of the training set are held out, of a text the first windows
        of its last tenth; a test set takes no part.
    """
    count = size.validation
    if size.dataset in TEXTS:
        data: Examples = load_text(size.dataset, data_dir, size.net.context)
        held = data.x_test[:count], data.y_test[:count]
    else:
        data = load(size.dataset, data_dir)
        held = data.x_train[-count:], data.y_train[-count:]
        rest = slice(None, -count)
        data = dataclasses.replace(
            data, x_train=data.x_train[rest], y_train=data.y_train[rest]
        )
    data = data.first(size.train)
    if len(held[0]) < count or len(data.x_train) < size.batch:
        raise ConfigError(
            f"{data.title}: {len(data.x_train)} examples for training and "
            f"{len(held[0])} held out; wanted at least {size.batch} and {count}."
        )
    return data, *held


def make_problem(size: TaskSize, data_dir: Path | None = None) -> Problem:
    """Loads a task."""
    data, *held = load_split(size, data_dir)
    task = make_task(size.model, size.net, data)  # pyright: ignore[reportArgumentType]
    return Problem(
        size,
        data,
        task,
        make_outputs(size, data),
        metrics.make_evaluate(task, *held),
        size.model == "autoencoder",
    )


def make_outputs(size: TaskSize, data: Any) -> Callable[..., Any]:
    """The network's outputs as `Problem.outputs` wants them."""
    _, apply = linen_functions(linen_module(size.model, size.net, data))
    flat = size.model == "autoencoder"
    text = isinstance(data, TextDataset)
    preprocess = None if text else make_preprocess(data, standardise=not flat)

    def outputs(params, model_state, inputs, targets):
        if preprocess is not None:
            inputs = preprocess(inputs)
        if flat:
            inputs = targets = inputs.reshape(len(inputs), -1)
        logits, model_state = apply(params, model_state, inputs, True)
        return logits, targets, model_state

    return outputs
