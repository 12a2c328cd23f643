"""Vectors between the devices of a mapped axis: means, slices, trees.

Every function is called on all devices of ``axis_name`` at once, inside ``pmap`` or
``shard_map``. What comes out equal on all devices is typed so under ``check_vma``.

References:
    Thakur, Rabenseifner & Gropp, 2005, "Optimization of collective communication
    operations in MPICH" (rings and binomial trees).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def checked_axes(axis_name: Any) -> frozenset[Hashable]:
    """The mapped axes where types say what varies over devices, else nothing."""
    return varying_axes(lax.axis_index(axis_name))


def varied(tree: Any, axis_name: Any) -> Any:
    """The same values, typed as varying over the devices."""
    return vary(tree, checked_axes(axis_name))


def split_in(vector: Array, parts: int) -> Array:
    """A vector as ``[parts, ⌈n / parts⌉]``, filled up with zeros."""
    missing = -vector.size % parts
    return jnp.pad(vector, (0, missing)).reshape(parts, -1)


def mean(vector: Array, axis_name: Any, wire: Any = None) -> Array:
    """Mean over devices, on every device.

    Args:
        vector: ``[n]``.

    Returns:
        ``[n]``.
    """
    if wire is None:
        return lax.pmean(vector, axis_name)
    parts = split_in(vector, lax.axis_size(axis_name))
    own = scattered_mean(parts, axis_name, wire)
    bits, dtype = as_bits(own.astype(wire)), vector.dtype
    bits = lax.all_gather(bits, axis_name, tiled=True, to="invarying")
    return lax.bitcast_convert_type(bits, wire).astype(dtype)[: vector.size]


def scattered_mean(parts: Array, axis_name: Any, wire: Any = None) -> Array:
    """Mean over devices of ``[devices, n]``; device ``i`` gets row ``i``."""
    parts = varied(parts, axis_name)
    if wire is None:
        total = lax.psum_scatter(parts, axis_name, scatter_dimension=0)
    else:
        bits = lax.all_to_all(as_bits(parts.astype(wire)), axis_name, 0, 0)
        received = lax.bitcast_convert_type(bits, wire).astype(parts.dtype)
        total = received.sum(0)
    return total / lax.axis_size(axis_name)


def as_bits(x: Array) -> Array:
    """The same bits as whole numbers: no backend widens these on the wire."""
    return lax.bitcast_convert_type(x, BITS[x.dtype.itemsize])


def gathered(part: Array, axis_name: Any) -> Array:
    """Rows ``[devices, *part.shape]`` of all devices."""
    return lax.all_gather(part, axis_name, to="invarying")


def tree_pairs(devices: int, root: int) -> list[list[tuple[int, int]]]:
    """Rounds of a binomial tree, leaves first: pairs of (child, parent).

    In round ``j`` the device at distance ``q`` from the root sends ``2^j`` rows to
    distance ``q − 2^j`` where ``q`` is an odd multiple of ``2^j``.
    """
    rounds, width = [], 1
    while width < devices:
        senders = range(width, devices, 2 * width)
        pairs = [((root + q) % devices, (root + q - width) % devices) for q in senders]
        rounds.append(pairs)
        width *= 2
    return rounds


def to_root(part: Array, axis_name: Any, devices: int, root: int) -> Array:
    """All devices' rows on one device.

    Args:
        part: This device's row ``[n]``.

    Returns:
        ``[devices, n]``; of no meaning on other devices.
    """
    rows = part[None]
    for pairs in tree_pairs(devices, root):
        rows = jnp.concatenate([rows, lax.ppermute(rows, axis_name, pairs)])
    return jnp.roll(rows[:devices], root, axis=0)


def from_root(rows: Array, axis_name: Any, devices: int, root: int) -> Array:
    """One device's rows dealt out: device ``i`` gets row ``i``.

    Args:
        rows: ``[devices, n]``, read on the root only.

    Returns:
        ``[n]``.
    """
    rounds = tree_pairs(devices, root)
    rows = jnp.roll(rows, -root, axis=0)
    rows = jnp.pad(rows, ((0, 2 ** len(rounds) - devices), (0, 0)))
    distance = (lax.axis_index(axis_name) - root) % devices
    for number in reversed(range(len(rounds))):
        width = 2**number
        back = [(parent, child) for child, parent in rounds[number]]
        received = lax.ppermute(rows[width:], axis_name, back)
        receives = distance % (2 * width) == width
        rows = jnp.where(receives, received, rows[:width])
    return rows[0]


def permuted(devices: int) -> Sequence[tuple[int, int]]:
    """What a tree sends: ``(pairs, rows)`` of every round."""
    return [(len(p), 2**j) for j, p in enumerate(tree_pairs(devices, 0))]
