"""What a Laplace approximation needs of the data beside a curvature operator."""

import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.likelihoods import masked_rows
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature.laws import Law, kernel
from kfac_jax_lite.curvature.products import static, wide
from kfac_jax_lite.curvature.stream import Stream
from kfac_jax_lite.statistics.outputs import marked_loss
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.tagging.interpreter import in_line

# Unit vectors pushed through the last layer together.
AT_ONCE = 256


def last_layer_name(tagged: TaggedLoss, params: Any, args: tuple[Any, ...]) -> str:
    """The layer that runs last before the marked output."""
    found = tagged.trace(params, args, True)
    sites = in_line(found.plan, found.closed.jaxpr)
    names = [site.layer for site, _ in sites if site.layer is not None]
    if not names:
        raise ValueError(
            "no layer outside loops and branches produces the marked output: name one, "
            f"last_layer=…, of {tuple(layer.name for layer in tagged.layers)}."
        )
    return names[-1]


@static("tagged")
def evaluate(
    tagged: TaggedLoss, params: Any, args: tuple[Any, ...], variance: Any
) -> tuple[Any, Any]:
    """``(Σ_n −log p(y_n | z_n), N)`` on one batch, constants included."""
    model = marked_loss(tagged, params, args)
    loss, marks = model.values(params)
    n = jnp.asarray(model.num_terms(marks))
    total = n * wide(loss)
    for output in model.outputs(marks):
        if output.likelihood == "normal":
            each = jnp.log(2 * jnp.pi * jnp.asarray(variance, total.dtype)) / 2
            each = jnp.broadcast_to(each, output.value.shape)
            total = total + masked_rows(output, each).sum()
    return total, n


def log_likelihood(stream: Stream, variance: Any) -> tuple[float, int]:
    """Mean over the rows of ``log p(y | x, μ)``, and how many rows there are."""

    def one(number: int, args: tuple[Any, ...]):
        del number
        return evaluate(stream.tagged, stream.params, args, variance)

    total, n = stream.total(one, "likelihood")
    return -float(total) / int(n), int(n)


@static("tagged", "law", "numbers")
def block_moment(
    tagged: TaggedLoss,
    law: Law,
    params: Any,
    args: tuple[Any, ...],
    key: Any,
    index: Array,
    numbers: tuple[int, ...],
) -> tuple[Array, Any]:
    """One diagonal block of ``N M``: ``Σ_n J_nᵀ K_n J_n`` over some of the parameters.

    Everything that does not depend on those parameters is computed once; a unit vector
    then passes through what follows them only. For a last layer that is one product, so
    that the block costs about what forming it from the layer's inputs would.

    Args:
        index: Positions ``[k]`` of the block in the ravelled leaves ``numbers``.

    Returns:
        ``[k, k]`` and ``N``.
    """
    model = marked_loss(tagged, params, args)
    leaves, structure = jax.tree.flatten(params)
    flat, unravel = jax.flatten_util.ravel_pytree([leaves[i] for i in numbers])

    def values(own: Any):
        merged = list(leaves)
        for number, leaf in zip(numbers, own, strict=True):
            merged[number] = leaf
        return model.values(jax.tree.unflatten(structure, merged))[1]

    marks, forward = jax.linearize(values, unravel(flat))
    curve = kernel(law, model, params, marks, key)

    def images(position: Array):
        moved = forward(unravel(jnp.zeros_like(flat).at[position].set(1)))
        both = wide((moved, curve(moved)))
        return [jnp.concatenate([x.ravel() for x in side]) for side in both]

    pushed, curved = jax.lax.map(images, index, batch_size=AT_ONCE)
    return pushed @ curved.T, model.num_terms(marks)


def layer_block(stream: Stream, index: np.ndarray, numbers: tuple[int, ...]) -> Array:
    """The block of ``M`` at some parameters, ``[k, k]``; see ``block_moment``."""

    def one(number: int, args: tuple[Any, ...]):
        moment = functools.partial(block_moment, *stream.batch_of(number, args))
        return moment(jnp.asarray(index), numbers)

    block = stream.mean(one, "last layer")
    return (block + block.T) / 2
