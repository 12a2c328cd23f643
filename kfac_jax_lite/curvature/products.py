"""What is computed on one batch, each in one program that is compiled once per shape.

Parameters, vectors and the batch are arguments of these programs, and the tagged loss
and the law are hashed: an operator made at other parameters runs the programs of the
first. All return *sums* over the rows that count and their number ``N``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.likelihoods import outputs_of, row_shape
from kfac_jax_lite.core.linalg import expanded
from kfac_jax_lite.core.mesh import along, explicit_mesh
from kfac_jax_lite.core.types import Array, DiagonalStatistics, accumulation_dtype
from kfac_jax_lite.curvature.laws import Law, kernel, roots
from kfac_jax_lite.statistics.outputs import marked_loss
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


def static(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """``jax.jit`` with these arguments hashed."""
    return functools.partial(jax.jit, static_argnames=names)


def linear_map(
    tagged: TaggedLoss, law: Law, params: Any, args: tuple[Any, ...], key: Any
) -> tuple[Any, Callable[[Any], Any]]:
    """``v -> N M v`` on one batch, and ``N``.

    Args:
        law: The matrix; ``ḡ ḡᵀ`` is left to the caller.

    Returns:
        ``(N, function)``; the forward pass is done once.
    """
    model = marked_loss(tagged, params, args)
    if not law.rooted:
        _, marks = model.values(params)
        _, forward = jax.linearize(jax.grad(lambda p: model.values(p)[0]), params)
        n = model.num_terms(marks)
        return n, lambda v: jax.tree.map(lambda x: n * x, forward(v))
    (_, marks), forward = jax.linearize(model.values, params)
    curve = kernel(law, model, params, marks, key)

    def moved(v: Any) -> Any:
        return forward(v)[1]

    back = jax.linear_transpose(moved, params)
    return model.num_terms(marks), lambda v: back(curve(moved(v)))[0]


def wide(tree: Any) -> Any:
    """Leaves in the precision of sums."""
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), tree)


@static("tagged", "law")
def product(
    tagged: TaggedLoss, law: Law, params: Any, args: tuple[Any, ...], key: Any, v: Any
) -> tuple[Any, Any]:
    """``(N M v, N)`` on one batch."""
    n, apply = linear_map(tagged, law, params, args, key)
    return wide(apply(v)), n


@static("tagged", "law", "chunk")
def products(
    tagged: TaggedLoss,
    law: Law,
    params: Any,
    args: tuple[Any, ...],
    key: Any,
    vs: Any,
    chunk: int | None,
) -> tuple[Any, Any]:
    """``(N M v_i, N)`` for a leading axis of vectors, all at once or in chunks."""
    n, apply = linear_map(tagged, law, params, args, key)
    if chunk is None:
        return wide(along(apply, vs, args)), n
    size = chunk if explicit_mesh((vs, args)) is None else None
    return wide(lax.map(apply, vs, batch_size=size)), n


@static("tagged", "law")
def block_product(
    tagged: TaggedLoss,
    law: Law,
    params: Any,
    args: tuple[Any, ...],
    key: Any,
    v: Any,
    owners: Any,
    blocks: Array,
) -> tuple[Any, Any]:
    """``(N Σ_b P_b M P_b v, N)``: one product for every block, one after the other."""
    n, apply = linear_map(tagged, law, params, args, key)

    def add(total: Any, b: Array):
        alone = jax.tree.map(lambda x, o: jnp.where(o == b, x, 0), v, owners)
        image = wide(apply(alone))
        own = jax.tree.map(lambda t, x, o: t + jnp.where(o == b, x, 0), *(
            total, image, owners))  # fmt: skip
        return own, None

    zeros = jax.tree.map(jnp.zeros_like, wide(v))
    return lax.scan(add, zeros, blocks)[0], n


@static("tagged", "law", "chunk")
def row_moments(
    tagged: TaggedLoss,
    law: Law,
    params: Any,
    args: tuple[Any, ...],
    key: Any,
    indices: Sequence[Array],
    chunk: int,
) -> tuple[list[Array], Any]:
    """Diagonal blocks of ``N M`` from the rows of its square root, ``J_nᵀ S_n``.

    Every row and column of the root is a backward pass over the batch, ``chunk`` of
    them at once: rows are told apart in any network, also in one that mixes examples.

    Args:
        indices: Positions in the ravelled parameters, ``[blocks, k]`` each.

    Returns:
        ``[blocks, k, k]`` for each, and ``N``.
    """
    model = marked_loss(tagged, params, args)
    (_, marks), forward = jax.linearize(model.values, params)
    back = jax.linear_transpose(lambda v: forward(v)[1], params)
    count, cotangents = roots(law, model, params, marks, key)
    outputs = outputs_of(model.names, marks)
    rows = max(math.prod(row_shape(o.value.shape, o.likelihood)) for o in outputs)
    dtype = jnp.result_type(*[x.dtype for x in jax.tree.leaves(wide(params))])

    def pull(q: Array):
        (gradient,) = back(cotangents(q // count, q % count))
        return jax.flatten_util.ravel_pytree(gradient)[0].astype(dtype)

    def add(total: Any, q: Array):
        u = along(pull, q, args)
        parts = [jnp.take(u, index, axis=1) for index in indices]
        grams = [jnp.einsum("qnk,qnl->nkl", x, x) for x in parts]
        return [t + g for t, g in zip(total, grams, strict=True)], None

    zeros = [jnp.zeros((*i.shape, i.shape[-1]), dtype) for i in indices]
    steps = -(-rows * count // chunk)
    numbers = jnp.arange(steps * chunk).reshape(steps, chunk)
    return lax.scan(add, zeros, numbers)[0], model.num_terms(marks)


@static("tagged")
def gradient(tagged: TaggedLoss, params: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """``(Σ_n J_nᵀ r_n, N)``: ``N`` times the gradient through the marked outputs."""
    model = marked_loss(tagged, params, args)
    (_, marks), back = jax.vjp(model.values, params)
    residuals = model.cotangents(marks, model.residuals(params))
    loss, _ = jax.eval_shape(model.values, params)
    (total,) = back((jnp.zeros(loss.shape, loss.dtype), residuals))
    return wide(total), model.num_terms(marks)


@static("tagged")
def count(tagged: TaggedLoss, params: Any, args: tuple[Any, ...]) -> Any:
    """``N``."""
    model = marked_loss(tagged, params, args)
    return jnp.asarray(model.num_terms(model.values(params)[1]))


@static("tagged")
def statistics(
    tagged: TaggedLoss, params: Any, args: tuple[Any, ...], keys: Any, opt_state: Any
) -> tuple[Any, Any]:
    """``N`` times K-FAC's statistics (means over the keys), and ``N``.

    Args:
        keys: ``[S]`` PRNG keys, where labels are sampled; else None.
    """

    def estimate(key: Any):
        found = tagged.value_and_grad(params, *args, opt_state=opt_state, key=key)[-1]
        return {
            name: value
            for name, value in found.items()
            if not isinstance(value, DiagonalStatistics)
        }

    if keys is None:
        means = estimate(None)
    else:
        means = jax.tree.map(lambda x: x.mean(0), lax.map(estimate, keys))
    n = count(tagged, params, args)
    return jax.tree.map(lambda x: expanded(n.astype(x.dtype), x.ndim) * x, means), n
