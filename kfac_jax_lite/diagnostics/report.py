"""``report``: what the optimiser did, layer by layer, as plain host-side records."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kfac_jax_lite.core.linalg import is_known
from kfac_jax_lite.core.pytree import find_states
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.accuracy import (
    diagonal,
    kronecker_layers,
    retained_traces,
)
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import FactorInverses
from kfac_jax_lite.kronecker.state import Clock, from_words

# A weight this many roundings from 1 no longer tells the decay it is made of.
ROUNDINGS = 64


def report(
    opt_state: Any, layers: Sequence[LayerTag] | None = None, spectra: bool = False
) -> list[dict[str, Any]]:
    """Reads the counters of every ``KFACState`` inside an optax state.

    Args:
        opt_state: Any optax state that contains a ``KFACState``, on device or host.
        layers: ``tagged.layers``: adds what needs the factors' layout. The factors are
            then copied to the host.
        spectra: Adds eigenvalues: an eigendecomposition of every factor, on the host,
            in float64. It wants ``layers``.

    Returns:
        One record per layer: ``name``, ``interval`` (steps), ``next_due``,
        ``refreshes``, ``inversions``, ``failures``, ``diff`` (relative change at the
        last refresh, None before there is one), ``elements`` (one refresh),
        ``elements_reduced``, ``bytes_reduced``, ``bytes_if_every_step`` (statistics),
        ``bytes_inverses`` and ``bytes_updates`` (what follows with owners), and of the
        whole: ``damping``, ``steps``, ``skipped``; with ``inverse="low_rank"`` also
        ``retained_trace_a`` and ``retained_trace_g``, the shares of the factors' traces
        that eigenpairs had at the last inversion. Bytes are those of the arrays that
        collectives work on; see ``kfac.traffic`` for what a device sends.

        Of time: ``since_refresh`` and ``since_inversion`` (steps; None before the
        first), ``memory`` (refreshes that the moving average holds, see ``memory``),
        ``inverse_damping`` (what the cached inverse was made with; None where it holds
        none). Of the whole, None where the state has no such part: ``trust`` (``ν`` of
        ``kfac.kfac``), ``retreats`` and ``agreement`` (of an adaptive damping).

        With ``layers``: ``effective_rank_a``, ``effective_rank_g`` (see
        ``effective_rank``; the smallest of a stack; None without Kronecker factors).
        With ``spectra``: ``smallest_a``, ``largest_a``, ``smallest_g``, ``largest_g``,
        the extreme eigenvalues of the averaged factors, and ``condition``, the
        condition number of the damped block, the largest of a stack.

    Raises:
        ValueError: There is no ``KFACState`` in ``opt_state``; ``spectra`` without
            ``layers``.
    """
    check_spectra(layers, spectra)
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            f"opt_state ({type(opt_state).__name__}) contains no KFACState."
        )
    records = []
    for state in states:
        around = wrapping(opt_state, state)
        found = {} if layers is None else factor_records(layers, state, spectra)
        for record in counters(state):
            inverse = state.inverses[record["name"]]
            held = isinstance(inverse, FactorInverses) and record["inverse_damping"]
            record |= around | {"inverse_damping": held or None}
            record |= retained_traces(inverse) | found.get(record["name"], {})
            records.append(record)
    return records


def check_spectra(layers: Sequence[LayerTag] | None, spectra: bool) -> None:
    """Spectra need the layers' forms."""
    if spectra and layers is None:
        raise ValueError("spectra=True wants layers=tagged.layers.")


def counters(state: Any) -> list[dict[str, Any]]:
    """What the clock and the counters of one ``KFACState`` say, layer by layer."""
    small = (state.clock, state.count, state.skipped, state.damping)
    clock, count, skipped, damping = jax.device_get(small)
    totals = (clock.elements, clock.bytes, clock.inversion_bytes, clock.step_bytes)
    rows = zip(*map(from_words, totals), strict=True)
    records = []
    for i, (name, row) in enumerate(zip(sorted(state.factors), rows, strict=True)):
        elements, size, inversion_size, step_size = row
        refreshes, diff = int(clock.refreshes[i]), float(clock.diff[i])
        inverted = int(clock.inversions[i]) + int(clock.failures[i])
        records.append(
            {
                "name": name,
                "interval": int(clock.interval[i]),
                "next_due": bool(clock.due[i]),
                "refreshes": refreshes,
                "inversions": int(clock.inversions[i]),
                "failures": int(clock.failures[i]),
                "diff": diff if is_known(diff) else None,
                "elements": elements,
                "elements_reduced": refreshes * elements,
                "bytes_reduced": refreshes * size,
                "bytes_if_every_step": int(count) * size,
                "bytes_inverses": inverted * inversion_size,
                "bytes_updates": int(count) * step_size,
                "damping": float(damping),
                "steps": int(count),
                "skipped": int(skipped),
                "since_refresh": since(count, clock.last_refresh[i]),
                "since_inversion": since(count, clock.last_inverse[i]),
                "memory": memory(clock, i),
                "inverse_damping": float(clock.inverse_damping[i]),
            }
        )
    return records


def since(count: Any, last: Any) -> int | None:
    """Steps since an event; None if there was none."""
    return int(count) - int(last) if int(last) else None


def memory(clock: Clock, index: int) -> float | None:
    """How many equally weighted refreshes the moving average is worth.

    ``(Σ w_k)² / Σ w_k²`` of the weights ``w_k = (1 − d) dᵏ`` of ``n`` refreshes, which
    is ``(1 − dⁿ)(1 + d) / ((1 − d)(1 + dⁿ))`` (Kish's effective sample size). ``d``
    follows from ``1 − dⁿ``, the clock's ``weight``; once that cannot be told from 1,
    the figure is an upper bound.

    References:
        Kish, 1965, "Survey sampling", Sec. 11.2.
    """
    refreshes, weight = int(clock.refreshes[index]), clock.weight[index]
    if not refreshes:
        return None
    rest = max(1 - float(weight), ROUNDINGS * float(np.finfo(weight.dtype).eps))
    decay = rest ** (1 / refreshes)
    worth = (1 - rest) * (1 + decay) / ((1 - decay) * (1 + rest))
    return float(min(max(worth, 1.0), refreshes))


def wrapping(opt_state: Any, state: Any) -> dict[str, Any]:
    """What the optimiser around a ``KFACState`` knows of its last step."""
    found: dict[str, Any] = {"trust": None, "retreats": None, "agreement": None}
    for chain in find_states(opt_state, "KFACChainState"):
        if chain.kfac is state:
            found["trust"] = float(chain.trust)
    for adapted in find_states(opt_state, "AdaptedState"):
        if any(inner is state for inner in find_states(adapted.inner)):
            agreement = float(adapted.agreement)
            found["retreats"] = int(adapted.retreats)
            found["agreement"] = agreement if is_known(agreement) else None
    return found


def factor_records(
    layers: Sequence[LayerTag], state: Any, spectra: bool
) -> dict[str, dict[str, Any]]:
    """What is read off the averaged factors, by layer name; None for other kinds."""
    ranks = ("effective_rank_a", "effective_rank_g")
    ends = ("smallest_a", "largest_a", "smallest_g", "largest_g", "condition")
    nothing: dict[str, Any] = dict.fromkeys(ranks + ends if spectra else ranks)
    found = {layer.name: dict(nothing) for layer in layers}
    for one in kronecker_layers(layers, state):
        numbers = map(effective_rank, one.statistics[:2], one.forms)
        record = found[one.layer.name] | dict(zip(ranks, numbers, strict=True))
        if spectra:
            values = (float(f(x)) for x in one.values for f in (np.min, np.max))
            record |= dict(zip(ends, values, strict=False))
        if spectra and one.damped is not None:
            record["condition"] = float(np.max(one.damped.high / one.damped.low))
        found[one.layer.name] = record
    return found


def effective_rank(factor: Any, form: forms.Form) -> float:
    """``(tr M)² / ‖M‖_F²``: how many equal eigenvalues would have these moments.

    Between 1 and the rank; no eigenvalues are needed.

    References:
        Bartlett, Long, Lugosi & Tsigler, 2020, arXiv:1906.11300, Def. 3 (``R_0``).
    """
    factor = np.asarray(factor, np.float64)
    trace = diagonal(factor, form).sum(-1)
    square = np.square(factor).sum(tuple(range(-form.axes, 0)))
    some = square > 0
    return float(np.min(np.where(some, trace**2 / np.where(some, square, 1), 0.0)))
