"""How a variable of the traced loss reads a parameter leaf: selections only."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.pytree import vary, varying_axes

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """How a variable of the traced loss reads one parameter leaf.

    The parameter leaf goes through ``ops`` (transpositions, reshapes, slices,
    reversals: they select entries and never combine them), which gives an array of
    shape ``core``. Axis ``i`` of the variable is axis ``axes[i]`` of that array, or a
    broadcast or size-one axis where ``axes[i]`` is None. The op ``unstack`` is where a
    ``scan`` consumes the leading axis: later ops act on one slice, and ``stack`` holds
    the lengths of the axes so consumed.
    """

    leaf: int
    core: Shape
    axes: tuple[int | None, ...]
    shape: Shape
    ops: tuple[tuple[str, Any], ...] = ()
    stack: Shape = ()

    @classmethod
    def of_leaf(cls, leaf: int, shape: Shape) -> "View":
        """Returns the view of a whole leaf."""
        return cls(leaf, shape, _axes(shape), shape)

    @property
    def dense(self) -> bool:
        """Whether the variable holds every selected entry exactly once."""
        return math.prod(self.shape) == math.prod(self.core)

    def read(self, leaf: jax.Array) -> jax.Array:
        """Selects from a leaf-shaped array; returns ``[*stack, *core]``."""
        return _select(leaf, self.ops)

    def write(
        self, block: jax.Array, leaf: jax.Array | jax.ShapeDtypeStruct
    ) -> jax.Array:
        """Adjoint of ``read``: puts a block back, zero where the view does not look."""
        like: Any = jax.ShapeDtypeStruct(leaf.shape, block.dtype)
        axes = varying_axes(block)
        if axes:  # devices differ in the block: so they must in what it fills
            like = vary(jnp.zeros(leaf.shape, block.dtype), axes)
        (out,) = jax.linear_transpose(self.read, like)(block)
        return out

    def transpose(self, permutation: Shape) -> "View":
        """The view after ``lax.transpose`` of the variable."""
        return dataclasses.replace(
            self,
            axes=tuple(self.axes[p] for p in permutation),
            shape=tuple(self.shape[p] for p in permutation),
        )

    def broadcast(self, shape: Shape, dims: Shape) -> "View":
        """The view after ``lax.broadcast_in_dim`` of the variable."""
        axes: list[int | None] = [None] * len(shape)
        for axis, dim in zip(self.axes, dims, strict=True):
            axes[dim] = axis
        return dataclasses.replace(self, axes=tuple(axes), shape=tuple(shape))

    def settle(self) -> "View | None":
        """Moves the axis order into ``ops``; None if broadcast axes are in the way."""
        if not self.dense:
            return None
        order = [a for a in self.axes if a is not None]
        rest = [a for a in range(len(self.core)) if a not in order]
        moved = tuple(self.core[a] for a in order + rest)
        ops = _append(self.ops, "transpose", tuple(order + rest))
        if self.shape != moved:
            ops = _append(ops, "reshape", self.shape)
        return self._then(ops, self.shape)

    def _then(self, ops: tuple[tuple[str, Any], ...], shape: Shape) -> "View":
        return dataclasses.replace(
            self, core=shape, axes=_axes(shape), shape=shape, ops=ops
        )

    def reshape(self, shape: Shape) -> "View | None":
        """The view after ``lax.reshape``; None when it mixes broadcast axes."""
        if tuple(shape) == self.shape:
            return self
        axes = remap_unit_axes(self.shape, shape, self.axes)
        if axes is not None:
            return dataclasses.replace(self, axes=axes, shape=tuple(shape))
        settled = self.settle()
        if settled is None:
            return None
        return settled._then(
            _append(settled.ops, "reshape", tuple(shape)), tuple(shape)
        )

    def slice(self, start: Shape, limit: Shape, strides: Shape | None) -> "View | None":
        """The view after ``lax.slice``; None when the variable is broadcast."""
        settled = self.settle()
        if settled is None:
            return self._slice_repeated(start, limit, strides)
        start, limit = tuple(map(int, start)), tuple(map(int, limit))
        steps = tuple(map(int, strides)) if strides else (1,) * len(start)
        ranges = zip(start, limit, steps, strict=True)
        shape = tuple(len(range(s, e, k)) for s, e, k in ranges)
        return settled._then(
            _append(settled.ops, "slice", (start, limit, steps)), shape
        )

    def _slice_repeated(
        self, start: Shape, limit: Shape, strides: Shape | None
    ) -> "View | None":
        """The same where some axes repeat entries: these must be kept whole."""
        own = [i for i, axis in enumerate(self.axes) if axis is not None]
        steps = strides or (1,) * len(start)
        ranges = [range(*map(int, r)) for r in zip(start, limit, steps, strict=True)]
        shape = tuple(len(r) for r in ranges)
        others = [i for i in range(len(shape)) if i not in own]
        if any(shape[i] != self.shape[i] for i in others):
            return None
        bare = dataclasses.replace(
            self,
            axes=tuple(self.axes[i] for i in own),
            shape=tuple(self.shape[i] for i in own),
        )
        if not bare.dense:
            return None
        part = bare.slice(*(tuple(x[i] for i in own) for x in (start, limit, steps)))
        return part and part.broadcast(shape, tuple(own))

    def rev(self, dimensions: Shape) -> "View | None":
        """The view after ``lax.rev``; None when the variable is broadcast."""
        if not dimensions:
            return self
        settled = self.settle()
        if settled is None:
            return None
        return settled._then(_append(settled.ops, "rev", tuple(dimensions)), self.shape)

    def flat(self) -> "View | None":
        """The view as a vector in the order of its core; None if entries are lost."""
        sizes = [self.core[a] for a in self.axes if a is not None]
        if math.prod(sizes) != math.prod(self.core):
            return None
        whole = self._then(self.ops, self.core)
        return whole.reshape((math.prod(self.core),))

    def unstack(self) -> "View | None":
        """The view of one slice of the leading axis, as ``scan`` hands it out."""
        settled = self.settle()
        if settled is None:
            return None
        inner = settled._then(
            _append(settled.ops, "unstack", self.shape[0]), self.shape[1:]
        )
        return dataclasses.replace(inner, stack=self.stack + self.shape[:1])


def _select(x: jax.Array, ops: tuple[tuple[str, Any], ...]) -> jax.Array:
    for number, (name, argument) in enumerate(ops):
        if name == "unstack":
            return jax.vmap(lambda row, rest=ops[number + 1 :]: _select(row, rest))(x)
        if name == "slice":
            x = lax.slice(x, *argument)
        else:
            x = getattr(lax, name)(x, argument)
    return x


def _append(
    ops: tuple[tuple[str, Any], ...], name: str, argument: Any
) -> tuple[tuple[str, Any], ...]:
    """Ops and one more; two transpositions or two reshapes are one."""
    last, before = (ops[-1][0] if ops else None), ops[:-1]
    if name == "transpose":
        if last == "transpose":
            argument = tuple(ops[-1][1][p] for p in argument)
            ops = before
        if argument == tuple(range(len(argument))):
            return ops
    elif name == "reshape" and last == "reshape":
        ops = before
    return (*ops, (name, argument))


def _axes(shape: Shape) -> tuple[int | None, ...]:
    return tuple(i if d > 1 else None for i, d in enumerate(shape))


def remap_unit_axes(
    old: Shape, new: Shape, labels: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Carries axis labels through a reshape that only adds or drops unit axes."""
    kept = [(d, label) for d, label in zip(old, labels, strict=True) if d != 1]
    if [d for d, _ in kept] != [d for d in new if d != 1]:
        return None
    source = iter(kept)
    return tuple(None if d == 1 else next(source)[1] for d in new)
