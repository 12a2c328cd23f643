"""Layers as an optimiser sees them when some of their parameters are masked out.

``optax.masked`` and ``optax.partition`` hide leaves from a transformation. A layer
whose weight is here and whose bias is elsewhere keeps the rows of its block that are
here.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from kfac_jax_lite.core.pytree import path_key
from kfac_jax_lite.core.types import KroneckerStatistics, LayerTag, ScaleShiftStatistics
from kfac_jax_lite.kronecker.factors import BLOCKS, FULL, forms_of


def present_layers(
    layers: Sequence[LayerTag], tree: Any, whole: bool = True
) -> tuple[LayerTag, ...]:
    """The layers, without the parameters that a mask hides."""
    if isinstance(tree, placeholder()):
        return tuple(sorted(layers, key=lambda layer: layer.name))
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
    found = {path_key(path): leaf for path, leaf in leaves}
    check_not_flat(layers, found)
    here = []
    for layer in layers:
        keep = []
        for i, path in enumerate(layer.params):
            if path not in found and hidden(path, found):
                continue
            if path not in found:
                raise ValueError(
                    f"layer {layer.name} owns the parameter {path}, which is not in "
                    "the tree given: the layers were tagged on another model."
                )
            if not is_masked(found[path]):
                keep.append(i)
                check_shape(layer, i, found[path])
        if len(keep) == len(layer.params):
            here.append(layer)
        elif keep:
            here.append(part(layer, keep))
    if whole:
        check_owned(here, found)
    return tuple(sorted(here, key=lambda layer: layer.name))


def check_not_flat(layers: Sequence[LayerTag], found: dict[str, Any]) -> None:
    """All parameters as one vector, as ``optax.flatten`` makes it, have no layers."""
    paths = {path for layer in layers for path in layer.params}
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in found.values()]
    size = sum(layer.elements for layer in layers)
    if shapes == [(size,)] and list(found) == [""] and paths != {""}:
        raise ValueError(
            f"the parameters arrive as one vector of {size} entries, as optax.flatten "
            "makes it, and K-FAC needs them by layer. Flatten the other parts of the "
            "chain alone: optax.chain(kfac.kfac(…), optax.flatten(…))."
        )


@functools.cache
def placeholder() -> type:
    """What ``optax.tree.map_params`` gives to ``init`` in place of parameters."""
    seen: list[type] = []

    def init(params: Any):
        seen.append(type(params))
        return ()

    optax.tree.map_params(init, lambda leaf: leaf, ())
    return seen[0]


def is_masked(node: Any) -> bool:
    """Whether optax has hidden this node."""
    return isinstance(node, optax.MaskedNode)


def hidden(path: str, found: dict[str, Any]) -> bool:
    """Whether a mask hides a whole subtree that the path is in."""
    masked = [p for p, node in found.items() if is_masked(node)]
    return any(path.startswith(p) and path[len(p) : len(p) + 1] in "[." for p in masked)


def check_shape(layer: LayerTag, i: int, leaf: Any) -> None:
    """The leaf must be as large as when it was tagged."""
    view = layer.views[i]
    whole = all(name == "unstack" for name, _ in view.ops)
    wanted = view.stack + view.core
    if whole and tuple(leaf.shape) != wanted:
        raise ValueError(
            f"layer {layer.name}: parameter {layer.params[i]} has shape "
            f"{tuple(leaf.shape)}, tagged as {wanted}."
        )
    if math.prod(leaf.shape) < math.prod(wanted):
        raise ValueError(
            f"layer {layer.name}: parameter {layer.params[i]} has shape "
            f"{tuple(leaf.shape)}, too small for its block {wanted}."
        )


def check_owned(layers: Sequence[LayerTag], found: dict[str, Any]) -> None:
    """Every visible parameter must be in a layer."""
    owned = {path for layer in layers for path in layer.params}
    orphans = [p for p, x in found.items() if not is_masked(x) and p not in owned]
    if orphans:
        raise ValueError(
            f"no layer given owns the parameter {orphans[0]}"
            + (f" (nor {len(orphans) - 1} others)" if len(orphans) > 1 else "")
            + ". Pass all of tagged.layers, or mask the parameter out (optax.masked, "
            "optax.partition)."
        )


def part(layer: LayerTag, keep: list[int]) -> LayerTag:
    """The layer with only some of its parameters."""
    views = tuple(layer.views[i] for i in keep)
    roles = tuple(layer.roles[i] for i in keep)
    a_shape, form = layer.a_shape, forms_of(layer)[0]
    if not layer.kronecker:
        a_shape = a_shape[:-2] + (len(roles),) * 2  # of scales and shifts
    elif roles != ("bias",):
        a_shape = form.without_bias(a_shape)
    elif form is BLOCKS:
        raise ValueError(
            f"layer {layer.name}: its weight is masked out and its bias is not; "
            "with a block-diagonal input factor both must be masked together."
        )
    else:
        a_shape, form = layer.stack + layer.blocks + (1, 1), FULL
    return dataclasses.replace(
        layer,
        params=tuple(layer.params[i] for i in keep),
        views=views,
        roles=roles,
        a_shape=a_shape,
        a_form=form.name,
        elements=sum(math.prod(v.stack + v.core) for v in views),
    )


def part_of_statistics(layer: LayerTag, statistics: Any) -> Any:
    """The rows and columns of whole statistics that a partial layer keeps."""
    if isinstance(statistics, KroneckerStatistics):
        return statistics._replace(a=part_of_input_factor(layer, statistics.a))
    if isinstance(statistics, ScaleShiftStatistics):
        if statistics.blocks.shape[-1] == len(layer.roles):
            return statistics
        i = ("scale", "shift").index(layer.roles[0])
        return ScaleShiftStatistics(statistics.blocks[..., i : i + 1, i : i + 1])
    return statistics


def part_of_input_factor(layer: LayerTag, a: jax.Array) -> jax.Array:
    """The part of ``A`` (in homogeneous coordinates, bias last) of what is kept."""
    if layer.roles != ("bias",):
        return forms_of(layer)[0].leading(a, layer.sizes[0])
    lead = len(layer.stack + layer.blocks)
    return a[..., -1:, None] if a.ndim - lead == 1 else a[..., -1:, -1:]
