"""What travels between devices: every collective of a step, from shapes alone.

References:
    Thakur, Rabenseifner & Gropp, 2005, "Optimization of collective communication
    operations in MPICH" (what a ring sends).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.distributed.assignment import (
    Plan,
    held_rows,
    make_plan,
    parcel_sizes,
    slice_sizes,
)
from kfac_jax_lite.distributed.collectives import permuted
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.factors import field_shapes, field_sizes
from kfac_jax_lite.kronecker.inverses import Method, method_named

REFRESH, INVERSION, STEP = "refresh", "inversion", "step"
AGREEMENTS = (STEP, REFRESH)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        layer: The layer it is for; empty for all of them, once a step.
        event: ``"refresh"`` (statistics), ``"inversion"`` or ``"step"`` (every step).
        kind: ``"all_reduce"``, ``"reduce_scatter"``, ``"all_to_all"``,
            ``"all_gather"`` or ``"permute"``.
        elements: Entries of the whole array that is reduced, scattered or gathered; of
            a permutation, what one pair sends.
        itemsize: Bytes per entry.
        devices: How many devices take part.
        count: Pairs of a permutation, else 1.
    """

    layer: str
    event: str
    kind: str
    elements: int
    itemsize: int
    devices: int
    count: int = 1

    @property
    def payload(self) -> int:
        """Bytes of the whole array, of all pairs of a permutation."""
        return self.elements * self.itemsize * self.count

    @property
    def sent(self) -> float:
        """Bytes that each device sends, on average: rings, and trees of pairs.

        All-reduce ``2 n (D − 1) / D``; reduce-scatter, all-gather and all-to-all
        ``n (D − 1) / D``; a permutation of ``c`` pairs ``n c / D``.
        """
        if self.kind == "permute":
            return self.payload / self.devices
        ring = self.payload * (self.devices - 1) / self.devices
        return 2 * ring if self.kind == "all_reduce" else ring


@dataclasses.dataclass(frozen=True)
class Wire:
    """What all collectives of one optimiser have in common."""

    reduction: Reduction
    plan: Plan
    method: Method
    devices: int
    mapped: bool
    itemsize: int
    memory: int

    def mean(self, layer: str, elements: int) -> Iterator[Collective]:
        """A mean over devices, on every device."""
        narrow = self.reduction.dtype
        if narrow is None:
            yield self.of(layer, REFRESH, "all_reduce", elements)
            return
        padded = -(-elements // self.devices) * self.devices
        size = jnp.dtype(narrow).itemsize
        for kind in ("all_to_all", "all_gather"):
            yield self.of(layer, REFRESH, kind, padded, itemsize=size)

    def of(
        self, layer: str, event: str, kind: str, elements: int, **changes: int
    ) -> Collective:
        """A collective over all devices, in the precision of the statistics."""
        common = {"itemsize": self.itemsize, "devices": self.devices}
        return Collective(layer, event, kind, elements, **(common | changes))

    def tree(self, layer: str, elements: int) -> Iterator[Collective]:
        """A binomial tree over which every device's part travels."""
        for pairs, rows in permuted(self.devices):
            yield self.of(layer, INVERSION, "permute", rows * elements, count=pairs)

    def refresh(self, layer: LayerTag) -> Iterator[Collective]:
        """Statistics of one layer, averaged over devices."""
        name, moments = layer.name, self.method.moments
        owned = name in self.plan.owners
        if not self.mapped:
            # XLA reduces whole matrices where the batch is sharded.
            shapes = {} if layer.fallback else field_shapes(layer, moments)
            for shape in shapes.values():
                yield self.of(name, REFRESH, "all_reduce", math.prod(shape))
        elif layer.fallback:
            yield from self.mean(name, math.prod(layer.a_shape))
            yield self.of(name, REFRESH, "all_reduce", 1, itemsize=4)
        elif not owned:
            sizes = field_sizes(layer, self.reduction.pack, moments)
            yield from self.mean(name, sum(sizes.values()))
        else:
            total = self.devices * sum(slice_sizes(layer, self.plan))
            narrow = self.reduction.dtype
            if narrow is None:
                yield self.of(name, REFRESH, "reduce_scatter", total)
            else:
                size = jnp.dtype(narrow).itemsize
                yield self.of(name, REFRESH, "all_to_all", total, itemsize=size)
            if moments:
                yield from self.mean(name, field_sizes(layer, True, True)["s"])
        if owned:
            for _ in range(self.memory):
                yield self.of(name, REFRESH, "all_reduce", 4)

    def inversion(self, layer: LayerTag) -> Iterator[Collective]:
        """Factors to the owner, and what it sends back."""
        name, plan = layer.name, self.plan
        if name not in plan.owners:
            return
        yield from self.tree(name, sum(slice_sizes(layer, plan)))
        for_all, rows = parcel_sizes(layer, plan, self.method)
        yield from self.tree(name, for_all + rows)
        yield self.of(name, INVERSION, "all_gather", self.devices * for_all)

    def step(self, layer: LayerTag) -> Iterator[Collective]:
        """Preconditioned rows, gathered at every step."""
        if self.plan.sliced(layer.name):
            rows = held_rows(layer, self.plan) * self.devices
            total = math.prod(layer.stack + layer.blocks) * rows * min(layer.sizes)
            yield self.of(layer.name, STEP, "all_gather", total)


def traffic(
    layers: Sequence[LayerTag],
    reduction: Reduction,
    devices: int,
    inverse: str | Method = "cholesky",
    inverse_interval: Any = 1,
    mapped: bool = True,
    itemsize: int = 4,
    memory: int = 0,
) -> tuple[Collective, ...]:
    """Every collective of K-FAC, with the event that causes it.

    The gradient's own all-reduce is the user's and not among them.

    Args:
        layers: ``tagged.layers``.
        reduction: How statistics travel.
        devices: ``D``.
        inverse: Inversion method.
        inverse_interval: Least number of steps between inversions.
        mapped: Under ``pmap`` or ``shard_map``. False: ``jit`` with a sharded batch,
            where XLA reduces the statistics, whole and in their own precision (of a
            convolution it may reduce the products they are made of, which are more).
        itemsize: Bytes of an entry of the statistics.
        memory: How many past statistics the interval rule compares with.

    Returns:
        The collectives; ``layer`` is empty for the agreements on finite values: one in
        every step, one in every step in which any layer is refreshed.
    """
    method = method_named(inverse)
    plan = make_plan(layers, reduction, devices, inverse, inverse_interval)
    wire = Wire(reduction, plan, method, devices, mapped, itemsize, memory)
    found = []
    if mapped or plan.owners:
        # Whether gradients are finite; where something is refreshed, statistics too,
        # and whether all slices of an owned layer are without gradient.
        for event in AGREEMENTS:
            flags = 1 + len(plan.owners) * (event == REFRESH)
            found.append(Collective("", event, "all_reduce", flags, 4, devices))
    for layer in layers:
        found += [*wire.refresh(layer), *wire.inversion(layer), *wire.step(layer)]
    return tuple(found)
