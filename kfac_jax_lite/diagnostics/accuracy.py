"""The averaged factors on the host, in float64: spectra, ranks, errors of inverses.

For tables and diagnosis, not for a training step.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    chosen: dict[str, Any] = {}
    for one in kronecker_layers(layers, the_state(opt_state)):
        sides = zip(one.bases, one.statistics, one.forms, strict=False)
        chosen[one.layer.name] = tuple(
            enough(values.reshape(-1, factor.shape[-1]), form, retained_trace)
            for (_, values), factor, form in sides
        )
    return chosen


def enough(values: np.ndarray, form: forms.Form, share: float) -> int:
    """How many of the largest eigenvalues ``[.., d]`` make up that share of the sum."""
    if not form.matrix:
        return 1
    values = np.sort(values, -1)[..., ::-1]
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
    for one in kronecker_layers(layers, state):
        (_, a), (_, g) = one.bases
        curvature = a[..., :, None] * g[..., None, :]
        shifted_a, shifted_g, shift = one.shifted(a, g, damping)
        damped = shifted_a[..., :, None] * shifted_g[..., None, :] + shift
        rng, errors = np.random.default_rng(0), []
        for white in (False, True):
            squares = np.zeros(2)
            for _ in range(PROBES):
                v = rng.normal(size=(*a.shape[:-1], *one.layer.sizes))
                v = v if white else one.scaled(v, np.sqrt(curvature))
                wanted = one.scaled(v, 1 / damped)
                seen = one.preconditioned(v, damping)
                squares += np.sum((seen - wanted) ** 2), np.sum(wanted**2)
            errors.append(float(np.sqrt(squares[0] / squares[1])))
        record: dict[str, Any] = {"name": one.layer.name}
        for side in ("a", "g"):
            factor = getattr(one.statistics, side)
            kept = getattr(one.inverse, f"e_{side}", factor)
            record[f"rank_{side}"] = kept.shape[-1]
            record[f"retained_trace_{side}"] = 1.0
        record |= retained_traces(one.inverse)
        records.append(record | {"error": errors[0], "error_white": errors[1]})
    return records


def retained_traces(inverse: Any) -> dict[str, float]:
    """Shares of the traces that low-rank inverses keep; copies small arrays only."""
    if not isinstance(inverse, LowRankInverses):
        return {}
    found = {}
    for side in ("a", "g"):
        u, e, tau = (getattr(inverse, f"{k}_{side}") for k in ("u", "e", "tau"))
        size = e.shape[-1] if isinstance(u, tuple) else u.shape[-2]
        e, tau = jax.device_get((e, tau))
        found[f"retained_trace_{side}"] = retained_trace(e, tau, size)
    return found


class Damped(NamedTuple):
    """Eigenvalues of a damped block, what its inverse divides by; ``[*blocks]``."""

    low: Any
    mean: Any
    high: Any
    condition: Any  # of what is inverted: the worse damped factor, or the block


class Factors:
    """A Kronecker layer's averaged factors and cached inverse, whole, on one device."""

    def __init__(self, layer: LayerTag, state: Any):
        record = state.factors[layer.name], state.inverses[layer.name]
        statistics, inverse = jax.tree.map(jnp.asarray, jax.device_get(record))
        layer = kept_layer(layer, inverse)
        statistics = unpacked(layer, statistics)
        plan = plan_of(layer, statistics, inverse)
        if plan is not None:
            statistics = whole_statistics(layer, statistics)
            if plan.sliced(layer.name):
                inverse = undivided(layer, inverse)
        self.layer, self.statistics, self.inverse = layer, statistics, inverse
        self.forms = forms.forms_of(layer)
        self.split = isinstance(inverse, FactorInverses)  # damping, over both factors
        clock, damping = jax.device_get((state.clock, state.damping))
        index = sorted(state.factors).index(layer.name)
        # In force; 0 before the first inversion.
        self.damping = float(clock.inverse_damping[index] if self.split else damping)
        self.refreshes = int(clock.refreshes[index])
        self.eps = float(np.finfo(statistics.a.dtype).eps)
        rest = max(1 - float(clock.weight[index]), self.eps)
        decay = min(rest ** (1 / max(self.refreshes, 1)), 1 - self.eps)
        # Refreshes that the average is worth once it has filled up, see report.memory.
        self.memory = (1 + decay) / (1 - decay)

    @functools.cached_property
    def bases(self) -> tuple[tuple[np.ndarray | None, np.ndarray], ...]:
        """``eigen`` of both factors."""
        return tuple(map(eigen, self.statistics[:2], self.forms))

    @functools.cached_property
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """``eigenvalues`` of both factors."""
        a, g = map(eigenvalues, self.statistics[:2], self.forms, self.layer.sizes)
        return a, g

    @property
    def diagonals(self) -> tuple[np.ndarray, ...]:
        """The diagonals of both factors, ``[*blocks, size]``."""
        sides = zip(self.statistics[:2], self.forms, self.layer.sizes, strict=True)
        return tuple(diagonal(np.asarray(x, float), f)[..., :n] for x, f, n in sides)

    @functools.cached_property
    def damped(self) -> Damped | None:
        """The spectrum of the damped block; None without damping."""
        if self.damping <= 0:
            return None
        a, g, shift = self.shifted(*self.values, self.damping)
        low, high = (a[..., i] * g[..., i] + shift for i in (0, -1))
        condition = high / low
        if self.split:
            of_a, of_g = (x[..., -1] / x[..., 0] for x in (a, g))
            condition = np.maximum(of_a, of_g)
        return Damped(low, a.mean(-1) * g.mean(-1) + shift, high, condition)

    def shifted(
        self, a: np.ndarray, g: np.ndarray, damping: float
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """``(α, γ, s)`` of which the damped block has the eigenvalues ``α_i γ_j + s``.

        ``s = λ``, or 0 where ``α + π√λ`` and ``γ + √λ/π`` hold the damping (see
        ``kfac_jax_lite.damping.split``).
        """
        if not self.split:
            return a, g, damping
        sides = zip((a, g), self.layer.sizes, strict=True)
        mean_a, mean_g = (x.sum(-1, keepdims=True) / size for x, size in sides)
        proper = (mean_a > 0) & (mean_g > 0)
        pi = np.sqrt(np.where(proper, mean_a, 1) / np.where(proper, mean_g, 1))
        return a + pi * np.sqrt(damping), g + np.sqrt(damping) / pi, 0.0

    def scaled(self, v: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Multiplies in the eigenbases."""
        sizes = zip(scales.shape[-2:], v.shape[-2:], strict=True)
        missing = [(0, wide - size) for wide, size in sizes]
        v = np.pad(v, [(0, 0)] * (v.ndim - 2) + missing)
        (q_a, _), (q_g, _) = self.bases
        v = rows(rows(v, q_g).mT, q_a).mT * scales
        v = rows(rows(v, q_g, True).mT, q_a, True).mT
        return v[..., : self.layer.sizes[0], : self.layer.sizes[1]]

    def preconditioned(self, v: np.ndarray, damping: float) -> np.ndarray:
        """What the optimiser makes of a gradient, in the precision of the state."""
        dtype = jax.tree.leaves(self.inverse)[0].dtype
        own, value = jnp.asarray(v, dtype), jnp.asarray(damping, dtype)
        u = precondition(self.layer, own, self.statistics, self.inverse, value)
        return np.asarray(u, np.float64)


def eigen(factor: Any, form: forms.Form) -> tuple[np.ndarray | None, np.ndarray]:
    """``(Q, d)`` in float64 with ``Q [*blocks, k, s, s]``, ``d [*blocks, k s]`` ≥ 0.

    ``Q`` is None for the identity.
    """
    factor = np.asarray(factor, np.float64)
    if not form.matrix:
        return None, np.maximum(factor, 0)
    d, q = np.linalg.eigh(factor)
    blocks, size = factor.shape[: factor.ndim - form.axes], factor.shape[-1]
    return q.reshape(*blocks, -1, size, size), np.maximum(d, 0).reshape(*blocks, -1)


def eigenvalues(factor: Any, form: forms.Form, size: int) -> np.ndarray:
    """Ascending, not below 0, ``[*blocks, size]`` in float64.

    Blocks are filled up with rows of zeros; their eigenvalues are left out.
    """
    values = np.sort(eigen(factor, form)[1], -1)
    return values[..., values.shape[-1] - size :]


def diagonal(factor: np.ndarray, form: forms.Form) -> np.ndarray:
    """A factor's diagonal, ``[*blocks, width]``."""
    if not form.matrix:
        return factor
    blocks = factor.shape[: factor.ndim - form.axes]
    return np.diagonal(factor, axis1=-2, axis2=-1).reshape(*blocks, -1)


def rows(x: np.ndarray, q: np.ndarray | None, back: bool = False) -> np.ndarray:
    """``x Q`` for rows, or ``x Qᵀ``, block by block."""
    if q is None:
        return x
    split = x.reshape(*x.shape[:-1], *q.shape[-3:-1]).swapaxes(-3, -2)
    return (split @ (q.mT if back else q)).swapaxes(-3, -2).reshape(x.shape)


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


def kronecker_layers(layers: Sequence[LayerTag], state: Any) -> Iterator[Factors]:
    """Kronecker layers of a state; weights of zero width have no entries."""
    for layer in layers:
        if layer.kronecker and layer.name in state.factors and 0 not in layer.sizes:
            yield Factors(layer, state)
