"""Memory of a process, and what the samples of the soak say."""

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Largest errors allowed. Averages and inverses are float32, whose unit roundoff is
# 6e-8; an inverse's error is relative to its norm and its matrix's. A Newton-Schulz
# inverse stops at 1e-5.
BOUNDS = {
    "factor": 1e-5,
    "asymmetry": 1e-6,
    "negative": 1e-6,
    "inverse": 1e-4,
    "inverse_asymmetry": 1e-3,
    "inverse_negative": 1e-6,
    "basis": 1e-4,
    "trace": 1e-5,
    "ritz": 1e-5,
}
MEGABYTES, SLOWER = 8.0, 1.3


class Memory:
    """What this process holds."""

    def now(self) -> dict[str, float]:
        """Resident megabytes (0 where the system does not say) and live arrays."""
        gc.collect()
        return {"rss_mb": resident_bytes() / 1e6, "arrays": len(jax.live_arrays())}


def resident_bytes() -> int:
    """Resident memory of this process, from Linux's ``/proc``; else 0."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(samples: Sequence[Mapping[str, Any]], field: str) -> float:
    """Growth of a field over the second half of the samples, by least squares."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return 0.0
    steps = np.array([s["step"] for s in half], np.float64)
    values = np.array([s[field] for s in half], np.float64)
    return float(np.polyfit(steps, values, 1)[0] * (steps[-1] - steps[0]))


def verdicts(
    samples: Sequence[Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Judges a run.

    Of speed, the fastest sample's first decile of step times in either quarter: other
    work on the machine makes steps slower, never faster.
    """
    first, last = (
        samples[: len(samples) // 4 or 1],
        samples[-(len(samples) // 4 or 1) :],
    )

    def worst(part: Sequence[Mapping[str, Any]], name: str) -> float:
        found = [s["errors"][name] for s in part if name in s["errors"]]
        return float(np.max(found)) if found else 0.0

    judged: dict[str, dict[str, Any]] = {}

    def judge(name: str, good: bool, what: str, **numbers: Any) -> None:
        judged[name] = {"good": bool(good), "what": what, **numbers}

    complaints = sum(len(r["wrong"]) for r in records.values())
    judge("clocks, refusals, checkpoints", not complaints, f"{complaints} complaints")
    for name, bound in BOUNDS.items():
        seen, early, late = (worst(part, name) for part in (samples, first, last))
        text = f"{seen:.1e}, at first {early:.1e}, at last {late:.1e}"
        judge(name, seen <= bound, text, largest=seen, first=early, last=late,
              bound=bound)  # fmt: skip
    grown = slope(samples, "rss_mb")
    judge("memory", grown < MEGABYTES, f"{grown:.2f} MB in the second half", mb=grown)
    counts = [s["arrays"] for s in samples]
    more = slope(samples, "arrays")
    judge("live arrays", more < 1, f"{min(counts)} to {max(counts)}", slope=more)
    anew = samples[-1]["compiled"] - samples[0]["compiled"]
    judge("compilations", anew == 0, f"{anew} after the first sample", count=anew)
    early, late = (min(s["fast_ms"] for s in part) for part in (first, last))
    text = f"{early:.3g} ms per step at first, {late:.3g} at last"
    judge("speed", late < SLOWER * early, text, first=early, last=late)
    return judged
