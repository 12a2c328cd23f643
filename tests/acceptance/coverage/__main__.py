"""How much of the usual architectures gets a block, and what tagging costs.

    python -m tests.acceptance.coverage --compile resnet50 vit_b16

Parameters and batches are shapes: no weight is made and nothing is executed. Seconds
are medians over the runs, from empty caches. Compiling is measured for the named
architectures only: lowering and compiling the tagged loss with all layers due, and the
plain gradient, in turn.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kfac_jax_lite as kfac
from experiments.benchmarks.common import OUT, machine, quartiles
from experiments.models.architectures import ARCHITECTURES, Problem
from experiments.progress import ended, open_console
from tests.acceptance.coverage.counts import coverage, percent, save, show_fallbacks

PROGRAM = "python -m tests.acceptance.coverage"
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(ARCHITECTURES)]


@dataclasses.dataclass(frozen=True)
class Config:
    """Tags full-size networks and counts the parameters that get a block."""

    models: tuple[Name, ...] = tuple(ARCHITECTURES)
    """The architectures."""
    runs: int = 5
    """How often each is traced and tagged."""
    compile: tuple[Name, ...] = ()
    """The architectures of which the compilation is timed too."""
    compile_runs: int = 3
    """How often each of them is compiled, plain and tagged."""
    out: Path = OUT
    """Folder of the result."""


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Calls a function; returns the seconds it took, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def time_tagging(problem: Problem, runs: int) -> tuple[dict[str, float], Any]:
    """Times the trace of a loss and what tagging takes beyond it."""
    traces, tags, tagged = [], [], None
    for _ in range(runs):
        jax.clear_caches()
        make = jax.make_jaxpr(problem.loss)
        first, _ = seconds(lambda make=make: make(problem.params, *problem.args))
        # From here on the trace comes out of JAX's cache.
        again, _ = seconds(lambda make=make: make(problem.params, *problem.args))
        whole, tagged = seconds(lambda: tag(problem))
        traces.append(first)
        tags.append(max(0.0, whole - again))
    return {
        "jaxpr_seconds": statistics.median(traces),
        "tag_seconds": statistics.median(tags),
    }, tagged


def tag(problem: Problem) -> kfac.TaggedLoss:
    """Tags a problem's loss."""
    return kfac.tag(
        problem.loss, problem.params, *problem.args, has_aux=problem.has_aux
    )


def time_compiling(problem: Problem, runs: int) -> dict[str, Any]:
    """Times lowering and compiling of the plain gradient and of the tagged loss."""
    tagged = tag(problem)
    plain = jax.value_and_grad(problem.loss, has_aux=problem.has_aux)
    functions = {"plain": plain, "tagged": tagged.value_and_grad}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(runs):
        for name in sorted(functions, reverse=number % 2 == 1):
            jax.clear_caches()
            step = jax.jit(lambda *args, f=functions[name]: f(*args))
            start, begun = time.perf_counter(), time.process_time()
            step.lower(problem.params, *problem.args).compile()
            processor[name].append(time.process_time() - begun)
            wall[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(wall["plain"], wall["tagged"], strict=True)]
    shares = [b / a for a, b in zip(*processor.values(), strict=True)]
    return {
        "plain_seconds": statistics.median(wall["plain"]),
        "tagged_seconds": statistics.median(wall["tagged"]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "processor_ratio": statistics.median(shares),
    }


def measure(name: str, config: Config) -> dict[str, Any]:
    """Measures one architecture."""
    architecture = ARCHITECTURES[name]
    problem = architecture.make()
    times, tagged = time_tagging(problem, config.runs)
    row: dict[str, Any] = {
        "title": architecture.title,
        "inputs": architecture.shape,
        **coverage(tagged.layers),
        **times,
    }
    if name in config.compile:
        row["compile"] = time_compiling(problem, config.compile_runs)
    return row


def show(rows: dict[str, dict[str, Any]]) -> Table:
    """The table of all architectures."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("architecture", no_wrap=True)
    for title in ("parameters", "layers", "in blocks", "jaxpr s", "tag s", "compile"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows.values():
        compiled = row.get("compile")
        table.add_row(
            row["title"],
            f"{row['parameters']:,}",
            str(row["layers"]),
            percent(row["share"]),
            f"{row['jaxpr_seconds']:.2f}",
            f"{row['tag_seconds']:.3f}",
            f"× {compiled['ratio']:.2f}" if compiled else "-",
        )
    return table


def benchmark(config: Config, console: Console) -> dict[str, Any]:
    """Measures the architectures in turn and writes the result."""
    # Compilation must not come from a folder of earlier ones.
    jax.config.update("jax_enable_compilation_cache", False)
    rows = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(config.models))
        for name in config.models:
            progress.update(task, description=ARCHITECTURES[name].title)
            took, rows[name] = seconds(lambda name=name: measure(name, config))
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{name}: {took:.0f} s", highlight=False)
    console.print(show(rows))
    show_fallbacks(rows, console)
    settings = dataclasses.asdict(config)
    del settings["out"]
    result = {"machine": machine(), "settings": settings, "models": rows}
    path = config.out / "coverage.json"
    save(path, result, console)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    console = open_console()
    doc = (__doc__ or "").split("\n")[0]
    benchmark(tyro.cli(Config, prog=PROGRAM, description=doc, args=arguments), console)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
