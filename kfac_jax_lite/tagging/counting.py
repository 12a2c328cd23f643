"""Rows picked by their own numbers: ``h[arange(n), last]`` keeps the axis of ``n``.

A variable *counts* along an axis if each entry is its position there. Such numbers come
from ``iota`` and reach a ``gather`` through broadcasts, the wrapping of negative ones
(``select_n(i < 0, i, i + n)``), and side by side with others, one column each.
"""

from jax.extend.core import Literal

from kfac_jax_lite.core.types import JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import shape_of
from kfac_jax_lite.tagging.indices import Axes, Axis, length, unify

# By variable: the axis that each column counts along, if any; () is "never true".
Counts = dict[Var, tuple[Axis | None, ...]]
SAME = ("broadcast_in_dim", "reshape", "convert_element_type", "copy")


def count(eqn: JaxprEqn, axes: list[Axes], result: Axes, counts: Counts) -> None:
    """Notes whether the result of an equation counts, and what a gather picks."""
    name, out = eqn.primitive.name, eqn.outvars[0]
    known = [None if isinstance(a, Literal) else counts.get(a) for a in eqn.invars]
    if name == "iota":
        counts[out] = (result[eqn.params["dimension"]],)
    elif name in SAME and known[0]:
        counts[out] = known[0]
    elif name == "lt" and known[0] and is_zero(eqn.invars[1]):
        counts[out] = ()
    elif name == "select_n" and known[0] == () and known[1]:
        counts[out] = known[1]
    elif name == "concatenate" and any(known) and in_columns(eqn):
        counts[out] = tuple(column[0] if column else None for column in known)
    elif name == "gather" and known[1]:
        pick(eqn, axes[0], known[1])


def is_zero(atom: object) -> bool:
    """Whether an atom is the number 0."""
    return isinstance(atom, Literal) and bool(atom.val == 0)


def in_columns(eqn: JaxprEqn) -> bool:
    """Whether single columns are put side by side."""
    shapes = [shape_of(atom) for atom in eqn.invars]
    last = eqn.params["dimension"] == len(shapes[0]) - 1
    return last and all(shape[-1] == 1 for shape in shapes)


def pick(eqn: JaxprEqn, operand: Axes, columns: tuple[Axis | None, ...]) -> None:
    """An axis that is picked by its own numbers, from the first to the last, stays."""
    shape, starts = shape_of(eqn.invars[0]), eqn.params["dimension_numbers"]
    for column, axis in zip(columns, starts.start_index_map, strict=False):
        if column is not None and shape[axis] == length(column):
            unify(operand[axis], column)
