"""What the benchmarks share: the clock, the machine's description, tables, files."""

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import kfac_jax_lite as kfac
from experiments.metrics import to_json

HERE = Path(__file__).parent
# Where this folder lies in the repository; a copy elsewhere, such as one installed into
# an environment inside another repository, has no commit.
PLACE = "experiments/benchmarks/"


def commit(folder: Path = HERE, place: str = PLACE) -> str | None:
    """The commit of a checkout, as git says it.

    Files that git does not track and those in folders called ``results``, which the
    measurements themselves write, do not count as modified.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git(folder, "rev-parse", "--show-prefix") != place:
            return None
        found = git(folder, "rev-parse", "--short", "HEAD")
        kept = (":(top)", ":(top,exclude,glob)**/results/**")
        changed = git(folder, "status", "--porcelain", "-uno", "--", *kept)
        return f"{found}, modified" if changed else found
    return None


def git(folder: Path, *arguments: str) -> str:
    """What git prints, without spaces around it."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


T = TypeVar("T")
OUT = Path("runs/benchmarks")
PEER = "kfac_jax"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
TITLES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "kfac_jax": "kfac-jax",
    "ours": "kfac_jax_lite",
    "ours_averaged": "kfac_jax_lite, averaged",
}
COLOURS = {
    "adam": "#0072b2",
    "adamw": "#0072b2",
    "kfac_jax": "#009e73",
    "ours": "#d55e00",
    "ours_averaged": "#cc79a7",
}


def settings(args: Any) -> dict[str, Any]:
    """Returns the arguments of a run, without the folders of this machine."""
    values = dataclasses.asdict(args)
    return {
        k: v
        for k, v in values.items()
        if not isinstance(v, Path) and k not in ("data_dir", "report")
    }


# --------------------------------------------------------------------------- the clock


def timed(function: Callable, *args: Any) -> tuple[float, Any]:
    """Calls a function and waits for its arrays."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def copy_tree(tree: Any) -> Any:
    """Copies the arrays of a tree to new buffers, which a step may then donate."""
    copied = jax.tree.map(
        lambda x: jnp.array(x, copy=True) if isinstance(x, jax.Array) else x, tree
    )
    return jax.block_until_ready(copied)


def megabytes(tree: Any) -> float:
    """Size of a tree's arrays, in units of 10⁶ bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(getattr(leaf, "nbytes", 0) for leaf in leaves) / 1e6


class CompileCounter:
    """Counts compilations in this process; install it once."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        self.count += event == COMPILE_EVENT


def compile_seconds(seconds: Sequence[float], compiled: Sequence[bool]) -> float:
    """Estimates the time spent compiling inside timed steps."""
    pairs = list(zip(seconds, compiled, strict=True))
    usual = [s for s, c in pairs if not c]
    typical = statistics.median(usual) if usual else 0.0
    return sum(max(0.0, s - typical) for s, c in pairs if c)


# ------------------------------------------------------------------- amortised seconds

Samples = Sequence[tuple[str, float]]


def kind_medians(samples: Samples) -> dict[str, float]:
    """Median seconds of each kind of step."""
    groups: dict[str, list[float]] = {}
    for kind, seconds in samples:
        groups.setdefault(kind, []).append(seconds)
    return {kind: statistics.median(values) for kind, values in groups.items()}


def amortised(samples: Samples, cycle: Mapping[str, int] | None = None) -> float:
    """Mean seconds of a step over one cycle of its kinds."""
    medians = kind_medians(samples)
    if cycle is None:
        kinds = [kind for kind, _ in samples]
        cycle = {kind: kinds.count(kind) for kind in medians}
    missing = [kind for kind, n in cycle.items() if n and kind not in medians]
    if missing or not medians:
        raise ValueError(f"no step was measured of the kinds {missing or 'asked for'}.")
    total = sum(cycle.values())
    return sum(n * medians[kind] for kind, n in cycle.items() if n) / total


def cycle_of(factor: int, inverse: int) -> dict[str, int]:
    """Steps of each kind in one cycle of fixed intervals."""
    if inverse % factor:
        raise ValueError(f"inverse interval {inverse} is no multiple of {factor}.")
    refreshes = inverse // factor
    counts = {
        "refresh+invert": 1,
        "refresh": refreshes - 1,
        "nothing": inverse - refreshes,
    }
    return {kind: n for kind, n in counts.items() if n}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: Sequence[float], base: Sequence[float]) -> tuple[float, ...]:
    """Quartiles of the quotients, round by round."""
    return quartiles([x / y for x, y in zip(values, base, strict=True)])


def spread(three: Sequence[float]) -> str:
    """Lower and upper quartile as text."""
    return f"{three[0]:.2f}-{three[-1]:.2f}"


def in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 0
) -> dict[str, list[Any]]:
    """Calls all once per round, in an order that rotates: what is slow slows all."""
    names, found = list(calls), {name: [] for name in calls}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            value = calls[name]()
            if number >= 0:
                found[name].append(value)
    return found


# --------------------------------------------------------------------- reaching a loss


def first_reach(
    evaluations: Sequence[Mapping[str, Any]], target: float, field: str = "loss"
) -> Mapping[str, Any] | None:
    """The first evaluation that is at a target or below it."""
    for record in evaluations:
        if record[field] is not None and record[field] <= target:
            return record
    return None


# ------------------------------------------------------------------- machine and peers


def import_peer() -> tuple[ModuleType | None, str]:
    """Imports kfac-jax, whatever the Python path has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(PEER)
    except Exception as error:  # noqa: BLE001 - old releases fail in many ways
        return None, without_paths(f"{type(error).__name__}: {error}")
    if not hasattr(module, "Optimizer"):
        return None, "a folder of that name without the package was found"
    return module, ""


def without_paths(message: str) -> str:
    """The first line of an error message, without folders of this machine."""
    return re.sub(r"\s*\(?/[^\s)]*\)?", "", message.split("\n")[0])


def machine() -> dict[str, Any]:
    """Describes what a measurement was made with."""
    peer, reason = import_peer()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "numpy", "optax", "flax")
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "python": platform.python_version(),
        **versions,
        "kfac_jax": getattr(peer, "__version__", "unknown") if peer else None,
        "kfac_jax_missing": reason or None,
        "kfac_jax_lite": kfac.__version__,
        "commit": commit(),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------ output


def parse(kind: type[T], argv: Sequence[str] | None, name: str) -> T:
    """Reads the command line of a benchmark."""
    return tyro.cli(kind, args=argv, prog=f"python -m experiments.benchmarks.{name}")


def begin(config: Any, **more: Any) -> dict[str, Any]:
    """A result before anything is measured: the machine and the settings."""
    return {"machine": machine(), "settings": settings(config), **more}


def write_json(path: Path, values: Any) -> None:
    """Writes a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_json(values), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lays out a table: the first column to the left, the others to the right."""
    cells = [list(header)] + [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *rest = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1])] + [text.rjust(w) for text, w in rest]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def save_curves(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    loss: str = "training loss",
) -> None:
    """Plots a loss against steps and against seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    labels = ("steps", "seconds of training, compiling included")
    for axis, field, label in zip(axes, ("step", "seconds"), labels, strict=True):
        for name, records in curves.items():
            shown = [r for r in records if r["loss"] is not None]
            axis.plot(
                [r[field] for r in shown],
                [r["loss"] for r in shown],
                label=TITLES.get(name, name),
                color=COLOURS.get(name),
                marker=".",
            )
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel(loss)
    axes[0].legend()
    FigureCanvasAgg(figure).print_png(path)
