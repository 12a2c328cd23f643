"""Who inverts what: a static plan, the same on every device.

References:
    Graham, 1969, "Bounds on multiprocessing timing anomalies" (longest processing time
    first); Osawa et al., 2019, arXiv:1811.12019, Sec. 5; Pauloski et al., 2021,
    arXiv:2107.01739.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.factors import (
    field_sizes,
    forms_of,
    packed_size,
    symmetric_field,
)
from kfac_jax_lite.kronecker.inverses import Method, method_named

INVERSES, GRADIENTS = "inverses", "gradients"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ownership of the layers whose factors are sliced over devices.

    Attributes:
        devices: ``D``.
        owners: Layer name to the device that inverts it.
        share: Layer name to what follows an inversion.
        packed: Whether inverses travel as triangles; slices of factors always do.
    """

    devices: int
    owners: dict[str, int]
    share: dict[str, str]
    packed: bool

    def sliced(self, name: str) -> bool:
        """Whether rows of the larger inverse stay on different devices."""
        return self.share.get(name) == GRADIENTS


NOBODY = Plan(1, {}, {}, True)


def make_plan(
    layers: Sequence[LayerTag],
    reduction: Reduction,
    devices: int,
    method: str | Method = "cholesky",
    inverse_interval: Any = 1,
) -> Plan:
    """Assigns every large Kronecker layer to a device."""
    if reduction.mode == "all":
        return NOBODY
    method = method_named(method).name
    if reduction.share == GRADIENTS and method != "cholesky":
        raise ValueError(
            f'Reduction(share="gradients") divides explicit inverses: it goes with '
            f'inverse="cholesky", not {method!r}.'
        )
    owned = [t for t in layers if is_owned(t, reduction, method == "ekfac")]
    period = inverse_interval if isinstance(inverse_interval, int) else 1
    share = {t.name: shared(t, reduction, devices, method, period) for t in owned}
    return Plan(
        devices,
        balanced(owned, devices),
        share,
        reduction.pack,
    )


def is_owned(layer: LayerTag, reduction: Reduction, moments: bool = False) -> bool:
    """Whether the layer is inverted by one device."""
    if reduction.mode == "all" or not layer.kronecker or layer.tied:
        return False
    return not is_small(layer, reduction, moments)


def is_small(layer: LayerTag, reduction: Reduction, moments: bool = False) -> bool:
    """Whether the layer travels in the bucket."""
    return wire_size(layer, reduction, moments) <= reduction.bucket


def wire_size(layer: LayerTag, reduction: Reduction, moments: bool) -> int:
    """Entries of one refresh on the wire, before any padding."""
    if layer.fallback:
        return math.prod(layer.a_shape)
    return sum(field_sizes(layer, reduction.pack, moments).values())


def shared(
    layer: LayerTag, reduction: Reduction, devices: int, method: str, period: int
) -> str:
    """What follows an inversion: the choice that moves fewer bytes per step.

    Either the larger inverse goes to all devices, once in ``period`` steps at most; or
    rows of the preconditioned gradient, filled up to a multiple of the devices, at
    every step.
    """
    side = larger_side(layer)
    if method != "cholesky" or side is None:
        return INVERSES
    if reduction.share != "auto":
        return reduction.share
    rows, other = sorted(layer.sizes, reverse=True)
    rows = -(-rows // devices) * devices
    block = math.prod(layer.stack + layer.blocks) * rows * other
    spared = inverse_sizes(layer, reduction.pack)[side]
    return INVERSES if spared <= period * block else GRADIENTS


def larger_side(layer: LayerTag) -> str | None:
    """The larger factor, ``"a"`` or ``"g"``, if it is kept in full."""
    n_in, n_out = layer.sizes
    form_a, form_g = forms_of(layer)
    side, form = ("a", form_a) if n_in >= n_out else ("g", form_g)
    return side if form.whole else None


def inverse_sizes(layer: LayerTag, packed: bool) -> dict[str, int]:
    """Entries of both inverses on the wire."""
    shapes = {"a": layer.a_shape, "g": layer.g_shape}
    return {
        k: packed_size(s, symmetric_field(layer, k, s, packed))
        for k, s in shapes.items()
    }


def inverse_cost(layer: LayerTag) -> int:
    """Multiplications of an inversion, ``a³ + g³`` for every block."""
    triples = zip(forms_of(layer), (layer.a_shape, layer.g_shape), strict=True)
    return sum(math.prod(s) * (s[-1] if form.matrix else 1) for form, s in triples)


def balanced(layers: Sequence[LayerTag], devices: int) -> dict[str, int]:
    """Owners, longest processing time first, equal shapes together.

    The ``m`` layers of a shape are dealt in chunks of ``⌈m / D⌉``, which an owner
    inverts in one batched call; chunks go, largest first, to the device with the least
    work so far.
    """
    chunks = []
    for alike in grouped(layers):
        size = math.ceil(len(alike) / devices)
        chunks += [alike[i : i + size] for i in range(0, len(alike), size)]
    chunks.sort(key=lambda chunk: -len(chunk) * inverse_cost(chunk[0]))
    load, owners = [0] * devices, {}
    for chunk in chunks:
        device = load.index(min(load))
        load[device] += len(chunk) * inverse_cost(chunk[0])
        owners |= {layer.name: device for layer in chunk}
    return owners


def grouped(
    layers: Sequence[LayerTag], kind: Callable[[LayerTag], Any] | None = None
) -> list[list[LayerTag]]:
    """Layers of equal shape together, if ``kind`` agrees as well."""
    classes: dict[Any, list[LayerTag]] = {}
    for layer in layers:
        more = () if kind is None else kind(layer)
        classes.setdefault((shape_class(layer), more), []).append(layer)
    return list(classes.values())


def shape_class(layer: LayerTag) -> tuple[Any, ...]:
    """Layers that agree in this are inverted in one call."""
    sides = layer.a_shape, layer.g_shape, *forms_of(layer)
    return *sides, layer.sizes, layer.stack


def slice_sizes(layer: LayerTag, plan: Plan) -> tuple[int, int]:
    """Entries of ``A`` and ``G`` that every device keeps, padding included."""
    a, g = inverse_sizes(layer, True).values()
    return -(-a // plan.devices), -(-g // plan.devices)


def held_rows(layer: LayerTag, plan: Plan) -> int:
    """How many rows of the larger inverse a device holds."""
    return -(-max(layer.sizes) // plan.devices)


def parcel_sizes(layer: LayerTag, plan: Plan, method: Method) -> tuple[int, int]:
    """Entries of an owner's parcel to each device: for all devices, and its rows."""
    if plan.sliced(layer.name):
        small = "g" if larger_side(layer) == "a" else "a"
        for_all = inverse_sizes(layer, plan.packed)[small]
        blocks = math.prod(layer.stack + layer.blocks)
        rows = blocks * held_rows(layer, plan) * max(layer.sizes)
        return -(-for_all // plan.devices), rows
    cached = jax.eval_shape(lambda: method.initial(layer, jnp.float32))
    total = sum(
        packed_size(x.shape, inverse_symmetric(layer, k, x.shape, plan.packed))
        for k, x in cached_arrays(cached).items()
    )
    if method.moments:
        total += field_sizes(layer, plan.packed, True)["s"]
    return -(-total // plan.devices), 0


def cached_arrays(cached: Any) -> dict[str, Any]:
    """The arrays of a cached inverse, by name; bases of diagonals are empty."""
    return {
        k: x
        for k, x in cached._asdict().items()
        if not (isinstance(x, tuple) and not x)
    }


def inverse_symmetric(layer: LayerTag, name: str, shape: Shape, packed: bool) -> bool:
    """Whether a cached array travels as a triangle: explicit inverses do."""
    return name in ("a", "g") and symmetric_field(layer, name, shape, packed)
