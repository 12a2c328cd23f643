"""Statistics from a part of the examples and positions, scaled by what is left out.

Of ``k`` examples in a row one is taken, of ``s`` positions along every axis one; which
one rotates with the number of the layer's refreshes. Sums over the rows taken are
multiplied by ``k sᵈ``, so that their mean over all offsets is the full statistic.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.tagging.sites import ConvGeometry, Site


@dataclasses.dataclass(frozen=True)
class Subsample:
    """Which rows Kronecker factors are estimated from.

    Diagonals, scales and shifts are cheap and always take all.

    Attributes:
        examples: Every how many examples (terms of the loss) one is taken.
        positions: Every how many positions of an example one is taken: along every
            spatial axis of a convolution; of a sequence, of its positions in order.
    """

    examples: int = 1
    positions: int = 1

    def __post_init__(self) -> None:
        """Refuses what is no whole number from 1 on."""
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Subsample.{name} must be a whole number >= 1, got {value!r}."
                )


class Lattice(NamedTuple):
    """The rows that are taken of ``[*blocks, R, d]``, axis by axis of the rows.

    Attributes:
        sizes: Lengths of the rows' axes, ``R`` in all; examples come first.
        strides: Of how many along each axis one is taken.
    """

    sizes: Shape
    strides: Shape

    @property
    def share(self) -> int:
        """What sums over the rows taken are multiplied with."""
        return math.prod(self.strides)

    @property
    def kept(self) -> Shape:
        """Lengths of the axes afterwards; where one does not divide, rounded up."""
        return tuple(-(-n // s) for n, s in zip(self.sizes, self.strides, strict=True))

    @property
    def uneven(self) -> bool:
        """Whether some rows taken lie beyond the end: they are zero."""
        return any(n % s for n, s in zip(self.sizes, self.strides, strict=True))

    def offsets(self, phase: Array) -> list[Any]:
        """The first index taken along each axis, the digits of ``phase``."""
        digits, before = [], 1
        for stride in self.strides:
            digits.append(phase // before % stride if stride > 1 else 0)
            before *= stride
        return digits

    def select(self, x: Array, phase: Array) -> Array:
        """The rows taken of ``[*blocks, R, d]``, ``[*blocks, prod(kept), d]``."""
        lead, d = x.shape[:-2], x.shape[-1]
        x = x.reshape(*lead, *self.sizes, d)
        phase = vary(phase, varying_axes(x))
        axes = zip(self.strides, self.kept, self.offsets(phase), strict=True)
        for axis, (stride, kept, offset) in enumerate(axes, len(lead)):
            if stride == 1:
                continue
            missing = [(0, 0)] * x.ndim
            missing[axis] = (0, kept * stride - x.shape[axis])
            x = jnp.pad(x, missing)
            x = x.reshape(*x.shape[:axis], kept, stride, *x.shape[axis + 1 :])
            x = lax.dynamic_index_in_dim(x, offset, axis + 1, keepdims=False)
        return x.reshape(*lead, math.prod(self.kept), d)


def lattice_of(
    subsample: Subsample, name: str, site: Site, num_examples: int, reduce: bool
) -> Lattice | None:
    """The rows taken at one site; None: all."""
    if subsample == Subsample():
        return None
    rows, each = site.geometry.rows, site.positions
    if each is None:
        raise ValueError(
            f"layer {name}: subsample needs rows in the order of the examples, got "
            f"rows {rows} for {num_examples} examples."
        )
    if num_examples % subsample.examples:
        raise ValueError(
            f"layer {name}: subsample takes one of {subsample.examples} examples, "
            f"which must divide their number, got {num_examples} (rows {rows})."
        )
    if reduce and each > 1 and subsample.positions > 1:
        raise ValueError(
            f"layer {name}: subsample of positions needs weight_sharing='expand', got "
            f"'reduce' with rows {rows} for {num_examples} examples."
        )
    space: Shape = (each,)
    if isinstance(site.geometry, ConvGeometry):
        if rows[0] % num_examples:
            raise ValueError(
                f"layer {name}: subsample wants the examples along the batch axis of a "
                f"convolution, got rows {rows} for {num_examples} examples."
            )
        space = (rows[0] // num_examples, *rows[1:])
    steps = [min(subsample.positions, n) for n in space]
    if isinstance(site.geometry, ConvGeometry):
        steps[0] = 1
    return Lattice((num_examples, *space), (subsample.examples, *steps))
