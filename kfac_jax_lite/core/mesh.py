"""Explicit meshes: arrays whose types say how they are sharded.

The library's own arithmetic is left to XLA's partitioner, as on Auto meshes; types are
stated where it hands its results back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

REPLICATED: jax.P = PartitionSpec()


def explicit_mesh(tree: Any) -> Any:
    """The explicit mesh that the leaves are on, or None."""
    # Leaves may come from a part of the loss that is itself automatic
    # (``jax.sharding.auto_axes``): the mesh is then that of the code around.
    meshes = [mesh_of(leaf) for leaf in jax.tree.leaves(tree)]
    known = [mesh for mesh in meshes if mesh is not None and not mesh.empty]
    candidates = [*known, jax.sharding.get_abstract_mesh()] if known else []
    explicit = (m for m in candidates if AxisType.Explicit in m.axis_types)
    return next(explicit, None)


def mesh_of(leaf: Any) -> Any:
    """The mesh in an array's type, if any."""
    return getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)


def specs_of(tree: Any) -> Any:
    """How each leaf is sharded, by its type."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def resharded(tree: Any, mesh: Any, specs: Any = REPLICATED) -> Any:
    """The tree on an explicit mesh, sharded as ``specs`` say; by default replicated."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.reshard(tree, specs)


def zeros_like(array: Any) -> Any:
    """Zeros of an array's type, also where a traced function closes over the array."""
    zeros = jnp.zeros_like(array)
    if explicit_mesh(array) is None:
        return zeros
    return jax.sharding.reshard(zeros, jax.typeof(array).sharding)


def along(function: Callable[[Any], Any], xs: Any, tree: Any = ()) -> Any:
    """``function`` of each entry of ``xs``, at once or, on explicit meshes, in turn."""
    # There a convolution, for one, cannot be mapped: the axis of the entries would have
    # to be merged with one that is sharded.
    explicit = explicit_mesh((xs, tree)) is not None
    return jax.lax.map(function, xs) if explicit else jax.vmap(function)(xs)


def automatic(
    function: Callable[..., Any],
    *args: Any,
    out_specs: Any = REPLICATED,
    mesh: Any = None,
) -> Any:
    """``function(*args)``, intermediate values sharded as XLA likes."""
    mesh = explicit_mesh(args) if mesh is None else mesh
    if mesh is None:
        return function(*args)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in types if kind == AxisType.Explicit)
    run = jax.sharding.auto_axes(function, axes=axes, out_sharding=out_specs)
    with jax.sharding.use_abstract_mesh(mesh):
        return run(*args)
