"""The loss on one batch as a function of parameters, its marked outputs in reach.

The traced loss is evaluated without taps, so that forward mode passes through it. What
the Fisher and Gauss-Newton matrices, the tangent kernel and the quadratic model need is
here: ``z(θ)``, the number ``N`` of rows (terms of the mean loss), and the residuals
``r = ∂ℓ/∂z`` of every row's own loss ``ℓ``.

References:
    Martens, 2020, arXiv:1412.1193, Secs. 5-9.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.likelihoods import (
    BESIDE,
    Output,
    count_terms,
    fisher_product,
    outputs_of,
    weighted_rows,
)
from kfac_jax_lite.core.mesh import along, automatic
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.statistics.weights import with_weights
from kfac_jax_lite.tagging.interpreter import Interpreter


@dataclasses.dataclass(frozen=True)
class MarkedLoss:
    """A loss on one batch.

    Attributes:
        values: ``params -> (loss, marks)``; the marks are the marked outputs and their
            masks in program order. It can be differentiated in both modes.
        shifted: ``(params, shifts) -> loss``: the loss with arrays added to the marked
            outputs, in the order of ``outputs``.
        names: Likelihood, or "mask", of every mark.
        num_examples: ``N`` where nothing is masked.
        weigh: Finds the weights that the user has not given.
    """

    values: Callable[[Any], tuple[Array, tuple[Array, ...]]]
    shifted: Callable[[Any, Sequence[Array]], Array]
    names: tuple[str, ...]
    num_examples: int
    weigh: Callable[[list[Output]], list[Output]]

    def outputs(self, marks: Sequence[Array]) -> list[Output]:
        """The marked outputs, each with its likelihood, mask and weight."""
        return self.weigh(outputs_of(self.names, marks))

    def output_values(self, marks: Sequence[Array]) -> list[Array]:
        """The values of the outputs alone, or tangents of them."""
        pairs = zip(self.names, marks, strict=True)
        return [mark for name, mark in pairs if name not in BESIDE]

    def num_terms(self, marks: Sequence[Array]) -> Any:
        """``N``: how many rows count."""
        terms = count_terms(outputs_of(self.names, marks))
        return self.num_examples if terms is None else terms

    def cotangents(
        self, marks: Sequence[Array], values: Iterable[Array]
    ) -> tuple[Array, ...]:
        """Cotangents of the outputs as cotangents of all marks: zeros for masks."""
        waiting, pairs = iter(values), zip(self.names, marks, strict=True)
        return tuple(
            jnp.zeros_like(m) if name in BESIDE else next(waiting).astype(m.dtype)
            for name, m in pairs
        )

    def residuals(self, params: Any) -> list[Array]:
        """``r = N ∂L/∂z``, shaped like each output; zero in rows that do not count."""
        _, marks = self.values(params)
        outputs = outputs_of(self.names, marks)
        zeros = [jnp.zeros_like(output.value) for output in outputs]
        slopes = jax.grad(lambda shifts: self.shifted(params, shifts))(zeros)
        n = self.num_terms(marks)
        return [(n * slope).astype(slope.dtype) for slope in slopes]


def marked_loss(tagged: TaggedLoss, params: Any, args: tuple[Any, ...]) -> MarkedLoss:
    """The loss on the batch ``args``, without taps."""
    found = tagged.trace(params, args, True)
    data = jax.tree.leaves(args)

    def evaluate(params: Any, on_mark: Callable[..., Any] | None):
        operands = [*jax.tree.leaves(params), *data]
        interpreter = Interpreter(None, {}, on_mark)  # a tap has no forward mode
        jaxpr, consts = found.closed.jaxpr, found.closed.consts
        out, marks = interpreter.run(found.plan, jaxpr, consts, operands, {})
        return out[0], tuple(marks)

    def shifted(params: Any, shifts: Iterable[Any]):
        waiting = iter(shifts)

        def add(name: str, mark: Array):
            return mark if name in BESIDE else mark + next(waiting)

        return evaluate(params, add)[0]

    def weigh(outputs: list[Output]) -> list[Output]:
        return with_weights(found, [*jax.tree.leaves(params), *data], outputs)

    def values(params: Any):
        loss, marks = evaluate(params, None)
        if tagged.curvature is not None:
            loss = tagged.loss_fn(params, *args)
            loss = loss[0] if tagged.has_aux else loss
        return loss, marks

    return MarkedLoss(values, shifted, found.marks, found.num_examples, weigh)


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
