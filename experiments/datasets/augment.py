"""Augmentation of image batches: pure functions, run inside the compiled step.

An ``Augmentation`` maps ``(state, (images, labels), key)`` to the next state and batch.
What is remembered from batch to batch is in its state, a pytree that checkpoints hold.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.datasets.arrays import Dataset, Examples

PyTree = Any
Batch = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random change of batches."""

    # ``batch -> state`` before the first batch, of arrays or their shapes.
    init: Callable[[Any], PyTree]
    # ``(state, batch, key) -> (state, batch)``.
    apply: Callable[[PyTree, Batch, jax.Array], tuple[PyTree, Batch]]


class Mixture(NamedTuple):
    """What running mixup remembers."""

    images: jax.Array  # the last mixed images ``[batch, ...]``
    labels: jax.Array  # their labels ``[batch, classes]``
    steps: jax.Array  # batches mixed so far


def running_mixup(alpha: float, num_classes: int) -> Augmentation:
    """Mixes every batch with the mixed batch before it.

    ``x̃_t = λ x_t + (1 − λ) x̃_{t−1}``, ``ỹ_t = λ y_t + (1 − λ) ỹ_{t−1}`` with ``y``
    one-hot and ``λ ~ Beta(α, α)`` drawn for every example; ``x̃_0 = x_0``.

    Returns:
        The augmentation. Images become floats of the same scale, labels
        ``[batch, classes]``.

    References:
        Zhang et al., 2018, arXiv:1710.09412 (mixup); Osawa et al., 2020,
        arXiv:2002.06015 (running mixup). The authors' code (tyohei/chainerkfac) takes
        ``max(λ, 1 − λ)`` in place of ``λ``.
    """

    def init(batch):
        images, labels = batch
        return Mixture(
            jnp.zeros(images.shape, jnp.result_type(images.dtype, jnp.float32)),
            jnp.zeros((*labels.shape, num_classes), jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    def apply(state, batch, key):
        images, labels = batch
        images = images.astype(state.images.dtype)
        share = jax.random.beta(key, alpha, alpha, labels.shape, state.labels.dtype)
        share = jnp.where(state.steps == 0, 1, share)
        mixed = (
            blend(share, images, state.images),
            blend(share, jax.nn.one_hot(labels, num_classes), state.labels),
        )
        return Mixture(*mixed, state.steps + 1), mixed

    return Augmentation(init, apply)


def blend(share: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """``λ new + (1 − λ) old``, example by example."""
    share = share.reshape(-1, *[1] * (new.ndim - 1)).astype(new.dtype)
    return share * new + (1 - share) * old


def crop_and_flip(padding: int) -> Augmentation:
    """Cuts a random window out of every padded image and mirrors half of them.

    References:
        He, Zhang, Ren & Sun, 2015, arXiv:1512.03385, Sec. 4.2.
    """

    def one(image, corner, mirrored):
        padded = jnp.pad(image, [(padding, padding)] * 2 + [(0, 0)])
        window = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
        return jnp.where(mirrored, window[:, ::-1], window)

    def apply(state, batch, key):
        images, labels = batch
        place, side = jax.random.split(key)
        corners = jax.random.randint(place, (len(images), 2), 0, 2 * padding + 1)
        mirrored = jax.random.bernoulli(side, shape=(len(images),))
        return state, (jax.vmap(one)(images, corners, mirrored), labels)

    return Augmentation(lambda batch: (), apply)


def chain(*parts: Augmentation) -> Augmentation:
    """One augmentation after another."""

    def init(batch):
        states = []
        for part in parts:
            states.append(part.init(batch))
            batch = jax.eval_shape(part.apply, states[-1], batch, jax.random.key(0))[1]
        return tuple(states)

    def apply(states, batch, key):
        new = []
        for number, (part, state) in enumerate(zip(parts, states, strict=True)):
            state, batch = part.apply(state, batch, jax.random.fold_in(key, number))
            new.append(state)
        return tuple(new), batch

    return Augmentation(init, apply)


def make_augmentation(kind: str, alpha: float, data: Examples) -> Augmentation:
    """Builds the augmentation of a run."""
    parts = []
    if isinstance(data, Dataset) and kind == "crop-flip":
        parts.append(crop_and_flip(max(data.image_shape[:2]) // 8))
    if isinstance(data, Dataset) and alpha:
        parts.append(running_mixup(alpha, data.num_classes))
    return chain(*parts)
