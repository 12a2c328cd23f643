"""The local quadratic model of the loss, exact in its curvature.

``M(d) = ∇Lᵀ d + ½ dᵀ (C + λ I) d`` with ``C = (1/N) Σ Jᵀ Λ J`` the generalised
Gauss-Newton matrix, equal to the Fisher matrix for the marked likelihoods. Products
with ``C`` need ``J d`` only: forward mode through the loss as it was traced, without
taps.

References:
    Martens & Grosse, 2015, arXiv:1503.05671, Secs. 6.4, 6.5, 7; Martens, 2020,
    arXiv:1412.1193, Sec. 8.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.likelihoods import Output, fisher_product, weighted_rows
from kfac_jax_lite.core.mesh import along, automatic
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.statistics.outputs import marked_loss
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    """A loss on one batch around one point.

    Attributes:
        loss: ``params -> L(params)`` on this batch.
        products: ``vectors -> (L, slopes, gram)``: the loss, ``∇Lᵀ v_i`` and
            ``v_iᵀ C v_j`` for parameter-shaped vectors ``v_1 … v_k``.
    """

    loss: Callable[[Any], Array]
    products: Callable[[Sequence[Any]], tuple[Array, Array, Array]]


def quadratic_model(tagged: TaggedLoss, params: Any, *args: Any) -> QuadraticModel:
    """The quadratic model of a tagged loss at ``params`` on the batch ``args``.

    Nothing is computed until the model is asked; a part of the batch may be passed to
    make it cheaper.

    Args:
        tagged: The tagged loss; its output must be marked.
        params: The point.
        *args: The batch.

    Returns:
        The model, to be passed as ``tx.update(…, model=model)``.

    Raises:
        ValueError: No output is marked, or it is marked inside a loop or a branch.
    """
    model = marked_loss(tagged, params, args)

    def products(vectors: Sequence[Any]) -> tuple[Any, Any, Array]:
        (loss, marked), forward = jax.linearize(model.values, params)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)
        slopes, tangents = along(forward, stacked)
        gram = jnp.zeros((len(vectors),) * 2, jnp.promote_types(loss.dtype, "float32"))
        n, moves = model.num_terms(marked), model.output_values(tangents)
        for output, dz in zip(model.outputs(marked), moves, strict=True):
            name, *arrays = output
            part = automatic(functools.partial(curved, name), arrays, dz)
            gram += part.astype(gram.dtype) / n
        return loss, slopes, gram

    return QuadraticModel(lambda p: model.values(p)[0], products)


def curved(likelihood: str, arrays: Sequence[Any], moves: Array) -> Array:
    """``Σ_r t_iᵀ Λ t_j [k, k]`` over the rows of an output, of ``t [k, *z.shape]``."""
    output = Output(likelihood, *arrays)
    product = jax.vmap(
        lambda t: weighted_rows(output, fisher_product(likelihood, output.value, t))
    )
    k = len(moves)
    return moves.reshape(k, -1) @ product(moves).reshape(k, -1).T
