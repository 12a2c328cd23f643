"""The loss on one batch as a function of parameters, its marked outputs in reach.

The traced loss is evaluated without taps, so that forward mode passes through it. What
the Fisher and Gauss-Newton matrices, the tangent kernel and the quadratic model need is
here: ``z(θ)``, the number ``N`` of rows (terms of the mean loss), and the residuals
``r = ∂ℓ/∂z`` of every row's own loss ``ℓ``.

References:
    Martens, 2020, arXiv:1412.1193, Secs. 5-9.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.factors.estimate import TaggedLoss
from kfac_jax_lite.likelihoods import MASK, Output, count_terms, outputs_of
from kfac_jax_lite.tagging.interpreter import Interpreter
from kfac_jax_lite.types import Array


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
    """

    values: Callable[[Any], tuple[Array, tuple[Array, ...]]]
    shifted: Callable[[Any, Sequence[Array]], Array]
    names: tuple[str, ...]
    num_examples: int

    def outputs(self, marks: Sequence[Array]) -> list[Output]:
        """The marked outputs, each with its likelihood and mask."""
        return outputs_of(self.names, marks)

    def num_terms(self, marks: Sequence[Array]) -> Any:
        """``N``: how many rows count."""
        terms = count_terms(self.outputs(marks))
        return self.num_examples if terms is None else terms

    def cotangents(
        self, marks: Sequence[Array], values: Iterable[Array]
    ) -> tuple[Array, ...]:
        """Cotangents of the outputs as cotangents of all marks: zeros for masks.

        Args:
            marks: From ``values``.
            values: One for every output, of its shape.

        Returns:
            One for every mark, in its dtype.
        """
        waiting, pairs = iter(values), zip(self.names, marks, strict=True)
        return tuple(
            jnp.zeros_like(m) if name == MASK else next(waiting).astype(m.dtype)
            for name, m in pairs
        )

    def residuals(self, params: Any) -> list[Array]:
        """``r = N ∂L/∂z``, shaped like each output; zero in rows that do not count."""
        _, marks = self.values(params)
        zeros = [jnp.zeros_like(output.value) for output in self.outputs(marks)]
        slopes = jax.grad(lambda shifts: self.shifted(params, shifts))(zeros)
        n = self.num_terms(marks)
        return [(n * slope).astype(slope.dtype) for slope in slopes]


def marked_loss(tagged: TaggedLoss, params: Any, args: tuple[Any, ...]) -> MarkedLoss:
    """The loss on the batch ``args``, without taps.

    Args:
        tagged: The tagged loss; its output must be marked.
        params: Parameters, or their shapes.
        args: The loss's other arguments.

    Returns:
        Its functions; nothing is computed.

    Raises:
        ValueError: No output is marked, or it is marked inside a loop or a branch.
    """
    found = tagged.trace(params, args, True)
    for sites in found.sites.values():
        for site in sites:
            site.layer = None  # untapped: a tap has no forward mode
    data = jax.tree.leaves(args)

    def evaluate(params: Any, on_mark: Callable[..., Any] | None):
        operands = [*jax.tree.leaves(params), *data]
        interpreter = Interpreter(
            lambda site, output, inputs, slot: output, {}, on_mark
        )
        jaxpr, consts = found.closed.jaxpr, found.closed.consts
        out, marks = interpreter.run(found.plan, jaxpr, consts, operands, {})
        return out[0], tuple(marks)

    def shifted(params: Any, shifts: Iterable[Any]):
        waiting = iter(shifts)

        def add(name: str, mark: Array):
            return mark if name == MASK else mark + next(waiting)

        return evaluate(params, add)[0]

    return MarkedLoss(
        lambda params: evaluate(params, None), shifted, found.marks, found.num_examples
    )
