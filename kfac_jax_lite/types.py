"""The records that flow through the library: static layer facts and statistics.

Static facts (what a layer is, where its parameters live) are frozen dataclasses;
everything that changes from step to step is a ``NamedTuple`` of arrays.

Notation used everywhere: a Kronecker layer computes ``z = W̄ᵀ ā`` for ``R`` rows, with
``ā = [a; 1]`` when it has a bias (homogeneous coordinates), ``W̄ [in(+1), out]``, and
``c = ∂loss/∂z`` the cotangent of the *mean* loss over ``N`` terms.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """How a variable of the traced loss reads one parameter leaf.

    The parameter leaf goes through ``ops`` (transpositions, reshapes, slices: they
    select entries and never combine them), which gives an array of shape ``core``.
    Axis ``i`` of the variable is axis ``axes[i]`` of that array, or a broadcast or
    size-one axis where ``axes[i]`` is None. ``stack`` counts leading leaf axes that
    enclosing ``scan`` loops consume; ``ops`` act behind them.
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

    def read(self, leaf: Array) -> Array:
        """Selects from a leaf-shaped array; returns ``[*stack, *core]``."""

        def select(x):
            for name, argument in self.ops:
                if name == "transpose":
                    x = lax.transpose(x, argument)
                elif name == "reshape":
                    x = lax.reshape(x, argument)
                else:
                    x = lax.slice(x, *argument)
            return x

        for _ in self.stack:
            select = jax.vmap(select)
        return select(leaf)

    def write(self, block: Array, leaf: Array | jax.ShapeDtypeStruct) -> Array:
        """Adjoint of ``read``: puts a block back, zero where the view does not look."""
        like = jax.ShapeDtypeStruct(leaf.shape, block.dtype)
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
        ops = self.ops
        if order + rest != list(range(len(self.core))):
            ops += (("transpose", tuple(order + rest)),)
        if self.shape != tuple(self.core[a] for a in order + rest):
            ops += (("reshape", self.shape),)
        return View(
            self.leaf, self.shape, _axes(self.shape), self.shape, ops, self.stack
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
        ops = settled.ops + (("reshape", tuple(shape)),)
        return View(
            self.leaf, tuple(shape), _axes(shape), tuple(shape), ops, self.stack
        )

    def slice(self, start: Shape, limit: Shape, strides: Shape | None) -> "View | None":
        """The view after ``lax.slice``; None when the variable is broadcast."""
        settled = self.settle()
        if settled is None:
            return None
        start, limit = tuple(map(int, start)), tuple(map(int, limit))
        steps = tuple(map(int, strides)) if strides else (1,) * len(start)
        ranges = zip(start, limit, steps, strict=True)
        shape = tuple(len(range(s, e, k)) for s, e, k in ranges)
        ops = settled.ops + (("slice", (start, limit, steps)),)
        return View(self.leaf, shape, _axes(shape), shape, ops, self.stack)

    def unstack(self) -> "View | None":
        """The view of one slice of the leading axis, as ``scan`` hands it out."""
        settled = self.settle()
        if settled is None or settled.ops:
            return None
        inner = self.shape[1:]
        stack = self.stack + self.shape[:1]
        return View(self.leaf, inner, _axes(inner), inner, (), stack)


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


@dataclasses.dataclass(frozen=True)
class LayerTag:
    """Static facts of one curvature block. Hashable; every parameter is in one.

    Attributes:
        name: Unique name, made from the parameters' path.
        kind: ``"dense"``, ``"conv"``, ``"scale_shift"`` or ``"diagonal"``.
        params: ``jax.tree_util.keystr`` of the parameters, weight before bias.
        a_shape: Shape of the input factor, ``[*blocks, in(+1), in(+1)]``;
            ``[units, k, k]`` for scale_shift, the leaf's shape for diagonal.
        g_shape: Shape of the output factor, ``[*blocks, out, out]``; ``()`` for kinds
            that have a single factor.
        views: How each parameter is read, as ``[*blocks, in, out]`` (weight),
            ``[*blocks, 1, out]`` (bias), ``[units]`` (scale, shift) or the leaf.
        roles: What each parameter is: ``"weight" "bias" "scale" "shift" "leaf"``.
        note: What a reader of the table should know; why it fell back, if it did.
        elements: Number of parameters in the block.
    """

    name: str
    kind: str
    params: tuple[str, ...]
    a_shape: Shape
    g_shape: Shape
    views: tuple[View, ...]
    roles: tuple[str, ...]
    elements: int
    note: str = ""

    @property
    def kronecker(self) -> bool:
        """Whether the block is approximated by ``A ⊗ G``."""
        return self.kind in ("dense", "conv")

    @property
    def factor_elements(self) -> int:
        """Number of statistics elements, symmetric matrices counted in full."""
        g = math.prod(self.g_shape) if self.g_shape else 0
        return math.prod(self.a_shape) + g


class KroneckerStatistics(NamedTuple):
    """Factors of a dense or convolutional layer.

    Attributes:
        a: ``A = (1/N) Σ_r ā āᵀ``, ``[*blocks, in(+1), in(+1)]``, bias last.
        g: ``G = (N²/R) Σ_r c cᵀ``, ``[*blocks, out, out]``.
        s: Only for EKFAC: second moments of the gradient in the eigenbasis,
            ``N Σ_r (Q_Aᵀ ā)²_i (Q_Gᵀ c)²_j``, ``[*blocks, in(+1), out]``.
    """

    a: Array
    g: Array
    s: Array | None = None


class ScaleShiftStatistics(NamedTuple):
    """Unit-wise Fisher blocks of a normalisation layer.

    Attributes:
        blocks: ``F_u = N Σ_n s_n s_nᵀ`` with ``s_n`` the example's gradient with
            respect to (scale, shift) of unit ``u``; ``[units, k, k]``.
    """

    blocks: Array


class DiagonalStatistics(NamedTuple):
    """Mean gradient of a parameter without a rule; squared after reduction.

    Attributes:
        gradient: Gradient of the mean loss, shaped like the parameter.
        num_examples: ``N``; the factor is ``N · gradient²``, for labels drawn from the
            model an unbiased estimate of the Fisher diagonal.
    """

    gradient: Array
    num_examples: Array


Statistics = KroneckerStatistics | ScaleShiftStatistics | DiagonalStatistics


def accumulation_dtype(dtype: Any) -> Any:
    """Float32, or float64 for float64 models: the precision of every factor."""
    return jnp.promote_types(dtype, jnp.float32)
