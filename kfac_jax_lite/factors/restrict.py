"""Layers as an optimiser sees them when some of their parameters are masked out.

``optax.masked`` and ``optax.partition`` hide leaves from a transformation. A layer
whose weight is here and whose bias is elsewhere keeps the rows of its block that are
here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from kfac_jax_lite.tree import path_key
from kfac_jax_lite.types import KroneckerStatistics, LayerTag, ScaleShiftStatistics


def present_layers(layers: Sequence[LayerTag], tree: Any) -> tuple[LayerTag, ...]:
    """The layers, without the parameters that a mask hides.

    Args:
        layers: Layers of the whole model.
        tree: Parameters or gradients, masked leaves as ``optax.MaskedNode``.

    Returns:
        Layers, sorted by name, that own at least one leaf of the tree.

    Raises:
        ValueError: The tree is not of the model that was tagged.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
    found = {path_key(path): leaf for path, leaf in leaves}
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
    check_owned(here, found)
    return tuple(sorted(here, key=lambda layer: layer.name))


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
    whole = not view.ops
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
    a_shape = layer.a_shape
    if layer.kronecker:
        d = 1 if roles == ("bias",) else layer.a_shape[-1] - 1
        a_shape = a_shape[:-2] + (d, d)
    elif layer.kind == "scale_shift":
        a_shape = a_shape[:1] + (len(roles),) * 2
    return dataclasses.replace(
        layer,
        params=tuple(layer.params[i] for i in keep),
        views=views,
        roles=roles,
        a_shape=a_shape,
        elements=sum(math.prod(v.stack + v.core) for v in views),
    )


def part_of_statistics(layer: LayerTag, statistics: Any) -> Any:
    """The rows and columns of whole statistics that a partial layer keeps."""
    if isinstance(statistics, KroneckerStatistics):
        size = layer.a_shape[-1]
        if statistics.a.shape[-1] == size:
            return statistics
        rows = slice(-1, None) if layer.roles == ("bias",) else slice(0, size)
        return statistics._replace(a=statistics.a[..., rows, rows])
    if isinstance(statistics, ScaleShiftStatistics):
        if statistics.blocks.shape[-1] == len(layer.roles):
            return statistics
        i = ("scale", "shift").index(layer.roles[0])
        return ScaleShiftStatistics(statistics.blocks[:, i : i + 1, i : i + 1])
    return statistics
