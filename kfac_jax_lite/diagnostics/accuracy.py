"""How much of the factors low-rank inverses keep, and what they leave out.

On the host, in float64, layer by layer; for tables and for choosing ranks, not for a
training step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.pytree import find_states
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.distributed.layout import (
    kept_layer,
    plan_of,
    undivided,
    unpacked,
    whole_statistics,
)
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import FactorInverses
from kfac_jax_lite.kronecker.low_rank import LowRankInverses, retained_trace
from kfac_jax_lite.kronecker.precondition import precondition

# Random gradients on which the error of an inverse is measured.
PROBES = 4


def choose_ranks(
    layers: Sequence[LayerTag], opt_state: Any, retained_trace: float = 0.95
) -> dict[str, tuple[int, int]]:
    """The fewest eigenpairs that keep a share of the trace of every factor.

    From the eigenvalues of the averaged factors, whatever the method that the state is
    of. Of a factor that holds several matrices the one that needs most decides; layers
    of equal shape may get different ranks and are then inverted apart.

    Args:
        layers: ``tagged.layers``.
        opt_state: Any optax state that contains a ``KFACState`` that has taken a step.
        retained_trace: The share, in (0, 1].

    Returns:
        Layer name to ``(r of A, r of G)``, for ``kfac.low_rank``; a factor kept as its
        diagonal counts as 1.

    Raises:
        ValueError: The share is out of range; there is no ``KFACState``, or it has seen
            no statistics.
    """
    if not 0 < retained_trace <= 1:
        raise ValueError(f"retained_trace must be in (0, 1], got {retained_trace!r}.")
    chosen = {}
    for layer, statistics, _ in kronecker_layers(layers, the_state(opt_state)):
        sides = zip(statistics[:2], forms.forms_of(layer), strict=True)
        a, g = (enough(eigen(x, form)[1], form, retained_trace) for x, form in sides)
        chosen[layer.name] = (a, g)
    return chosen


def enough(values: np.ndarray, form: forms.Form, share: float) -> int:
    """How many of the largest eigenvalues ``[.., d]`` make up that share of the sum."""
    if not form.matrix:
        return 1
    values = np.sort(values.reshape(-1, values.shape[-1]), -1)[:, ::-1]
    wanted = share * (1 - 1e-12) * values.sum(-1, keepdims=True)
    reached = np.cumsum(values, -1) >= wanted
    return int(reached.argmax(-1).max()) + 1


def inverse_error(layers: Sequence[LayerTag], opt_state: Any) -> list[dict[str, Any]]:
    """What the cached inverses do to gradients, against exact inverses in float64.

    ``‖u − u_exact‖ / ‖u_exact‖`` in the Frobenius norm, over ``PROBES`` random
    gradients: ``"error"`` for gradients as the factors expect them, ``A^½ Z G^½`` with
    ``Z`` standard normal; ``"error_white"`` for ``Z`` itself, most of which lies where
    the curvature is least. ``u_exact`` is the inverse of the averaged factors with the
    damping that the method wants: split over both for explicit inverses, else
    ``(A ⊗ G + λ I)⁻¹``, which EKFAC departs from on purpose. Between two inversions the
    error of an inverse that is out of date is part of it.

    Args:
        layers: ``tagged.layers``.
        opt_state: Any optax state that contains a ``KFACState`` that has taken a step.

    Returns:
        A record per Kronecker layer: ``name``, ``rank_a``, ``rank_g`` (eigenpairs kept;
        the size if all are), ``retained_trace_a``, ``retained_trace_g`` (their share of
        the trace), ``error``, ``error_white``.

    Raises:
        ValueError: There is no ``KFACState``, or it has taken no step.
    """
    state, records = the_state(opt_state), []
    damping = float(jax.device_get(state.damping))
    for layer, statistics, inverse in kronecker_layers(layers, state):
        exact = Exact(layer, statistics, isinstance(inverse, FactorInverses), damping)
        rng, errors = np.random.default_rng(0), []
        for white in (False, True):
            squares = np.zeros(2)
            for _ in range(PROBES):
                v = exact.gradient(rng.normal(size=exact.shape), white)
                wanted = exact.solve(v)
                seen = applied(layer, v, statistics, inverse, damping)
                squares += np.sum((seen - wanted) ** 2), np.sum(wanted**2)
            errors.append(float(np.sqrt(squares[0] / squares[1])))
        records.append(
            {
                "name": layer.name,
                **kept(layer, inverse),
                "error": errors[0],
                "error_white": errors[1],
            }
        )
    return records


class Exact:
    """The damped inverse of a layer's factors, in float64, by eigendecomposition."""

    forms: tuple[Any, Any]
    sizes: tuple[int, int]
    q_a: np.ndarray | None
    q_g: np.ndarray | None
    d_a: np.ndarray
    d_g: np.ndarray
    shape: tuple[int, ...]
    scales: np.ndarray

    def __init__(self, layer: LayerTag, statistics: Any, damped: bool, damping: float):
        """Decomposes both factors.

        Args:
            damping: ``λ``.
        """
        self.forms, self.sizes = forms.forms_of(layer), layer.sizes
        self.q_a, d_a = eigen(statistics.a, self.forms[0])
        self.q_g, d_g = eigen(statistics.g, self.forms[1])
        self.d_a, self.d_g = map(flat, (d_a, d_g), self.forms)
        self.shape = (*self.d_a.shape[:-1], *layer.sizes)
        d_a, d_g = self.d_a[..., :, None], self.d_g[..., None, :]
        self.scales = d_a * d_g + damping
        if damped:
            mean_a = self.d_a.sum(-1)[..., None, None] / layer.sizes[0]
            mean_g = self.d_g.sum(-1)[..., None, None] / layer.sizes[1]
            proper = (mean_a > 0) & (mean_g > 0)
            pi = np.where(proper, mean_a, 1) / np.where(proper, mean_g, 1)
            root = np.sqrt(damping)
            self.scales = (d_a + np.sqrt(pi) * root) * (d_g + root / np.sqrt(pi))

    def gradient(self, normal: np.ndarray, white: bool) -> np.ndarray:
        """``A^½ Z G^½``, or ``Z`` itself."""
        if white:
            return normal
        scales = np.sqrt(self.d_a)[..., :, None] * np.sqrt(self.d_g)[..., None, :]
        return self.scaled(normal, scales)

    def solve(self, v: np.ndarray) -> np.ndarray:
        """The exact preconditioned gradient."""
        return self.scaled(v, 1 / self.scales)

    def scaled(self, v: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Multiplies in the eigenbases."""
        sizes = zip(scales.shape[-2:], v.shape[-2:], strict=True)
        missing = [(0, wide - size) for wide, size in sizes]
        v = np.pad(v, [(0, 0)] * (v.ndim - 2) + missing)
        v = rows(rows(v, self.q_g, self.forms[1]).mT, self.q_a, self.forms[0]).mT
        v, back_a, back_g = v * scales, back(self.q_a), back(self.q_g)
        v = rows(rows(v, back_g, self.forms[1]).mT, back_a, self.forms[0]).mT
        return v[..., : self.sizes[0], : self.sizes[1]]


def eigen(factor: Any, form: forms.Form) -> tuple[np.ndarray | None, np.ndarray]:
    """``(Q, d)`` in float64, ``d`` not below 0; None for the identity."""
    factor = np.asarray(factor, np.float64)
    if not form.matrix:
        return None, np.maximum(factor, 0)
    d, q = np.linalg.eigh(factor)
    return q, np.maximum(d, 0)


def flat(d: np.ndarray, form: forms.Form) -> np.ndarray:
    """Eigenvalues of all blocks of a factor in one row."""
    return d.reshape(*d.shape[:-2], -1) if form is forms.BLOCKS else d


def back(q: np.ndarray | None) -> np.ndarray | None:
    """``Qᵀ``."""
    return None if q is None else q.mT


def rows(x: np.ndarray, q: np.ndarray | None, form: forms.Form) -> np.ndarray:
    """``x Q`` for rows, block by block."""
    if q is None:
        return x
    if form.whole:
        return x @ q
    parts = x.reshape(*x.shape[:-1], *q.shape[-3:-1])
    return np.einsum("...rki,...kij->...rkj", parts, q).reshape(x.shape)


def applied(
    layer: LayerTag, v: np.ndarray, statistics: Any, inverse: Any, damping: float
) -> np.ndarray:
    """What the optimiser makes of a gradient, in the precision of the state."""
    dtype = jax.tree.leaves(inverse)[0].dtype
    u = precondition(
        layer, jnp.asarray(v, dtype), statistics, inverse, jnp.asarray(damping, dtype)
    )
    return np.asarray(u, np.float64)


def kept(layer: LayerTag, inverse: Any) -> dict[str, Any]:
    """Ranks of a layer's cached inverse, and shares of the trace."""
    record: dict[str, Any] = {}
    for side, shape in (("a", layer.a_shape), ("g", layer.g_shape)):
        record[f"rank_{side}"] = shape[-1]
        record[f"retained_trace_{side}"] = 1.0
        if isinstance(inverse, LowRankInverses):
            e = np.asarray(getattr(inverse, f"e_{side}"))
            record[f"rank_{side}"] = e.shape[-1]
            tau = getattr(inverse, f"tau_{side}")
            record[f"retained_trace_{side}"] = retained_trace(e, tau, shape[-1])
    return record


def the_state(opt_state: Any) -> Any:
    """The ``KFACState`` inside an optax state, which has taken a step."""
    states = find_states(opt_state)
    if len(states) != 1:
        raise ValueError(
            f"opt_state ({type(opt_state).__name__}) contains {len(states)} "
            "KFACStates, wanted one."
        )
    if not int(states[0].count):
        raise ValueError("opt_state has taken no step yet: there are no factors.")
    return states[0]


def kronecker_layers(
    layers: Sequence[LayerTag], state: Any
) -> Iterator[tuple[LayerTag, Any, Any]]:
    """Layers with their factors and cached inverses, whole and on one device.

    Weights of zero width have no entries and are left out.

    Yields:
        ``(layer, statistics, inverse)``.
    """
    for layer in layers:
        if not layer.kronecker or layer.name not in state.factors:
            continue
        if 0 in layer.sizes:
            continue
        record = state.factors[layer.name], state.inverses[layer.name]
        # On one device, whatever the state was placed on.
        host = jax.device_get(record)
        statistics, inverse = jax.tree.map(jnp.asarray, host)
        layer = kept_layer(layer, inverse)
        statistics = unpacked(layer, statistics)
        plan = plan_of(layer, statistics, inverse)
        if plan is not None:
            statistics = whole_statistics(layer, statistics)
            if plan.sliced(layer.name):
                inverse = undivided(layer, inverse)
        yield layer, statistics, inverse
