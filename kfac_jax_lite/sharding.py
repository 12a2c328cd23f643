"""Explicit meshes: arrays whose types say how they are sharded.

The library's own arithmetic is left to XLA's partitioner, as on Auto meshes; types are
stated where it hands its results back.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

REPLICATED: jax.P = PartitionSpec()


def explicit_mesh(tree: Any) -> Any:
    """The mesh of the first leaf whose type says how it is sharded, or None."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def specs_of(tree: Any) -> Any:
    """How each leaf is sharded, by its type."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def resharded(tree: Any, mesh: Any, specs: Any = REPLICATED) -> Any:
    """The tree on an explicit mesh, sharded as ``specs`` say; by default replicated."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.reshard(tree, specs)


def automatic(
    function: Callable[..., Any],
    *args: Any,
    out_specs: Any = REPLICATED,
    mesh: Any = None,
) -> Any:
    """``function(*args)``, with XLA in charge of how intermediate values are sharded.

    Args:
        function: Any function of arrays.
        *args: Its arguments.
        out_specs: How results are sharded, a tree or a prefix of it.
        mesh: The explicit mesh; None: that of the arguments, if any.

    Returns:
        The results; without an explicit mesh just ``function(*args)``.
    """
    mesh = explicit_mesh(args) if mesh is None else mesh
    if mesh is None:
        return function(*args)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in types if kind == AxisType.Explicit)
    run = jax.sharding.auto_axes(function, axes=axes, out_sharding=out_specs)
    with jax.sharding.use_abstract_mesh(mesh):
        return run(*args)
