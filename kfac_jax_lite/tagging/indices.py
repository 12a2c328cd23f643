"""Axes made of elementary indices, so that reshapes can be followed.

An axis that was flattened from examples and positions is the product of two indices,
the slower one first. Two axes that meet elementwise have the same indices: whatever is
learnt of one (that it splits into two, say) then holds of the other.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

from kfac_jax_lite.core.parameter_views import Shape


@dataclasses.dataclass(eq=False)
class Index:
    """An elementary index: how many values it takes, and what it turned out to be.

    Attributes:
        size: Number of values.
        parts: The indices it was found to be the product of (or equal to), if any.
        number: Of two that are equal the older one stays.
    """

    size: int
    parts: "Axis | None" = None
    number: int = dataclasses.field(default_factory=itertools.count().__next__)


# The indices an axis is the product of, slowest first; none for one of length 0 or 1.
Axis = tuple[Index, ...]
Axes = tuple[Axis, ...]


def fresh(size: int) -> Axis:
    """An axis of which nothing is known."""
    return (Index(size),) if size > 1 else ()


def fresh_axes(shape: Iterable[int]) -> Axes:
    """Axes of a value of which nothing is known."""
    return tuple(map(fresh, shape))


def length(axis: Axis) -> int:
    """How many values an axis takes."""
    return math.prod(index.size for index in axis)


def settled(axis: Iterable[Index]) -> Axis:
    """Indices in the terms of what they are known to be made of."""
    found: list[Index] = []
    left = [*axis][::-1]
    while left:
        index = left.pop()
        if index.parts is None:
            found.append(index)
        else:
            left += index.parts[::-1]
    return tuple(found)


def unify(first: Axis, second: Axis) -> None:
    """Notes that two axes of one length run over the same indices.

    They are matched from the slowest on, as far as their sizes allow.
    """
    left, right = settled(first), settled(second)
    if not left or not right:
        return
    a, b = left[0], right[0]
    if a is b:
        return unify(left[1:], right[1:])
    small, large = sorted((a, b), key=lambda index: (index.size, index.number))
    if large.size % small.size:
        return
    large.parts = (small, *fresh(large.size // small.size))
    unify(left, right)


def unify_all(first: Axes, second: Axes) -> None:
    """The same of all axes of two values of one shape."""
    for a, b in zip(first, second, strict=True):
        unify(a, b)


def reshaped(axes: Axes, shape: Shape) -> Axes:
    """Axes after a reshape; from where it cuts across indices on they are new."""
    left = settled(index for axis in axes for index in axis)
    found: list[Axis] = []
    for i, size in enumerate(shape):
        part = slowest(left, size)
        if part is None:
            return (*found, *fresh_axes(shape[i:]))
        axis, left = part
        found.append(axis)
    return tuple(found)


def slowest(indices: Axis, size: int) -> tuple[Axis, Axis] | None:
    """The slowest indices with ``size`` values in all, and the rest; None: cut."""
    if size <= 1:
        return (), indices
    if not indices:
        return None
    index, rest = indices[0], indices[1:]
    if size % index.size == 0:
        found = slowest(rest, size // index.size)
        return found and ((index, *found[0]), found[1])
    if index.size % size == 0:
        index.parts = (Index(size), Index(index.size // size))
        return slowest(settled(indices), size)
    return None
