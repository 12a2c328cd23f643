"""What one step of the soak leaves behind, moved to the host in two arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

CLOCKS = ("interval", "last_refresh", "last_inverse", "refreshes", "inversions")
CLOCKS += ("failures",)


class Step(NamedTuple):
    """A step as the host sees it; vectors are over layers sorted by name.

    Attributes:
        value: the loss.
        squares: squared norms of the gradient's leaves, in float32.
        statistics: ``(A, G)`` as ``update`` was given them, by layer.
        due: which of them were asked for.
        sound: whether parameters, averages and inverses are finite after the step.
        count: batches accepted.
        skipped: batches refused.
        interval: intervals in force.
        last_refresh: steps of the last refreshes.
        last_inverse: steps of the last inversions.
        refreshes: numbers of refreshes.
        inversions: numbers of inversions.
        failed: whether a factorisation failed in this step.
    """

    value: float
    squares: np.ndarray
    statistics: list[tuple[np.ndarray, np.ndarray]]
    due: np.ndarray
    sound: bool
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    skipped: int
    interval: np.ndarray
    last_refresh: np.ndarray
    last_inverse: np.ndarray
    refreshes: np.ndarray
    inversions: np.ndarray
    failed: np.ndarray


def kfac_state(state: Any) -> Any:
    """The ``KFACState`` in an optax state."""
    return optax.tree.get(state, "KFACState")


def packed(value: Any, grads: Any, statistics: Any, params: Any, state: Any) -> tuple:
    """A step's arrays as one float and one integer vector; traced."""
    held = kfac_state(state)
    pairs = [(statistics[name].a, statistics[name].g) for name in sorted(statistics)]
    squares = [jnp.vdot(g, g) for g in jax.tree.leaves(grads)]
    floats = [value, *squares, *jax.tree.leaves(pairs)]
    checked = jax.tree.leaves((params, held.factors, held.inverses))
    sound = jnp.stack([jnp.isfinite(leaf).all() for leaf in checked]).all()
    clocks = [getattr(held.clock, name) for name in CLOCKS]
    integers = [sound, held.count, held.skipped, *clocks]
    return tuple(
        jnp.concatenate([jnp.ravel(x).astype(dtype) for x in arrays])
        for arrays, dtype in ((floats, jnp.float32), (integers, jnp.int32))
    )


def unpacked(
    record: tuple,
    shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    due: np.ndarray,
    failures: np.ndarray,
) -> Step:
    """A step's arrays on the host."""
    floats, integers = (np.asarray(array) for array in record)
    end = len(floats)
    statistics = []
    for pair in reversed(shapes):
        parts = []
        for shape in reversed(pair):
            start = end - int(np.prod(shape))
            parts.append(floats[start:end].reshape(shape))
            end = start
        statistics.append((parts[1], parts[0]))
    sound, count, skipped = (int(v) for v in integers[:3])
    clocks = dict(zip(CLOCKS, integers[3:].reshape(len(CLOCKS), -1), strict=True))
    failed = clocks.pop("failures") > failures
    return Step(
        value=float(floats[0]),
        squares=floats[1:end],
        statistics=statistics[::-1],
        due=due,
        sound=bool(sound),
        count=count,
        skipped=skipped,
        failed=failed,
        **clocks,
    )
