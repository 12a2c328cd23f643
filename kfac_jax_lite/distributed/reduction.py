"""How statistics travel between devices: ``Reduction`` and means over a mapped axis.

Every statistic is a mean over examples, so devices with equal shares of the batch
average theirs; the number of examples adds up. The caller puts this inside the gate of
a layer: a layer that is not due sends nothing.

References:
    Osawa et al., 2019, arXiv:1811.12019, Sec. 5 (packed factors, reduce-scatter to the
    devices that invert them); Pauloski et al., 2021, arXiv:2107.01739 (KAISA: a
    fraction of the devices shares each layer).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.pytree import varying_axes
from kfac_jax_lite.core.types import Array, DiagonalStatistics, LayerTag, Statistics
from kfac_jax_lite.distributed.collectives import checked_axes, mean, split_in
from kfac_jax_lite.kronecker.factors import (
    from_vector,
    packed_size,
    symmetric_field,
    to_vector,
)

MODES = ("all", "owner")
SHARES = ("auto", "inverses", "gradients")


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How statistics travel between the devices of ``axis_name``, and who inverts.

    ``"all"``: an all-reduce per layer; every device keeps and inverts everything.

    ``"owner"``: a reduce-scatter per layer; each device averages ``1/D`` of every
    factor over time. For an inversion the slices travel to the layer's owner, along a
    binomial tree. Owners are balanced by inverse cost, layers of equal shape together.
    Then either the inverses go to all devices, or each device keeps ``1/D`` of the rows
    of the larger one, preconditions these rows, and the preconditioned gradients are
    gathered at every step; whichever moves fewer bytes.

    ``"owner"`` keeps parts of the state on different devices: see ``kfac.state_specs``.
    Layers that are small, tied, or not Kronecker-factored are treated as in ``"all"``.

    Attributes:
        mode: ``"all"`` or ``"owner"``.
        pack: Send only the upper triangle of symmetric matrices; slices always are.
        dtype: Precision of statistics on the wire, or None for their own. Sums are
            taken in the statistics' precision.
        bucket: Layers with at most this many entries on the wire are small: they
            travel in one collective where all of them are due, and alone otherwise.
        share: What follows an inversion by the owner: ``"inverses"``, ``"gradients"``
            (rows of inverses, for ``inverse="cholesky"``) or ``"auto"``.
        devices: Number of devices; wanted by ``"owner"``.
        mesh: Under ``jit``: the mesh over whose axes ``axis_name`` the inversions are
            spread. XLA reduces the statistics itself, so ``dtype`` plays no part.

    References:
        Osawa et al., 2019, arXiv:1811.12019, Sec. 5; Pauloski et al., 2021,
        arXiv:2107.01739.
    """

    mode: str = "all"
    pack: bool = True
    dtype: Any = None
    bucket: int = 2**14
    share: str = "auto"
    devices: int | None = None
    mesh: Any = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("share", self.share, SHARES),
        ):
            if value not in known:
                raise ValueError(f"Reduction.{name} must be one of {known}: {value!r}.")
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"Reduction.dtype must be floating, got {self.dtype}.")
        if self.bucket < 0:
            raise ValueError(f"Reduction.bucket must not be negative: {self.bucket}.")
        if self.mode != "all" and self.mesh is None and self.devices is None:
            raise ValueError(
                f'Reduction(mode="{self.mode}") wants devices=…, the size of the '
                "mapped axis, or under jit mesh=…."
            )

    def num_devices(self, axis_name: Any) -> int:
        """``D`` where it must be known before the program runs."""
        if self.mesh is None:
            assert self.devices is not None
            return self.devices
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
        unknown = set(names) - set(self.mesh.axis_names)
        if not names or unknown:
            raise ValueError(
                f"axis_name={axis_name!r} must name axes of Reduction.mesh, which has "
                f"{self.mesh.axis_names}."
            )
        return math.prod(self.mesh.shape[name] for name in names)


def wire_vector(layer: LayerTag, statistics: Any, reduction: Reduction) -> Array:
    """A layer's statistics, all fields in one vector."""
    fields = {k: x for k, x in statistics._asdict().items() if x is not None}
    parts = [
        to_vector(x, symmetric_field(layer, k, x.shape, reduction.pack))
        for k, x in fields.items()
    ]
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def from_wire(layer: LayerTag, vector: Array, like: Any, reduction: Reduction) -> Any:
    """The statistics whose ``wire_vector`` this is, shaped ``like`` others."""
    found, start = {}, 0
    for name, x in like._asdict().items():
        if x is None:
            continue
        symmetric = symmetric_field(layer, name, x.shape, reduction.pack)
        size = packed_size(x.shape, symmetric)
        part = vector[start : start + size]
        found[name] = from_vector(part, x.shape, symmetric)
        start += size
    return like._replace(**found)


def reduce_statistics(
    layers: tuple[LayerTag, ...],
    statistics: tuple[Any, ...],
    axis_name: Any,
    reduction: Reduction,
) -> tuple[Any, ...]:
    """Means of layers' statistics over the devices, in one collective."""
    pairs = list(zip(layers, statistics, strict=True))
    vectors = [wire_vector(t, averaged_part(s), reduction) for t, s in pairs]
    if reduction.dtype is not None:  # as many entries as the layers have alone
        parts = lax.axis_size(axis_name)
        vectors = [split_in(vector, parts).ravel() for vector in vectors]
    whole = jnp.concatenate(vectors) if len(vectors) > 1 else vectors[0]
    whole = mean(whole, axis_name, reduction.dtype)
    means, start = [], 0
    for (layer, own), vector in zip(pairs, vectors, strict=True):
        part = whole[start : start + vector.size].astype(vector.dtype)
        new = from_wire(layer, part, averaged_part(own), reduction)
        if isinstance(own, DiagonalStatistics):
            new = whole_diagonal(own, new, axis_name)
        means.append(new)
        start += vector.size
    return tuple(means)


def averaged_part(statistics: Statistics) -> Any:
    """Statistics without what adds up instead of being averaged."""
    if isinstance(statistics, DiagonalStatistics):
        return statistics._replace(num_examples=None)  # type: ignore[arg-type]
    return statistics


def whole_diagonal(own: DiagonalStatistics, new: Any, axis_name: Any) -> Any:
    """A diagonal's mean gradient, with the number of examples added up."""
    gradient = new.gradient
    if summed_already(own.gradient, axis_name):
        gradient = gradient / lax.axis_size(axis_name)
    return DiagonalStatistics(gradient, lax.psum(own.num_examples, axis_name))


def summed_already(gradient: Array, axis_name: Any) -> bool:
    """Whether autodiff has summed a gradient over the devices.

    Under ``shard_map`` with ``check_vma`` it does so for replicated parameters.
    """
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    return bool(checked_axes(axis_name)) and not names & varying_axes(gradient)
