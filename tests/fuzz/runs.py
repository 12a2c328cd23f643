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
        rows: Row axes as the program lays them out.
        numbers: ``[R]``, the rows' numbers, counted in the order examples, positions.
        example: ``[R]`` or shaped like the result: example of the batch.
        layer: What the layer is called.
        site: Which offset its result got.
        branch: ``(cond, branch)`` around it, outermost first.
        taken: Whether that branch runs.
    """

    kind: str
    index: np.ndarray
    x: Any = None
    rows_of: Callable = np.asarray
    cut: Callable = np.asarray
    rows: tuple = ()
    numbers: Any = None
    example: Any = None
    layer: str = "dense"
    site: int | None = None
    branch: tuple = ()
    taken: Any = True


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
        self.branch, self.taken, self.conds = [()], [True], [0]

    def site(self, z: Any, uses: Callable[[], list[Use]]) -> Any:
        number = len(self.shapes)
        self.shapes.append(jax.ShapeDtypeStruct(z.shape, z.dtype))
        for use in uses():
            use.site, use.branch, use.taken = number, self.branch[-1], self.taken[-1]
            self.uses.append(use)
        return z if self.offsets is None else z + self.offsets[number]

    def odd(self, index: np.ndarray) -> None:
        self.uses.append(Use("odd", np.asarray(index)))

    def number_of_cond(self) -> int:
        """A number for one more conditional."""
        self.conds[0] += 1
        return self.conds[0]

    @contextlib.contextmanager
    def inside(self, number: int, k: int, taken: Any):
        """What follows is branch ``k`` of a conditional."""
        self.branch.append((*self.branch[-1], (number, k)))
        self.taken.append(jnp.logical_and(self.taken[-1], taken))
        yield
        self.branch.pop()
        self.taken.pop()


def lead_of(run: Run, lead: tuple) -> dict[str, np.ndarray]:
    """Numbers and examples of rows whose axes are ``lead``, examples first."""
    numbers = np.arange(int(np.prod(lead))).reshape(lead)
    example = np.arange(run.batch).reshape(-1, *(1,) * (len(lead) - 1))
    return {"numbers": numbers, "example": np.broadcast_to(example, lead)}


def matrix_use(run: Run, index, x, *, order=None, flat=False, scales=(), layer="dense"):
    """The use of a matrix by rows ``x [*lead, in]`` of a result ``[*lead, out]``.

    Args:
        run: The run.
        index: ``[in, out]``.
        x: Rows, examples first.
        order: The order in which the program lays the row axes out.
        flat: Whether it lays them out as one axis.
        scales: Variables that multiply the matrix from the left and from the right.
        layer: What the layer is called.

    Returns:
        The use.
    """
    lead = x.shape[:-1]
    order = tuple(range(len(lead))) if order is None else tuple(order)
    known = lead_of(run, lead)
    left, right = scales or (1.0, 1.0)

    def laid_out(v):
        v = np.asarray(v, np.float64)
        return v.transpose(*order, len(order)).reshape(-1, v.shape[-1])

    rows = tuple(lead[i] for i in order)
    return Use(
        "matrix",
        np.asarray(index),
        (x, left, right),
        rows_of=lambda v: laid_out(np.asarray(v[0]) * np.asarray(v[1])),
        cut=lambda c, v: laid_out(c) * np.asarray(v[2]),
        rows=(int(np.prod(rows)),) if flat else rows,
        layer=layer,
        **{k: v.transpose(order).ravel() for k, v in known.items()},
    )


def elementwise_use(run: Run, kind: str, index, x, shape):
    """The use of a scale or shift in a result of that shape, examples first."""
    known = lead_of(run, tuple(shape))
    return Use(
        kind,
        np.broadcast_to(np.asarray(index), shape),
        x,
        rows_of=lambda v: np.broadcast_to(np.asarray(v, np.float64), shape),
        cut=lambda c, v: np.asarray(c, np.float64),
        example=known["example"],
    )
