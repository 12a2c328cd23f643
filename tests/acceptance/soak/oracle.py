"""What a long run must have come to, kept on the host in float64 from the papers.

One ``Oracle`` follows one optimiser: which batches it must have refused, its clocks in
Python's integers, moving averages of the statistics it was given, and what its inverses
must be of. Nothing here calls the library.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.acceptance.soak.record import Step

DAMPED = ("cholesky", "newton_schulz")


class Oracle:
    """Averages and clocks of one optimiser, from the statistics it accepted.

    Attributes:
        wrong: what differed from the optimiser's own clocks, in words.
    """

    def __init__(
        self, names: Sequence[str], inverse: str, decay: float, start: int, rule: Any
    ) -> None:
        """Starts with nothing seen."""
        self.names, self.inverse, self.decay, self.rule = names, inverse, decay, rule
        self.count, self.skipped = start, 0
        n = len(names)
        self.due, self.idle = [True] * n, [False] * n
        self.last_refresh, self.last_inverse = [0] * n, [0] * n
        self.refreshes, self.inversions = [0] * n, [0] * n
        self.inverse_damping = [np.float32(0)] * n
        self.weight = [0.0] * n
        self.sums: list[Any] = [None] * n
        self.inverted: list[Any] = [None] * n
        self.wrong: list[str] = []

    def follow(self, step: Step, damping: float, inverse_interval: int) -> bool:
        """Takes the step that the optimiser took, and compares the clocks."""
        given = [s for s, due in zip(step.statistics, self.due, strict=True) if due]
        sound = [step.squares, *(matrix for pair in given for matrix in pair)]
        accepted = all(np.isfinite(array).all() for array in sound)
        self.compare("due", step.due, self.due)
        if accepted:
            self.count += 1
            self.refresh(step)
            self.invert(step, np.float32(damping), inverse_interval)
            self.due = self.next_due(step)
        else:
            self.skipped += 1
        self.compare("count", step.count, self.count)
        self.compare("skipped", step.skipped, self.skipped)
        for name in ("last_refresh", "last_inverse", "refreshes", "inversions"):
            self.compare(name, getattr(step, name), getattr(self, name))
        return accepted

    def compare(self, name: str, seen: Any, wanted: Any) -> None:
        """Notes a difference; the first few are enough."""
        if not np.array_equal(seen, wanted) and len(self.wrong) < 20:
            self.wrong.append(f"count {self.count}: {name} {seen}, wanted {wanted}")

    def refresh(self, step: Step) -> None:
        """``S ← d S + (1 − d) X`` and ``w ← d w + (1 − d)`` of the layers due.

        But for those that no gradient has reached: they stay due.
        """
        for i, pair in enumerate(step.statistics):
            self.idle[i] = self.due[i] and not np.any(pair[1])
            if not self.due[i] or self.idle[i]:
                continue
            fresh = [(1 - self.decay) * np.asarray(x, np.float64) for x in pair]
            old = self.sums[i] or [0.0, 0.0]
            self.sums[i] = [self.decay * s + f for s, f in zip(old, fresh, strict=True)]
            self.weight[i] = self.decay * self.weight[i] + (1 - self.decay)
            self.last_refresh[i] = self.count
            self.refreshes[i] += 1

    def invert(self, step: Step, damping: np.float32, inverse_interval: int) -> None:
        """Notes what each layer is inverted from, where it is time."""
        for i in range(len(self.names)):
            last = self.last_inverse[i]
            stale = self.last_refresh[i] > last or last == 0
            if self.inverse in DAMPED:
                stale |= bool(self.inverse_damping[i] != damping)
            first = self.refreshes[i] == 1 and self.last_refresh[i] == self.count
            ready = last == 0 or first or self.count - last >= inverse_interval
            if not stale or not ready:
                continue
            if step.failed[i]:
                continue
            self.last_inverse[i] = self.count
            self.inversions[i] += 1
            self.inverse_damping[i] = damping
            self.inverted[i] = (*self.factors(i), float(damping))

    def factors(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The bias-corrected averages of layer ``i``."""
        a, g = (s / self.weight[i] for s in self.sums[i])
        return a, g

    def next_due(self, step: Step) -> list[bool]:
        """Which layers are refreshed next, in exact arithmetic.

        A fixed period is the oracle's own; an adaptive interval is the one that the
        optimiser chose.
        """
        following = self.count + 1
        found = []
        for i, chosen in enumerate(step.interval):
            every = self.rule.period if self.rule.kind == "every" else int(chosen)
            last = self.last_refresh[i]
            named = last == 0 or following - last >= every
            if self.rule.multiple:
                named = following == 1 or following % every == 0
            found.append(named or self.idle[i])
        return found


# ---------------------------------------------------------------------- comparing


def relative(seen: Any, wanted: Any) -> float:
    """``max |seen − wanted| / max |wanted|``."""
    scale = np.abs(wanted).max()
    return float(np.abs(np.float64(seen) - wanted).max() / scale) if scale else 0.0


def factor_errors(seen: Any, wanted: np.ndarray) -> dict[str, float]:
    """Distances of a moving average from the oracle, symmetry and positivity."""
    matrix = np.float64(seen)
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    top = max(eigenvalues[-1], np.finfo(np.float64).tiny)
    return {
        "factor": relative(seen, wanted),
        "asymmetry": relative(matrix.T, matrix),
        "negative": float(max(0.0, -eigenvalues[0] / top)),
    }


def inverse_errors(cached: Any, inverted: tuple) -> dict[str, float]:
    """How far a cached inverse is from what it was made of.

    Explicit inverses: ``‖M X − I‖ / (‖M‖ ‖X‖)`` with ``M`` the damped factor (Higham,
    2002, Sec. 14.1); eigenbases: ``Q diag(d) Qᵀ`` against the factor; low-rank ones:
    trace, and Ritz values, which may not exceed the eigenvalues. Of the bases also
    ``max |UᵀU − I|``.
    """
    a, g, damping = inverted
    if hasattr(cached, "u_a"):
        sides = ((cached.u_a, cached.e_a, cached.tau_a, a),)
        sides += ((cached.u_g, cached.e_g, cached.tau_g, g),)
        return largest([low_rank_errors(*side) for side in sides])
    if hasattr(cached, "q_a"):
        sides = (cached.q_a, cached.d_a, a), (cached.q_g, cached.d_g, g)
        return largest([eigen_errors(*side) for side in sides])
    trace_a, trace_g = np.trace(a) / len(a), np.trace(g) / len(g)
    proper = trace_a > 0 and trace_g > 0
    pi = np.sqrt(trace_a / trace_g) if proper else 1.0
    pairs = (cached.a, a, pi * np.sqrt(damping)), (cached.g, g, np.sqrt(damping) / pi)
    return largest([explicit_errors(*pair) for pair in pairs])


def explicit_errors(x: Any, factor: np.ndarray, shift: float) -> dict[str, float]:
    """Residual of an explicit inverse, relative to the norms; and its asymmetry."""
    x, eye = np.float64(x), np.eye(len(factor))
    matrix = factor + shift * eye
    norms = np.linalg.norm(matrix, 2) * np.linalg.norm(x, 2)
    values = np.linalg.eigvalsh((x + x.T) / 2)
    return {
        "inverse": float(np.linalg.norm(matrix @ x - eye, 2) / norms),
        "inverse_asymmetry": relative(x.T, x),
        "inverse_negative": float(max(0.0, -values[0] / values[-1])),
    }


def eigen_errors(q: Any, d: Any, factor: np.ndarray) -> dict[str, float]:
    """An eigendecomposition against the factor."""
    q, d = np.float64(q), np.float64(d)
    gram = q.T @ q - np.eye(len(q))
    return {
        "inverse": relative((q * d) @ q.T, factor) if factor.any() else 0.0,
        "basis": float(np.abs(gram).max()),
    }


def low_rank_errors(u: Any, e: Any, tau: Any, factor: np.ndarray) -> dict[str, float]:
    """Trace, Ritz values and basis of a low-rank factor; of a whole one, all of it."""
    u, e = np.float64(u), np.float64(e)
    if u.shape[0] == u.shape[1]:
        return eigen_errors(u, e, factor)
    trace = np.trace(factor)
    values = np.sort(np.linalg.eigvalsh(factor))[::-1][: len(e)]
    kept = e.sum() + float(tau) * (len(u) - len(e))
    excess = (np.sort(e)[::-1] - values).max()
    gram = u.T @ u - np.eye(len(e))
    return {
        "trace": abs(kept - trace) / trace if trace else 0.0,
        "ritz": max(0.0, excess / trace) if trace else 0.0,
        "basis": float(np.abs(gram).max()),
    }


def largest(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each figure; a NaN stays."""
    found: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            found[name] = float(np.maximum(found.get(name, 0.0), value))
    return found
