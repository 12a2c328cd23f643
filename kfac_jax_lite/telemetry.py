"""``report``: what the optimiser did, layer by layer, as plain host-side records."""

from typing import Any

import jax
import numpy as np

from kfac_jax_lite.eigenpairs import LowRankInverses, retained_trace
from kfac_jax_lite.factors.state import from_words
from kfac_jax_lite.tree import find_states


def report(opt_state: Any) -> list[dict[str, Any]]:
    """Reads the counters of every ``KFACState`` inside an optax state.

    Args:
        opt_state: Any optax state that contains a ``KFACState``, on device or host.

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

    Raises:
        ValueError: There is no ``KFACState`` in ``opt_state``.
    """
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            f"opt_state ({type(opt_state).__name__}) contains no KFACState."
        )
    records = []
    for state in states:
        small = (state.clock, state.count, state.skipped, state.damping)
        clock, count, skipped, damping = jax.device_get(small)
        totals = (clock.elements, clock.bytes, clock.inversion_bytes, clock.step_bytes)
        rows = zip(*map(from_words, totals), strict=True)
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
                    "diff": diff if np.isfinite(diff) else None,
                    "elements": elements,
                    "elements_reduced": refreshes * elements,
                    "bytes_reduced": refreshes * size,
                    "bytes_if_every_step": int(count) * size,
                    "bytes_inverses": inverted * inversion_size,
                    "bytes_updates": int(count) * step_size,
                    "damping": float(damping),
                    "steps": int(count),
                    "skipped": int(skipped),
                    **traces(state.inverses[name]),
                }
            )
    return records


def traces(inverse: Any) -> dict[str, float]:
    """Shares of the trace that low-rank inverses keep; small arrays travel only."""
    if not isinstance(inverse, LowRankInverses):
        return {}
    found = {}
    for side in ("a", "g"):
        u, e, tau = (getattr(inverse, f"{k}_{side}") for k in ("u", "e", "tau"))
        size = e.shape[-1] if isinstance(u, tuple) else u.shape[-2]
        e, tau = jax.device_get((e, tau))
        found[f"retained_trace_{side}"] = retained_trace(e, tau, size)
    return found
