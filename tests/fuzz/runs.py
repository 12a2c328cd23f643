"""How a random program is run: plainly, or writing down where its parameters are.

Steps are written once. They read parameters from a ``Run`` and tell it, at every place
where a parameter meets data, what they computed and from which entries of which
parameter. A plain ``Run`` ignores that. A ``Recorder`` adds a zero offset to the
result, so that its cotangent can be asked for, and keeps a ``Use``. It also runs
loops, maps and branches by hand: nothing of the library is in its way.

Entries of parameters carry numbers: whatever selects entries of a parameter selects
from an array of their numbers in the same way.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(eq=False)
class Use:
    """One place where entries of parameters meet data.

    Attributes:
        kind: ``"matrix"``, ``"scale"``, ``"shift"`` or ``"odd"`` (none of these).
        index: Numbers of the entries: ``[in, out]`` of a matrix, else shaped like the
            result, any shape where the use is odd.
        x: What the entries are multiplied by: any array; ``rows_of`` makes ``[R, in]``
            of it for a matrix, else an array like the result.
        rows_of: Of ``x``, in numpy.
        cut: Of a result's cotangent, in numpy: ``[R, out]`` for a matrix.
        rows: Row axes, examples first, however the program lays them out.
        layer: What the layer is called.
        site: Which offset its result got.
        taken: Whether the branches around it run.
        spread: Whether the program makes it once, not for every example.
    """

    kind: str
    index: np.ndarray
    x: Any = None
    rows_of: Callable = np.asarray
    cut: Callable = np.asarray
    rows: tuple = ()
    layer: str = "dense"
    site: int | None = None
    taken: Any = True
    spread: bool = False


class Run:
    """Runs a program in plain ``jax.numpy``.

    Args:
        params: Leaves by name.
        index: Numbers of their entries, likewise.
        batch: Number of examples.
    """

    recording = False

    def __init__(self, params: dict, index: dict, batch: int):
        self.params, self.index, self.batch = params, index, batch

    def under(self, params: dict, index: dict) -> "Run":
        """The same run with some parameters replaced."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.params, other.index = self.params | params, self.index | index
        return other

    def site(self, z: Any, uses: Callable[[], list[Use]]) -> Any:
        """A result that parameters have gone into."""
        del uses
        return z

    def odd(self, index: np.ndarray) -> None:
        """A use that is no layer."""


class Recorder(Run):
    """Runs a program with its loops unrolled, offsets added and uses written down."""

    recording = True

    def __init__(self, params: dict, index: dict, batch: int, offsets: Any):
        super().__init__(params, index, batch)
        self.offsets, self.uses, self.shapes = offsets, [], []
        self.taken, self.spread = [True], [False]

    def site(self, z: Any, uses: Callable[[], list[Use]]) -> Any:
        number = len(self.shapes)
        self.shapes.append(jax.ShapeDtypeStruct(z.shape, z.dtype))
        for use in uses():
            use.site, use.taken, use.spread = number, self.taken[-1], self.spread[-1]
            self.uses.append(use)
        return z if self.offsets is None else z + self.offsets[number]

    def odd(self, index: np.ndarray) -> None:
        self.uses.append(Use("odd", np.asarray(index)))

    @contextlib.contextmanager
    def inside(self, taken: Any):
        """What follows is a branch that runs or not."""
        self.taken.append(jnp.logical_and(self.taken[-1], taken))
        yield
        self.taken.pop()

    @contextlib.contextmanager
    def once(self):
        """What follows is computed once in the program, here for every example."""
        self.spread.append(True)
        yield
        self.spread.pop()


def matrix_use(index, x, *, scales=(), layer="dense"):
    """The use of a matrix by rows ``x [*lead, in]`` of a result ``[*lead, out]``.

    Args:
        index: ``[in, out]``.
        x: Rows, examples first.
        scales: Variables that multiply the matrix from the left and from the right.
        layer: What the layer is called.

    Returns:
        The use.
    """
    left, right = scales or (1.0, 1.0)

    def rows(v):
        return np.asarray(v, np.float64).reshape(-1, v.shape[-1])

    return Use(
        "matrix",
        np.asarray(index),
        (x, left, right),
        rows_of=lambda v: rows(np.asarray(v[0]) * np.asarray(v[1])),
        cut=lambda c, v: rows(c) * np.asarray(v[2]),
        rows=x.shape[:-1],
        layer=layer,
    )


def elementwise_use(kind: str, index, x, shape):
    """The use of a scale or shift in a result of that shape, examples first."""
    return Use(
        kind,
        np.broadcast_to(np.asarray(index), shape),
        x,
        rows_of=lambda v: np.broadcast_to(np.asarray(v, np.float64), shape),
        cut=lambda c, v: np.asarray(c, np.float64),
    )
