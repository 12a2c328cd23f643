"""The tangent kernel of the marked output, and the spectrum that the Fisher shares."""

from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.ntk.jacobian import checked, make_batch, products
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


def kernel(
    tagged: TaggedLoss,
    params: Any,
    batch: tuple[Any, ...],
    other: tuple[Any, ...] | None = None,
    *,
    trace: bool = False,
    independent: bool = False,
    chunk: int | None = None,
) -> Array:
    """The empirical neural tangent kernel ``J(x) J(x')ᵀ`` of the marked output.

    ``kernel[i, c, j, e] = ∂z_ic/∂θ · ∂z'_je/∂θ``, without the likelihood's ``Λ``. A
    normal output is marked as mean over standard deviation, and so enters here. Rows
    that a mask leaves out are zero. The Jacobian is never held as a whole.

    Args:
        tagged: The tagged loss; one output must be marked.
        params: Parameters.
        batch: The loss's arguments after ``params``; its output has ``n`` rows.
        other: A second batch, of ``m`` rows; None: the same one.
        trace: Whether to sum over ``c = e``.
        independent: Whether every row of the output depends only on the example, along
            the leading axis of all arguments, that it belongs to (no batch norm).
        chunk: Rows of ``J`` (examples if ``independent``) in memory at a time; 256 if
            None.

    Returns:
        ``[n, C, m, C]``, or ``[n, m]`` with ``trace``; float32 or float64. Rows are all
        axes of the output but the last, flattened.

    Raises:
        ValueError: No output is marked, or more than one; the widths of both batches
            differ; ``independent`` and the arguments do not share a leading axis.
    """
    chunk = checked(chunk)
    options = independent, chunk

    def compute(params: Any, batch: tuple[Any, ...], other: Any):
        first = make_batch(tagged, params, batch, *options)
        second = first if other is None else make_batch(tagged, params, other, *options)
        (n, c), (m, e) = first.only_shape(), second.only_shape()
        if c != e:
            raise ValueError(
                f"kernel: the output of batch is {(n, c)} and that of other {(m, e)}; "
                "wanted as many columns."
            )
        gram = (
            first.counted()[:, None] * products(first, second) * second.counted()[None]
        )
        return gram.reshape(n, c, m, c)

    gram = automatic(compute, params, batch, other)
    return jnp.einsum("icjc->ij", gram) if trace else gram


def eigenvalues(
    tagged: TaggedLoss,
    params: Any,
    batch: tuple[Any, ...],
    *,
    independent: bool = False,
    chunk: int | None = None,
) -> Array:
    """Eigenvalues of ``Sᵀ J Jᵀ S / n``: those of the Fisher matrix that are not zero.

    Where ``D > P`` the last ``D − P`` are zero, up to rounding, and where ``D < P`` the
    Fisher matrix has ``P − D`` zeros more.

    Args:
        tagged: The tagged loss.
        params: Parameters.
        batch: The loss's arguments after ``params``.
        independent: As in ``kernel``.
        chunk: As in ``kernel``.

    Returns:
        ``[D]``, descending, ``D`` the size of the square root's columns: ``n·C``.
    """
    chunk = checked(chunk)

    def compute(params: Any, batch: tuple[Any, ...]) -> Array:
        rows = make_batch(tagged, params, batch, independent, chunk)
        return jnp.linalg.eigvalsh(rows.dual())[::-1]

    return automatic(compute, params, batch)
