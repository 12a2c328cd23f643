"""A loss with abstract parameters and an abstract batch: enough to tag and to compile.

No array is made, so a network of any size fits.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import kfac_jax_lite as kfac

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and the shapes of everything it takes.

    Attributes:
        loss: ``(params, *args) -> loss`` or ``(loss, aux)``; the output is marked.
        params: parameters, as shapes.
        args: further arguments, as shapes.
        has_aux: whether the loss returns more than its value.
    """

    loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    has_aux: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits ``[..., classes]``, which are marked."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        kfac.categorical(logits), labels
    )
    return losses.mean()


def shapes_of(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The variables of a Linen module, as shapes."""
    return dict(jax.eval_shape(model.init, jax.random.key(0), inputs))


def classifier(model: nn.Module, shape: Shape) -> Problem:
    """An image classifier without state.

    Args:
        model: maps images to logits.
        shape: of the images, ``[batch, height, width, channels]``.
    """

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return cross_entropy(logits, labels)

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return Problem(loss, shapes_of(model, images)["params"], (images, labels))


def normalised_classifier(model: nn.Module, shape: Shape) -> Problem:
    """An image classifier with running batch statistics.

    Args:
        model: maps images to logits and updates the collection ``batch_stats``.
        shape: of the images, ``[batch, height, width, channels]``.
    """

    def loss(params: Any, averages: Any, images: jax.Array, labels: jax.Array):
        logits, new = model.apply(
            {"params": params, "batch_stats": averages}, images, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels), new["batch_stats"]

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    variables = shapes_of(model, images)
    args = variables["batch_stats"], images, labels
    return Problem(loss, variables["params"], args, has_aux=True)


def autoencoder(model: nn.Module, shape: Shape) -> Problem:
    """A model of its own inputs, each a probability.

    Args:
        model: maps inputs to logits.
        shape: of the inputs, ``[batch, entries]``.
    """

    def loss(params: Any, inputs: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, inputs)
        terms = optax.sigmoid_binary_cross_entropy(kfac.bernoulli(logits), inputs)
        return terms.sum(-1).mean()

    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Problem(loss, shapes_of(model, inputs)["params"], (inputs,))


def language_model(model: nn.Module, shape: Shape) -> Problem:
    """A model of the next token.

    Args:
        model: maps tokens to logits.
        shape: of the tokens, ``[batch, time]``.
    """

    def loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens)
        return cross_entropy(logits, targets)

    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return Problem(loss, shapes_of(model, tokens)["params"], (tokens, tokens))
