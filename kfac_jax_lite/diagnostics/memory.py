"""What a device keeps of a layer between steps, in bytes of float32."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.flops import full_norm
from kfac_jax_lite.distributed.assignment import (
    Plan,
    held_rows,
    larger_side,
    slice_sizes,
)
from kfac_jax_lite.kronecker.inverses import Method
from kfac_jax_lite.kronecker.precondition import zero_statistics


class Memory(NamedTuple):
    """Bytes that one device keeps between steps.

    Attributes:
        factors: Moving averages.
        previous: Past statistics that the interval rule compares with.
        inverses: What preconditioning reads.
    """

    factors: int
    previous: int
    inverses: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def memory_of(layer: LayerTag, method: Method, plan: Plan, memory: int) -> Memory:
    """Bytes of a layer's state on one device.

    Of an owned layer a device keeps ``1/D`` of the packed factors and, if rows are
    divided, its rows of the larger inverse and all of the smaller.
    """
    zeros, inverse = state_shapes(layer, method)
    factors, inverses = size(zeros), size(inverse)
    if full_norm(layer):
        inverses = factors
    if layer.name in plan.owners:
        factors = 4 * sum(slice_sizes(layer, plan)) + size(getattr(zeros, "s", None))
    if plan.sliced(layer.name):
        larger = inverse.a if larger_side(layer) == "a" else inverse.g
        kept = held_rows(layer, plan) / larger.shape[-1]
        inverses += round((kept - 1) * size(larger))
    return Memory(factors, memory * factors, inverses)


@functools.lru_cache(maxsize=1024)
def state_shapes(layer: LayerTag, method: Method) -> tuple[Any, Any]:
    """Shapes of a layer's factors and inverses, in float32; kept, they are slow."""

    def state():
        zeros = zero_statistics(layer, jnp.float32, method.moments)
        return zeros, method.initial(layer, jnp.float32)

    return jax.eval_shape(state)


def size(tree: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
