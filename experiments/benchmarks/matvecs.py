"""Products with curvature matrices, side by side with curvlinops (PyTorch).

    python -m experiments.benchmarks.matvecs --data-dir … --rounds 15 --threads 1

Both libraries have the same network, weights, data and vectors in one process. Before
anything is timed, their products are compared. In every round each row runs once, ours
and theirs one after the other, in an order that changes from round to round. Set-up is
making the operator: nothing but for K-FAC, which computes its factors then. First calls
compile and are given apart. curvlinops runs as it comes, without ``torch.compile``.
"""

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments.benchmarks.common import (
    OUT,
    machine,
    quartiles,
    text_table,
    timed,
    write_json,
)
from experiments.benchmarks.matvec_cases import (
    EMPIRICAL,
    HIDDEN,
    MC,
    Problem,
    carried,
    drawn_labels,
    make_problem,
    normal_vectors,
    our_operators,
    with_labels,
)
from experiments.benchmarks.matvec_peer import Peer, import_torch, make_peer
from experiments.datasets import load
from experiments.pipes import ended

PROGRAM = "python -m experiments.benchmarks.matvecs"
SET_UP, ONE = "set-up", "1 vector"
OURS, THEIRS = "ours", "theirs"
# Above this relative difference the products are not those of one matrix.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Times products with curvature matrices, ours and those of curvlinops."""

    models: tuple[Literal["mlp", "lenet5"], ...] = ("mlp", "lenet5")
    """The networks."""
    dataset: Literal["mnist", "mnist5k", "fashion_mnist"] = "mnist"
    """The images; of 28 x 28 pixels."""
    examples: int = 2048
    """How many of them, the first of the training set."""
    batch_size: int = 512
    """Examples per batch."""
    width: int = HIDDEN
    """Width of the MLP's two hidden layers."""
    vectors: int = 16
    """How many vectors are multiplied at once."""
    rounds: int = 15
    """Timed rounds."""
    threads: int | None = None
    """Cores that the process keeps to, a thread for each; all by default."""
    without_peer: bool = False
    """Leave curvlinops out."""
    data_dir: Path | None = None
    """Folder with the images."""
    out: Path = OUT
    """Folder of the result."""


@dataclasses.dataclass
class Row:
    """What is timed, once per round."""

    matrix: str  # which one
    event: str  # set-up or product
    calls: dict[str, Callable[[], Any]]  # what is called, by library
    first: dict[str, float]  # seconds of the first calls, by library
    difference: float | None = None  # of the two products, relative
    # Of the timed calls, by library.
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def run(self, number: int) -> None:
        """Times both libraries, in an order that changes with the round."""
        names = list(self.calls)
        for name in names if number % 2 else names[::-1]:
            self.seconds.setdefault(name, []).append(timed(self.calls[name])[0])

    def record(self) -> dict[str, Any]:
        """The result as JSON values: milliseconds with quartiles."""
        found: dict[str, Any] = {"matrix": self.matrix, "event": self.event}
        for name, seconds in self.seconds.items():
            found[name] = {
                "ms": [1e3 * q for q in quartiles(seconds)],
                "first_seconds": self.first[name],
            }
        if THEIRS in self.seconds:
            pairs = zip(self.seconds[THEIRS], self.seconds[OURS], strict=True)
            found["ratio"] = quartiles([theirs / ours for theirs, ours in pairs])
        if self.difference is not None:
            found["difference"] = self.difference
            found["agree"] = self.difference <= TOLERANCE
        return found


# ------------------------------------------------------------------------- the products


def product(operator: Any, vectors: Any, several: bool) -> Callable[[], Any]:
    """A call of ours."""
    apply = operator.mm if several else operator.mv
    return lambda: apply(vectors)


def relative_difference(
    ours: Any, theirs: Sequence[Any], problem: Problem, several: bool
) -> float:
    """``‖ours − theirs‖ / ‖theirs‖`` over all parameters and vectors."""
    pairs = zip(carried(ours, problem.network, several), theirs, strict=True)
    wide = [(a.astype(np.float64), b.detach().double().numpy()) for a, b in pairs]
    apart = sum(float(np.sum((a - b) ** 2)) for a, b in wide)
    return float(np.sqrt(apart / sum(float(np.sum(b**2)) for _, b in wide)))


def comparable(
    matrix: str, ours: Any, theirs: Any, problem: Problem, peer: Peer
) -> list[tuple[Any, Any]]:
    """Pairs of operators that must be the same matrix.

    The two MC Fishers draw other labels; each is the other library's empirical Fisher
    with the labels that it drew.
    """
    if matrix != MC:
        return [(ours, theirs)]
    theirs_on_ours = peer.with_labels(drawn_labels(ours)).operators()[EMPIRICAL]()
    relabelled = with_labels(problem, peer.drawn_labels())
    return [(ours, theirs_on_ours), (our_operators(relabelled)[EMPIRICAL](), theirs)]


def make_rows(
    matrix: str, problem: Problem, peer: Peer | None, vectors: int
) -> list[Row]:
    """Makes the operators of a matrix, multiplies once, and compares."""
    makers: dict[str, Callable[[], Any]] = {OURS: our_operators(problem)[matrix]}
    if peer is not None:
        makers[THEIRS] = peer.operators()[matrix]
    made = {name: timed(make) for name, make in makers.items()}
    operators = {name: operator for name, (_, operator) in made.items()}
    rows = [Row(matrix, SET_UP, makers, {name: s for name, (s, _) in made.items()})]
    for count in (None, vectors):
        drawn, several = normal_vectors(problem, 2, count), count is not None
        calls = {OURS: product(operators[OURS], drawn, several)}
        sent = peer.tensors(drawn, several) if peer is not None else None
        if peer is not None:
            calls[THEIRS] = lambda sent=sent: operators[THEIRS] @ sent
        first = {name: timed(call)[0] for name, call in calls.items()}
        difference = None
        if peer is not None:
            both = operators[OURS], operators[THEIRS]
            difference = max(
                relative_difference(
                    product(ours, drawn, several)(), theirs @ sent, problem, several
                )
                for ours, theirs in comparable(matrix, *both, problem, peer)
            )
        event = f"{count} vectors" if several else ONE
        rows.append(Row(matrix, event, calls, first, difference))
    return rows


def benchmark(name: str, config: Config, torch: Any, curvlinops: Any) -> dict[str, Any]:
    """Measures one network."""
    data = load(config.dataset, config.data_dir).first(config.examples)
    problem = make_problem(name, data, config.batch_size, config.width)
    peer = make_peer(torch, curvlinops, problem, config.width) if torch else None
    rows: list[Row] = []
    for matrix in our_operators(problem):
        rows += make_rows(matrix, problem, peer, config.vectors)
        print(f"{name}, {matrix}: ready", flush=True)
    for number in range(config.rounds):
        shift = number % len(rows)
        for row in rows[shift:] + rows[:shift]:
            row.run(number)
    shapes = [x.shape for x in carried(problem.params, problem.network)]
    return {
        "parameters": sum(int(np.prod(shape)) for shape in shapes),
        "images": data.title,
        "source": Path(data.source).name,
        "rows": [row.record() for row in rows],
    }


# -------------------------------------------------------------------------- the program


def keep_to(threads: int | None) -> int:
    """Keeps this process to some of its cores; before JAX and PyTorch make threads."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is None:
        return len(allowed)
    if not 1 <= threads <= len(allowed):
        raise SystemExit(f"--threads {threads}: wanted 1 to {len(allowed)}.")
    os.sched_setaffinity(0, allowed[:threads])
    return threads


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The table of one network."""
    header = ("matrix", "event", "ours ms", "quartiles", "first s", "theirs ms")
    header += ("quartiles", "first s", "theirs/ours", "quartiles", "difference")
    table = []
    for row in rows:
        cells: list[Any] = [row["matrix"], row["event"]]
        for name in (OURS, THEIRS):
            side = row.get(name)
            if side is None:
                cells += [None] * 3
                continue
            low, middle, high = side["ms"]
            cells += [middle, f"{low:.3g}-{high:.3g}", side["first_seconds"]]
        low, middle, high = row.get("ratio", (None, None, None))
        cells += [middle, None if low is None else f"{low:.2f}-{high:.2f}"]
        found = row.get("difference")
        cells.append(None if found is None else f"{found:.0e}")
        table.append(cells)
    return text_table(header, table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the networks and writes ``matvecs_threads_<n>.json``."""
    config = tyro.cli(Config, prog=PROGRAM, args=arguments)
    threads = keep_to(config.threads)
    torch, curvlinops, reason = import_torch()
    if config.without_peer:
        torch, reason = None, "--without-peer"
    versions: dict[str, Any] = {"curvlinops_missing": reason or None}
    if torch:
        torch.set_num_threads(threads)
        for package in ("torch", "curvlinops-for-pytorch"):
            versions[package] = importlib.metadata.version(package)
    values = dataclasses.asdict(config)
    del values["out"], values["data_dir"]
    result: dict[str, Any] = {
        "machine": machine() | versions,
        "settings": values | {"threads": threads},
        "models": {},
    }
    path = config.out / f"matvecs_threads_{threads}.json"
    apart = []
    for name in config.models:
        found = result["models"][name] = benchmark(name, config, torch, curvlinops)
        count, images = found["parameters"], found["images"]
        print(f"\n{name}: {count:,} parameters, {images}, {threads} threads")
        print(show(found["rows"]), flush=True)
        rows = [row for row in found["rows"] if not row.get("agree", True)]
        apart += [f"{name}, {row['matrix']}, {row['event']}" for row in rows]
        write_json(path, result)
    for line in apart:
        print(f"PRODUCTS DIFFER: {line}")
    if reason:
        print(f"curvlinops: missing, {reason}")
    print(f"Written to {path.name}.")
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(ended(main))
