"""The six matrices, as what they do to one row of the marked output.

All but the Hessian are ``M = (1/N) Σ_n J_nᵀ K_n J_n`` with ``J_n = ∂z_n/∂θ`` the
Jacobian of row ``n`` of the marked output (with several marked outputs, of their rows
``n`` together), and differ in ``K_n``:

========================  ==========================================================
``ggn``, ``fisher``       ``Λ(z_n)``, the Hessian of the row's loss in ``z_n``; for the
                          marked likelihoods it is the Fisher information of the output
``mc_fisher``             ``(1/S) Σ_s r_s r_sᵀ``, ``r_s`` the gradient in ``z_n`` of
                          ``−log p(y_s | z_n)`` for a label drawn from the model
``empirical_fisher``      ``r_n r_nᵀ``, ``r_n`` the gradient for the label of the data
``gradient_covariance``   the same, and ``− ḡ ḡᵀ`` with ``ḡ = (1/N) Σ_n J_nᵀ r_n``
========================  ==========================================================

Every ``K_n = S_n S_nᵀ`` has a square root ``S_n`` with few columns.

References:
    Martens, 2020, arXiv:1412.1193, Secs. 5-11; Kunstner, Balles & Hennig, 2019,
    arXiv:1905.12558 (the empirical Fisher is neither).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.likelihoods import (
    Output,
    fisher_product,
    sampled_cotangent,
    square_root_column,
    weighted_rows,
)
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.statistics.fisher_passes import typed_like
from kfac_jax_lite.statistics.outputs import MarkedLoss


@dataclasses.dataclass(frozen=True)
class Law:
    """Which matrix it is; hashable, so that programs are compiled once.

    Laws that differ in name or centring run the same programs.

    Attributes:
        name: As in ``kfac_jax_lite.curvature``.
        kernel: ``"hessian"`` (of the whole loss, no kernel), ``"exact"`` (``Λ``),
            ``"mc"`` or ``"empirical"``: the last three name K-FAC's statistics, too.
        centred: Whether ``ḡ ḡᵀ`` is taken off.
        num_samples: ``S``, labels drawn for every row.
    """

    name: str = dataclasses.field(compare=False)
    kernel: str
    centred: bool = dataclasses.field(default=False, compare=False)
    num_samples: int = 1

    @property
    def rooted(self) -> bool:
        """Whether it is made of the rows' Jacobians."""
        return self.kernel != "hessian"

    @property
    def fisher(self) -> str | None:
        """The type of K-FAC's statistics of this matrix; None: it has none."""
        return self.kernel if self.rooted and not self.centred else None


def as_rows(output: Output, x: Array) -> Array:
    """An array shaped like an output as ``[N, C]``."""
    scalar = output.value.ndim == 1 and output.likelihood != "categorical"
    return x.reshape(-1, 1) if scalar else x.reshape(-1, output.value.shape[-1])


def samples(
    law: Law, model: MarkedLoss, params: Any, outputs: Sequence[Output], key: Any
) -> list[list[Array]]:
    """The columns of ``S_n`` of a law that is not exact, ``[S][outputs]``.

    Sample ``s`` draws with ``fold_in(key, s)``, split over the outputs: the labels of
    K-FAC's own statistics for that key.
    """
    if law.kernel == "empirical":
        return [model.residuals(params)]
    columns = []
    for s in range(law.num_samples):
        keys = jax.random.split(jax.random.fold_in(key, s), len(outputs))
        draws = [
            weighted_rows(o, typed_like(o, sampled_cotangent, k), 0.5)
            for o, k in zip(outputs, keys, strict=True)
        ]
        columns.append([d / jnp.sqrt(law.num_samples).astype(d.dtype) for d in draws])
    return columns


def kernel(
    law: Law, model: MarkedLoss, params: Any, marks: Sequence[Array], key: Any
) -> Callable[[Sequence[Array]], tuple[Array, ...]]:
    """``t -> K t`` row by row, for tangents of all marks; masked rows give zeros."""
    outputs = model.outputs(marks)

    def exact(output: Output, tangent: Array):
        curved = fisher_product(output.likelihood, output.value, tangent)
        return weighted_rows(output, curved)

    if law.kernel == "exact":

        def curve(moved: Sequence[Array]):
            return [exact(o, t) for o, t in zip(outputs, moved, strict=True)]

    else:
        columns = samples(law, model, params, outputs, key)

        def curve(moved: Sequence[Array]):
            total = [jnp.zeros_like(o.value) for o in outputs]
            for column in columns:
                triples = list(zip(outputs, column, moved, strict=True))
                # Not a sum of products, see fisher_product.
                dots = [jnp.vecdot(as_rows(o, c), as_rows(o, t)) for o, c, t in triples]
                if len({d.shape for d in dots}) == 1:  # of the same rows
                    dots = [sum(dots[1:], dots[0])] * len(dots)
                for i, (o, c, _) in enumerate(triples):
                    total[i] += (as_rows(o, c) * dots[i][:, None]).reshape(c.shape)
            return total

    def apply(tangents: Sequence[Array]):
        moved = model.output_values(tangents)
        return model.cotangents(marks, curve(moved))

    return apply


def roots(
    law: Law, model: MarkedLoss, params: Any, marks: Sequence[Array], key: Any
) -> tuple[int, Callable[[Any, Any], tuple[Array, ...]]]:
    """The columns of the square roots, row by row.

    Returns:
        The number of columns of ``S_n`` and a function ``(n, j) -> cotangents of the
        marks``: column ``j`` of ``S_n`` in row ``n``, zero elsewhere and for rows and
        columns that there are not.
    """
    outputs = model.outputs(marks)
    if law.kernel == "exact":
        count, column = exact_columns(outputs)
    else:
        drawn = samples(law, model, params, outputs, key)
        if len({len(as_rows(o, o.value)) for o in outputs}) > 1:
            # Rows of one number in two outputs are not those of one example.
            drawn = [
                [c if i == k else jnp.zeros_like(c) for i, c in enumerate(draw)]
                for draw in drawn
                for k in range(len(outputs))
            ]
        stacks = [jnp.stack(values) for values in zip(*drawn, strict=True)]
        count = len(drawn)
        column = lambda j: [jnp.take(s, j, axis=0) for s in stacks]  # noqa: E731

    def at(n: Any, j: Any):
        values = []
        for output, value in zip(outputs, column(j), strict=True):
            rows = as_rows(output, value)
            here = jnp.arange(len(rows))[:, None] == n
            values.append(jnp.where(here, rows, 0).reshape(value.shape))
        return model.cotangents(marks, values)

    return count, at


def exact_columns(
    outputs: Sequence[Output],
) -> tuple[int, Callable[[Any], list[Array]]]:
    """The columns of a root of ``Λ``: those of every output, one after the other."""
    found = [square_root_column(o.likelihood, o.value) for o in outputs]

    def column(j: Any) -> list[Array]:
        first, values = 0, []
        for output, (columns, of) in zip(outputs, found, strict=True):
            inside = (j >= first) & (j < first + columns)
            value = of(jnp.clip(j - first, 0, columns - 1))
            values.append(weighted_rows(output, jnp.where(inside, value, 0), 0.5))
            first += columns
        return values

    return sum(columns for columns, _ in found), column
