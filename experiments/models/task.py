"""What the training loop needs to know of a network: a task.

A task is a few pure functions of parameters and model state, so that Linen, NNX and
anything else train in the same loop. Images and texts enter as the data set stores
them; scaling images is part of the loss, on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import kfac_jax_lite as kfac
from experiments.configs import NetConfig
from experiments.configs.checks import check_choice
from experiments.configs.train import MODELS, TEXTS
from experiments.datasets import Dataset, TextDataset
from experiments.errors import ConfigError
from experiments.models import networks
from experiments.models.networks import Transformer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A network with its loss."""

    # ``key -> (params, model_state)``; the state is empty unless the network has batch
    # statistics.
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    # ``(params, model_state, images, labels) -> (mean loss, new model_state)`` in
    # training mode, with the output marked for K-FAC; a language model takes tokens and
    # the tokens that follow.
    loss: Callable[..., tuple[jax.Array, PyTree]]
    # The same arguments to a dict of sums over the examples, in evaluation mode;
    # ``loss`` is one of them.
    evaluate: Callable[..., dict[str, jax.Array]]


def make_preprocess(data: Dataset, standardise: bool) -> Callable:
    """Returns the map from stored images to the network's input.

    Returns:
        A function of images ``[batch, h, w, c]``.
    """
    mean, scale = np.zeros(1, np.float32), np.float32(data.maximum)
    if standardise:
        pixels = data.x_train.reshape(-1, data.x_train.shape[-1])
        mean = pixels.mean(0, dtype=np.float64).astype(np.float32)
        scale = pixels.std(0, dtype=np.float64).astype(np.float32)
        scale = np.maximum(scale, np.float32(1e-3 * data.maximum))
    return lambda images: (images.astype(jnp.float32) - mean) / scale


def classifier(
    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]],
    apply: Callable[..., tuple[jax.Array, PyTree]],
    data: Dataset,
) -> Task:
    """Builds a classification task with the softmax cross-entropy.

    Training labels are integers ``[batch]`` or probabilities ``[batch, classes]``.
    """
    preprocess = make_preprocess(data, standardise=True)
    sample = np.zeros((1, *data.image_shape), data.x_train.dtype)

    def loss(params, model_state, images, labels):
        logits, model_state = apply(params, model_state, preprocess(images), True)
        logits = kfac.categorical(logits)
        if labels.ndim == logits.ndim:
            terms = optax.softmax_cross_entropy(logits, labels)
        else:
            terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return terms.mean(), model_state

    def evaluate(params, model_state, images, labels):
        logits, _ = apply(params, model_state, preprocess(images), False)
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = jnp.argmax(logits, -1) == labels
        return {"loss": terms.sum(), "accuracy": hits.sum().astype(jnp.float32)}

    return Task(lambda key: init(key, preprocess(sample)), loss, evaluate)


def reconstruction(
    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]],
    apply: Callable[..., tuple[jax.Array, PyTree]],
    data: Dataset,
) -> Task:
    """Builds an autoencoder's task: Bernoulli loss, summed over the pixels.

    Args:
        init: ``(key, inputs) -> (params, model_state)``; inputs are ``[1, pixels]``.
        apply: ``(params, model_state, inputs, train) -> (logits, new model_state)``.
        data: the data set.
    """
    preprocess = make_preprocess(data, standardise=False)
    sample = np.zeros((1, *data.image_shape), data.x_train.dtype)

    def flat(images):
        return preprocess(images).reshape(len(images), -1)

    def loss(params, model_state, images, labels):
        del labels
        pixels = flat(images)
        logits, model_state = apply(params, model_state, pixels, True)
        logits = kfac.bernoulli(logits)
        terms = optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1)
        return terms.mean(), model_state

    def evaluate(params, model_state, images, labels):
        del labels
        pixels = flat(images)
        logits, _ = apply(params, model_state, pixels, False)
        terms = optax.sigmoid_binary_cross_entropy(logits, pixels)
        error = (jax.nn.sigmoid(logits) - pixels) ** 2
        return {"loss": terms.sum(), "squared_error": error.sum()}

    return Task(lambda key: init(key, flat(sample)), loss, evaluate)


def language_model(
    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]],
    apply: Callable[..., tuple[jax.Array, PyTree]],
    data: TextDataset,
) -> Task:
    """Builds the task of predicting every next token; the loss is that of a token.

    Args:
        init: ``(key, tokens) -> (params, model_state)``; tokens are ``[1, time]``.
        apply: ``(params, model_state, tokens, train) -> (logits, new model_state)``
            with logits ``[batch, time, vocabulary]``.
        data: the data set.
    """
    sample = np.zeros((1, data.context), data.x_train.dtype)

    def loss(params, model_state, tokens, following):
        logits, model_state = apply(params, model_state, tokens, True)
        logits = kfac.categorical(logits)
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, following)
        return terms.mean(), model_state

    def evaluate(params, model_state, tokens, following):
        logits, _ = apply(params, model_state, tokens, False)
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, following)
        nats = terms.mean(-1).sum()
        return {"loss": nats, "bits_per_character": nats / np.log(2)}

    return Task(lambda key: init(key, jnp.asarray(sample)), loss, evaluate)


class MLP(nnx.Module):
    """Fully connected network with rectified linear units."""

    def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[batch, h, w, c]`` to logits ``[batch, classes]``."""
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def nnx_task(hidden: Sequence[int], data: Dataset) -> Task:
    """Builds the task of the NNX network.

    The module is split once into its graph and its parameters, an `nnx.State`, which is
    a pytree like any other.
    """
    height, width, channels = data.image_shape
    widths = (height * width * channels, *hidden, data.num_classes)
    graph = nnx.graphdef(nnx.eval_shape(lambda: MLP(widths, nnx.Rngs(0))))

    def init(key: jax.Array, inputs: jax.Array) -> tuple[Any, Any]:
        del inputs
        return nnx.state(MLP(widths, nnx.Rngs(key)), nnx.Param), {}

    def apply(params: Any, model_state: Any, x: jax.Array, train: bool):
        del train
        return nnx.merge(graph, params)(x), model_state

    return classifier(init, apply, data)


LENET_SMALLEST = 12


def make_task(model: str, net: NetConfig, data: Dataset | TextDataset) -> Task:
    """Builds the task of a model on a data set."""
    check_choice("model", model, MODELS)
    if isinstance(data, TextDataset):
        if model != "lm":
            raise ConfigError(
                f"{model} wants images; {data.title} is a text. Use --model lm."
            )
        return language_model(*linen_functions(transformer(net, data)), data)
    if model == "lm":
        raise ConfigError(
            f"lm wants a text; {data.title} has images. Use --dataset "
            f"{' or '.join(TEXTS)}."
        )
    if model == "lenet5" and min(data.image_shape[:2]) < LENET_SMALLEST:
        height, width, _ = data.image_shape
        raise ConfigError(
            f"lenet5 wants images of at least {LENET_SMALLEST} x {LENET_SMALLEST} "
            f"pixels; {data.title} has {height} x {width}. Use --model mlp or resnet."
        )
    if model == "mlp_nnx":
        return nnx_task(net.hidden, data)
    functions = linen_functions(linen_module(model, net, data))
    if model == "autoencoder":
        return reconstruction(*functions, data)
    return classifier(*functions, data)


def linen_module(model: str, net: NetConfig, data: Dataset | TextDataset) -> nn.Module:
    """The network of a model, before any task is made of it."""
    if isinstance(data, TextDataset):
        return transformer(net, data)
    modules: dict[str, nn.Module] = {
        "autoencoder": networks.Autoencoder(net.code),
        "mlp": networks.MLP(net.hidden, data.num_classes),
        "lenet5": networks.LeNet5(data.num_classes),
        "resnet": networks.ResNet(net.blocks, net.width, data.num_classes),
    }
    return modules[model]


def transformer(net: NetConfig, data: TextDataset) -> Transformer:
    """Returns the language model of the given sizes for a text."""
    return Transformer(
        vocabulary=len(data.vocabulary),
        context=data.context,
        layers=net.layers,
        heads=net.heads,
        width=net.features,
    )


def linen_functions(module: nn.Module):
    """Returns the pure functions `init` and `apply` of a Linen module."""

    def init(key: jax.Array, inputs: jax.Array) -> tuple[Any, Any]:
        variables = dict(module.init(key, inputs))
        return variables.pop("params"), variables

    def apply(params: Any, model_state: Any, inputs: jax.Array, train: bool) -> Any:
        variables = {"params": params, **model_state}
        if not train or not model_state:
            return module.apply(variables, inputs, train=train), model_state
        mutable = list(model_state)
        return module.apply(variables, inputs, train=train, mutable=mutable)

    return init, apply
