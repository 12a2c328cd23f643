"""Looking things up in parameter trees and optimiser states, and choosing trees."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def path_key(path: tuple[Any, ...]) -> str:
    """``jax.tree_util.keystr`` of a parameter, the same for a flax NNX variable.

    NNX hands parameters over as variables (``….value``) in one place and as plain
    arrays in another; both are the same parameter.
    """
    return jax.tree_util.keystr(without_value(path))


def without_value(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without a trailing attribute ``value``."""
    attribute = jax.tree_util.GetAttrKey("value")
    return path[:-1] if path and path[-1] == attribute else path


def is_raw_key(leaf: Any) -> bool:
    """Whether it looks like a single PRNG key without a type, as numbers."""
    return getattr(leaf, "dtype", None) == jnp.uint32 and leaf.shape == (2,)


def is_key(leaf: Any) -> bool:
    """Whether it is a PRNG key: a raw one, or typed ones."""
    dtype = getattr(leaf, "dtype", jnp.int32)
    return is_raw_key(leaf) or bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a tree under their ``path_key``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_key(path): leaf for path, leaf in leaves}


def replace_leaves(tree: Any, new: Mapping[str, Any]) -> Any:
    """The tree with some leaves, named by path, replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path_key(path), leaf), tree
    )


def find_states(opt_state: Any, name: str = "KFACState") -> list[Any]:
    """Every state of that name inside an optax state, wherever it is wrapped."""
    if type(opt_state).__name__ == name:
        return [opt_state]
    found = optax.tree_utils.tree_get_all_with_path(opt_state, name)
    return [state for _, state in found]


def choose(condition: Any, new: Any, old: Any) -> Any:
    """``new`` where the condition holds, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def varying_axes(tree: Any) -> frozenset[Hashable]:
    """Mapped axes along which any leaf differs (``shard_map`` with ``check_vma``)."""
    leaves = jax.tree.leaves(tree)
    return frozenset().union(*(varying_of_type(jax.typeof(x)) for x in leaves))


def varying_of_type(kind: Any) -> frozenset[Hashable]:
    """Mapped axes along which values of a type differ."""
    axes = getattr(getattr(kind, "manual_axis_type", kind), "varying", None)
    return getattr(kind, "vma", frozenset()) if axes is None else axes


def vary(tree: Any, axes: frozenset[Hashable]) -> Any:
    """The same values, of a type that varies along these mapped axes as well."""

    def cast(x: Any) -> Any:
        missing = axes - varying_axes(x)
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree
