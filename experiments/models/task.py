"""What the training loop needs to know of a network: a task.

A task is a few pure functions of parameters and model state, so that Linen, NNX and
anything else train in the same loop. Images and texts enter as the data set stores
them; scaling images is part of the loss, on the device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.datasets import Dataset, TextDataset

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
