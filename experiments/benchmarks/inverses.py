"""Time of every way to invert a factor and to apply the inverse, by size.

    python -m experiments.benchmarks.inverses --sizes 64 256 1024 --batches 1 4

A round runs every method once, in an order that rotates; ratios are taken to the
product of two matrices of that size in the same round. Warm starts have seen a matrix
that differs by ``change`` in the Frobenius norm, as a refreshed factor does.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import (
    OUT,
    begin,
    in_turns,
    parse,
    quartiles,
    ratios,
    spread,
    text_table,
    timed,
    write_json,
)
from experiments.progress import ended
from kfac_jax_lite.core.linalg import newton_schulz_inverse, spd_inverse
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker import low_rank as eigenpairs
from kfac_jax_lite.kronecker.inverses import SHARE, kept_pairs

BASELINE = "product"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    # Widths of the matrices.
    sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1000, 2048)
    # How many of equal shape are inverted in one call.
    batches: tuple[int, ...] = (1, 4)
    # Blocks up to which Cholesky halves a matrix, beside the default.
    leaves: tuple[int, ...] = (64, 256, 512)
    rank: float = SHARE  # share of the eigenpairs that the low-rank method keeps
    largest_eigh: int = 1024  # above this size no eigendecomposition is measured
    change: float = 0.05  # relative change of a matrix between two inversions
    rounds: int = 15  # timed rounds
    out: Path = OUT  # folder of the result


def matrices(size: int, batch: int, change: float) -> tuple[np.ndarray, np.ndarray]:
    """Damped factors with eigenvalues that fall like ``1 / i``, before and after.

    Returns:
        Two arrays ``[batch, size, size]``, float32.
    """
    rng = np.random.default_rng(size)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    old = (q / np.arange(1, size + 1)) @ q.T
    x = rng.normal(size=(size, 2 * size))
    other = x @ x.T
    new = old + change * np.linalg.norm(old) / np.linalg.norm(other) * other
    damped = [m + 1e-2 * np.eye(size) for m in (old, new)]
    tiled = (np.tile(m, (batch, 1, 1)).astype(np.float32) for m in damped)
    before, after = tiled
    return before, after


def cases(size: int, batch: int, config: Config) -> dict[str, tuple[Callable, tuple]]:
    """Functions to time and their arguments."""
    old, new = (jnp.asarray(m) for m in matrices(size, batch, config.change))
    start = jnp.linalg.inv(old)
    rank = kept_pairs(config.rank, size)
    u, _, _ = eigenpairs.initial((batch,), size, rank, jnp.float32)
    u, *pairs = jax.jit(eigenpairs.refreshed)(old, u, jnp.asarray(True))
    side = eigenpairs.side(u, *pairs)
    damping = jnp.asarray(1e-2)
    found: dict[str, tuple[Callable, tuple]] = {
        BASELINE: (jnp.matmul, (old, new)),
        "cholesky": (spd_inverse, (new,)),
        "newton_schulz": (
            lambda m, x: newton_schulz_inverse(m, x, 1e-5),
            (new, start),
        ),
        "low_rank": (eigenpairs.refreshed, (new, u, jnp.asarray(False))),
        "apply explicit": (lambda x, v: x @ v @ x, (start, new)),
        "apply eigh": (
            lambda q, v: q @ ((q.mT @ v @ q) / (1 + v)) @ q.mT,
            (start, new),
        ),
        "apply low_rank": (eigenpairs.solve, (side, side, new, damping)),
    }
    if size <= config.largest_eigh:
        found["eigh"] = (forms.FULL.eigh, (new,))
    for leaf in config.leaves:
        if leaf < size:
            found[f"cholesky, leaf {leaf}"] = (
                lambda m, leaf=leaf: spd_inverse(m, leaf),
                (new,),
            )
    return found


def measure(size: int, batch: int, config: Config) -> dict[str, dict[str, Any]]:
    found = {k: (jax.jit(f), x) for k, (f, x) in cases(size, batch, config).items()}
    calls = {k: lambda f=f, x=x: timed(f, *x)[0] for k, (f, x) in found.items()}
    samples = in_turns(calls, config.rounds, warm_up=1)
    return {
        name: {
            "ms": 1e3 * quartiles(seconds)[1],
            "ratio": ratios(seconds, samples[BASELINE]),
        }
        for name, seconds in samples.items()
    }


def main(config: Config) -> dict[str, Any]:
    """Measures every size and writes ``inverses.json``."""
    result = begin(config, cases=[])
    header = ("method", "ms", "ratio to a product", "quartiles")
    for size in config.sizes:
        for batch in config.batches:
            rows = measure(size, batch, config)
            rank = kept_pairs(config.rank, size)
            case = {"size": size, "batch": batch, "rank": rank, "rows": rows}
            result["cases"].append(case)
            print(f"\n{batch} x {size} x {size}, rank {rank}")
            lines = [
                (name, row["ms"], row["ratio"][1], spread(row["ratio"]))
                for name, row in rows.items()
            ]
            print(text_table(header, lines), flush=True)
            write_json(config.out / "inverses.json", result)
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main(parse(Config, None, "inverses")) and 0))
