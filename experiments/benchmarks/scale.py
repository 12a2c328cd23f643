"""How the cost of a step grows with width, depth, batch and classes of a network.

    python -m experiments.benchmarks.scale --out experiments/benchmarks/results

One axis at a time, from the same network of dense layers as wide as its input: AdamW,
kfac-jax and this package, K-FAC with statistics every 10 and inverses every 100 steps.
All rows of a point are measured in turn. The line through the logarithms of size and
milliseconds has the exponent as its slope. An axis ends early where a step would take
longer than a limit, or its time is over; the result says so.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from experiments.benchmarks.common import (
    OUT,
    amortised,
    begin,
    import_peer,
    kind_medians,
    parse,
    text_table,
    write_json,
)
from experiments.benchmarks.jobs import Job, optax_job, ours_job, peer_job
from experiments.benchmarks.networks import Problem, Spec, make_problem
from experiments.benchmarks.step_time import make_jobs, measure
from experiments.models.networks import MLP
from experiments.progress import ended
from kfac_jax_lite.kronecker.inverses import METHODS

BASELINE, RATE = "AdamW", 1e-3
INTERVALS = (10, 100)
AMORTISED = "amortised"
COLOURS = {
    "AdamW": "#0072b2",
    "kfac-jax": "#009e73",
    "ours cholesky": "#d55e00",
    "ours low_rank": "#cc79a7",
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Cost of a step against width, depth, batch and classes, with exponents."""

    width: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Widths of input and hidden layers."""
    depth: tuple[int, ...] = (4, 16, 64)
    """Numbers of dense layers."""
    batch: tuple[int, ...] = (64, 512, 4096)
    """Batch sizes."""
    classes: tuple[int, ...] = (10, 100, 1000, 10000)
    """Widths of the output."""
    base: tuple[int, int, int, int] = (512, 4, 256, 10)
    """Width, depth, batch and classes of what does not vary."""
    methods: tuple[str, ...] = ("cholesky", "low_rank")
    """Our inverses; those that this version lacks are left out."""
    rounds: int = 5
    """Steps of each kind that count."""
    limit: float = 8.0
    """Longest step in seconds; an axis ends before a point that would exceed it."""
    minutes: float = 2.4
    """Time of an axis; no further point is begun after it."""
    without_peer: bool = False
    """Leave kfac-jax out."""
    out: Path = OUT
    """Folder of the result."""


AXES = ("width", "depth", "batch", "classes")


def problem_at(width: int, depth: int, batch: int, classes: int) -> Problem:
    """A network of dense layers with random data."""
    hidden = (width,) * (depth - 1)
    return make_problem("mlp", Spec(lambda: MLP(hidden, classes), (batch, width)))


def job_makers(problem: Problem, config: Scale) -> dict[str, Callable[[], Job]]:
    adamw = optax.adamw(RATE)
    makers: dict[str, Callable[[], Job]] = {
        BASELINE: lambda: optax_job(BASELINE, adamw, problem)
    }
    peer, _ = import_peer()
    if peer is not None and not config.without_peer:
        makers["kfac-jax"] = lambda: dataclasses.replace(
            peer_job(problem, peer, *INTERVALS), name="kfac-jax"
        )
    for method in config.methods:
        if method in METHODS:
            makers[f"ours {method}"] = lambda method=method: dataclasses.replace(
                ours_job(problem, *INTERVALS, "mc", method), name=f"ours {method}"
            )
    return makers


def measure_point(config: Scale, sizes: Sequence[int]) -> dict[str, Any]:
    jobs, failed = make_jobs(job_makers(problem_at(*sizes), config))
    samples = measure(jobs, config.rounds)
    rows = {}
    for job in jobs:
        flat = sum(samples[job.name], [])
        kinds = {k: 1e3 * s for k, s in kind_medians(flat).items()}
        kinds[AMORTISED] = 1e3 * amortised(flat, job.cycle)
        rows[job.name] = {"ms": kinds, "compile_seconds": job.compile_seconds(flat)}
        rows[job.name]["state_mb"] = job.state_mb
    jax.clear_caches()
    return {"rows": rows, "failed": failed}


def work(width: int, depth: int, batch: int, classes: int) -> float:
    """Operations of K-FAC's longest step, to tell when a point would take too long."""
    outputs = [width] * (depth - 1) + [classes]
    total = 0.0
    for g in outputs:
        a = width
        total += 10 / 3 * (a**3 + g**3) + 2 * batch * (a * a + g * g)
        total += 6 * batch * a * g + 2 * a * g * (a + g)
    return total


def slowest(point: dict[str, Any]) -> float:
    """Seconds of the longest step of a point."""
    return max(max(row["ms"].values()) for row in point["rows"].values()) / 1e3


def measure_axis(config: Scale, axis: str) -> dict[str, Any]:
    """Measures the points of an axis, as far as limits allow."""
    started, points, stopped = time.perf_counter(), [], None
    last: tuple[float, float] | None = None
    for value in getattr(config, axis):
        sizes = list(config.base)
        sizes[AXES.index(axis)] = value
        taken = (time.perf_counter() - started) / 60
        expected = last[0] * work(*sizes) / last[1] if last else 0.0
        if expected > config.limit:
            stopped = f"{axis} {value}: a step would take about {expected:.1f} s"
        elif taken > config.minutes:
            stopped = f"{axis} {value}: {taken:.1f} minutes are over"
        if stopped:
            print(stopped, flush=True)
            break
        point = measure_point(config, sizes)
        points.append({axis: value, **point})
        last = slowest(point), work(*sizes)
        print(f"{axis} {value}: slowest step {last[0]:.3f} s", flush=True)
    return {"points": points, "stopped": stopped, "exponents": exponents(axis, points)}


def exponents(axis: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fits a power law to every row and kind of step that two points have."""
    found: dict[str, Any] = {}
    names = {(n, k) for p in points for n, row in p["rows"].items() for k in row["ms"]}
    for name, kind in sorted(names):
        pairs = [
            (p[axis], p["rows"][name]["ms"][kind])
            for p in points
            if kind in p["rows"].get(name, {"ms": {}})["ms"]
        ]
        if len(pairs) > 1:
            found.setdefault(name, {})[kind] = power_law(pairs)
    return found


def power_law(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Least squares of ``log y = c + p log x``."""
    found: Any = stats.linregress(*np.log(pairs).T)
    error = None if len(pairs) < 3 else float(found.stderr)
    return {"exponent": float(found.slope), "standard_error": error}


def show(axis: str, found: dict[str, Any]) -> str:
    """The table of an axis: milliseconds per point, and the exponent."""
    points, table = found["points"], []
    for name, kinds in found["exponents"].items():
        for kind, fit in kinds.items():
            cells = [p["rows"].get(name, {"ms": {}})["ms"].get(kind) for p in points]
            table.append([f"{name}, {kind}", *cells, fit_text(fit)])
    header = [f"ms per step, {axis}", *(str(p[axis]) for p in points), "exponent"]
    return text_table(header, table)


def fit_text(fit: dict[str, float | None]) -> str:
    """An exponent with its standard error."""
    error = fit["standard_error"]
    return f"{fit['exponent']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def plot(path: Path, axes: dict[str, Any]) -> None:
    """Draws milliseconds against size: amortised as lines, kinds of step thinner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5 * len(axes), 4.5), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    styles = {AMORTISED: "-", "refresh+invert": ":", "refresh": "--"}
    for panel, (axis, found) in zip(panels, axes.items(), strict=True):
        for name, kinds in found["exponents"].items():
            for kind, style in styles.items():
                if kind not in kinds:
                    continue
                held = [p for p in found["points"] if name in p["rows"]]
                label = f"{name}: {fit_text(kinds[kind])}" if style == "-" else None
                panel.plot(
                    [p[axis] for p in held],
                    [p["rows"][name]["ms"][kind] for p in held],
                    style,
                    marker=".",
                    color=COLOURS.get(name),
                    linewidth=1.8 if style == "-" else 0.8,
                    label=label,
                )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.grid(True, which="both", alpha=0.3)
        if found["exponents"]:
            panel.legend(title="amortised (10, 100), exponent", fontsize=8)
    panels[0].set_ylabel("ms per step (dotted: refresh + invert, dashed: refresh)")
    FigureCanvasAgg(figure).print_png(path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures all axes; writes ``scale.json`` and ``scale.png``."""
    config = parse(Scale, argv, "scale")
    result = begin(config, axes={})
    for axis in AXES:
        found = measure_axis(config, axis)
        result["axes"][axis] = found
        print(show(axis, found), flush=True)
        write_json(config.out / "scale.json", result)
    plot(config.out / "scale.png", result["axes"])
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main() and 0))
