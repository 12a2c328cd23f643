"""The records that flow through the library: static layer facts and statistics.

Static facts (what a layer is, where its parameters live) are frozen dataclasses;
everything that changes from step to step is a ``NamedTuple`` of arrays.

Notation used everywhere: a Kronecker layer computes ``z = W̄ᵀ ā`` for ``R`` rows, with
``ā = [a; 1]`` when it has a bias (homogeneous coordinates), ``W̄ [in(+1), out]``, and
``c = ∂loss/∂z`` the cotangent of the *mean* loss over ``N`` terms.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as core
import jax.numpy as jnp
import jax.typing as jax_typing

from kfac_jax_lite.core.parameter_views import Shape, View

Array = jax.Array
# Aliases of attributes: what is imported by name from JAX is unknown to a checker that
# reads this package alone (pyright --verifytypes --ignoreexternal).
ArrayLike = jax_typing.ArrayLike
ClosedJaxpr = core.ClosedJaxpr
Jaxpr = core.Jaxpr
JaxprEqn = core.JaxprEqn
Primitive = core.Primitive
Var = core.Var


# The note of a parameter whose gradient is always zero.
UNREACHED = "does not reach the loss"


@dataclasses.dataclass(frozen=True)
class LayerTag:
    """Static facts of one curvature block. Hashable; every parameter is in one.

    Attributes:
        name: Unique name, made from the parameters' path.
        kind: ``"dense"``, ``"conv"``, ``"embedding"``, ``"scale_shift"`` or
            ``"diagonal"``.
        params: ``jax.tree_util.keystr`` of the parameters, weight before bias.
        a_shape: Shape of the input factor, ``[*blocks, in(+1), in(+1)]`` if it is full;
            ``[*stack, units, k, k]`` for scale_shift, the leaf's shape for diagonal.
        g_shape: Shape of the output factor, ``[*blocks, out, out]`` if it is full;
            ``()`` for kinds that have a single factor.
        views: How each parameter is read, as ``[*blocks, in, out]`` (weight),
            ``[*blocks, 1, out]`` (bias), ``[units]`` (scale, shift) or the leaf.
        roles: What each parameter is: ``"weight" "bias" "scale" "shift" "leaf"``.
        elements: Number of parameters in the block.
        note: What a reader of the table should know; why it fell back, if it did.
        a_form: ``"full"``, ``"block_diagonal"`` or ``"diagonal"``: how the input factor
            is kept (see ``kfac_jax_lite.kronecker.factors``).
        g_form: The same of the output factor.
        tied: Whether the weight is also used in the opposite direction.
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
    a_form: str = "full"
    g_form: str = "full"
    tied: bool = False

    @property
    def kronecker(self) -> bool:
        """Whether the block is approximated by ``A ⊗ G``."""
        return self.kind in ("dense", "conv", "embedding")

    @property
    def unitwise(self) -> bool:
        """Whether it has a small block for every unit, as scales and shifts have."""
        return self.kind == "scale_shift"

    @property
    def fallback(self) -> bool:
        """Whether only the squares of its gradient are kept."""
        return self.kind == "diagonal"

    @property
    def one_hot(self) -> bool:
        """Whether its inputs are rows of the identity, whose ``A`` is diagonal."""
        return self.kind == "embedding"

    @property
    def reached(self) -> bool:
        """Whether a gradient can reach it at all."""
        return self.note != UNREACHED

    @property
    def bias(self) -> bool:
        """Whether it has a bias (the last row of its homogeneous coordinates)."""
        return "bias" in self.roles

    @property
    def sizes(self) -> tuple[int, int]:
        """``in(+1)`` and ``out`` of a Kronecker layer."""
        return sum(v.core[-2] for v in self.views), self.views[0].core[-1]

    @property
    def stack(self) -> Shape:
        """Lengths of the axes along which ``scan`` stacks the layer."""
        return self.views[0].stack

    @property
    def blocks(self) -> Shape:
        """Leading axes of a Kronecker layer's weight: groups, experts, members."""
        return self.views[0].core[:-2]

    @property
    def site_shapes(self) -> tuple[Shape, Shape]:
        """Shapes of the factors of one site, without the axes that ``scan`` stacks."""
        return self.a_shape[len(self.stack) :], self.g_shape[len(self.stack) :]

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

    Where a side is too large (``max_factor_dim``), or is an embedding's input, it holds
    that factor's diagonal ``[*blocks, d]`` or diagonal blocks ``[*blocks, k, s, s]``.
    """

    a: Array
    g: Array
    s: Array | None = None


class TiedStatistics(NamedTuple):
    """Factors of a weight ``W [in, out]`` that is used as ``x W`` and as ``y Wᵀ``.

    Attributes:
        a: ``A`` of ``x W``, the side of ``in``.
        g: ``G`` of ``x W``, the side of ``out``.
        a_out: ``A`` of ``y Wᵀ``: the side of ``out``.
        g_out: ``G`` of ``y Wᵀ``: the side of ``in``.
        s: Only for EKFAC: second moments of both uses in the eigenbasis.
    """

    a: Array
    g: Array
    a_out: Array
    g_out: Array
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


class SquareStatistics(NamedTuple):
    """Squared gradients of the examples, of ``tag(…, statistics="squares")``.

    Attributes:
        squares: ``(1/N) Σ_n g_n²``, ``[*blocks, in(+1), out]``, bias last.
    """

    squares: Array


Statistics = (
    KroneckerStatistics
    | TiedStatistics
    | ScaleShiftStatistics
    | DiagonalStatistics
    | SquareStatistics
)


@dataclasses.dataclass(frozen=True)
class GradientRows:
    """A dense layer's gradient as a product of few rows, ``V = Xᵀ C``.

    Attributes:
        x: Homogeneous inputs ``X [R, in(+1)]``.
        c: Cotangents ``C [R, out]`` of the layer's output.
        leaves: The gradient's leaves that hold ``V``. The rows stand for these very
            arrays: whoever clips, averages or accumulates gradients makes others.
    """

    x: Array
    c: Array
    leaves: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Deferred:
    """Statistics that ``update`` computes itself, inside its gate.

    Made by ``TaggedLoss.value_and_grad(…, deferred=True)`` for the ``update`` of the
    same traced step: on a step with nothing due neither zeros nor anything else is
    written in their place.

    Attributes:
        compute: ``(gated) -> {layer name: statistics}``; ``gated`` where no gate is
            around the call, so that a step with nothing due must skip by itself.
        rows: Gradients of layers that are wider than their batch, by layer name.
    """

    compute: Callable[[bool], dict[str, Statistics]]
    rows: dict[str, GradientRows] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: Any) -> Any:
        """Refuses: there is nothing to read yet."""
        raise TypeError(
            f"statistics[{name!r}] is deferred: update computes it. To read "
            "statistics, call value_and_grad without deferred=True."
        )


def computed(statistics: Any, gated: bool = False) -> Any:
    """Statistics by layer name, of whatever ``value_and_grad`` returned."""
    return statistics.compute(gated) if isinstance(statistics, Deferred) else statistics


def accumulation_dtype(dtype: Any) -> Any:
    """Float32, or float64 for float64 models: the precision of every factor."""
    return jnp.promote_types(dtype, jnp.float32)
