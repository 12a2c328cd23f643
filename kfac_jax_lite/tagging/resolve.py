"""From candidate sites to layers: every parameter in exactly one, all of it named."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.tagging.analysis import Walk
from kfac_jax_lite.tagging.layers import (
    ConvGeometry,
    DenseGeometry,
    Site,
    positions_per_example,
)
from kfac_jax_lite.types import LayerTag, Shape, View

ROLES = ("weight", "bias", "scale", "shift")


@dataclasses.dataclass
class Group:
    """Sites that apply the same parameters: one layer in the making."""

    kind: str
    views: dict[str, View]
    sites: list[Site]


def resolve(
    walk: Walk, paths: Sequence[tuple], shapes: Sequence[Shape], num_examples: int
) -> tuple[LayerTag, ...]:
    """Chooses the layers among the candidates of a walk and names them.

    Args:
        walk: What the analysis found; ``site.layer`` is set on the chosen sites.
        paths: Key path of every parameter leaf.
        shapes: Shape of every parameter leaf.
        num_examples: ``N``, the number of terms of the mean loss.

    Returns:
        One tag for every layer, in order of their first parameter.
    """
    reasons: dict[int, str] = {}
    groups = consistent(group_sites(walk, num_examples, reasons), shapes, reasons)
    names = name_groups([[v.leaf for v in g.views.values()] for g in groups], paths)
    tags = []
    for group, name in zip(groups, names, strict=True):
        for site in group.sites:
            site.layer = name
        tags.append(kronecker_or_unit_tag(group, name, paths, walk))
    taken = {v.leaf for t in tags for v in t.views}
    used = {t.name for t in tags}
    for leaf, shape in enumerate(shapes):
        if leaf not in taken:
            reason = fallback_reason(walk, leaf, reasons)
            tags.append(diagonal_tag(leaf, shape, paths[leaf], used, reason))
    return tuple(sorted(tags, key=lambda t: min(v.leaf for v in t.views)))


def group_sites(walk: Walk, num_examples: int, reasons: dict[int, str]) -> list[Group]:
    """Sites by the parameters they apply; sites without an example axis are dropped."""
    groups: dict[tuple, Group] = {}
    for site in walk.sites:
        if site.kind == "scale_shift":
            if positions_per_example(site.geometry.rows, num_examples) is None:
                for view in site.views.values():
                    reasons[view.leaf] = (
                        f"scale or shift without a leading axis of {num_examples} "
                        "examples"
                    )
                continue
        key = (site.kind, site.primary)
        group = groups.setdefault(key, Group(site.kind, dict(site.views), []))
        if group.views != site.views:  # a bias at some sites only: not one block
            main = next(iter(group.views))
            for views in (group.views, site.views):
                for role in [r for r in views if r != main]:
                    reasons[views.pop(role).leaf] = "added at some sites of its layer"
        group.sites.append(site)
    return list(groups.values())


def consistent(
    groups: list[Group], shapes: Sequence[Shape], reasons: dict[int, str]
) -> list[Group]:
    """Drops claims until every claimed leaf is claimed entry by entry exactly once."""
    while True:
        claims: dict[int, list[tuple[Group, str]]] = {}
        for group in groups:
            for role, view in group.views.items():
                claims.setdefault(view.leaf, []).append((group, role))
        bad = [leaf for leaf, c in claims.items() if not exact_cover(c, shapes[leaf])]
        if not bad:
            return groups
        for group, role in claims[bad[0]]:
            reasons[bad[0]] = (
                "only part of it reaches a layer"
                if len(claims[bad[0]]) == 1
                else "shared by layers of different kind or orientation"
            )
            group.views.pop(role)
            for site in group.sites:
                site.views.pop(role, None)
            if role in ("weight", "scale") or not group.views:
                for other in group.views.values():
                    reasons[other.leaf] = "its layer's weight fell back"
                group.views = {}
        groups = [g for g in groups if g.views]


def exact_cover(claims: list[tuple[Group, str]], shape: Shape) -> bool:
    """Whether the views select every entry of the leaf exactly once."""
    views = [group.views[role] for group, role in claims]
    size = math.prod(shape)
    if sum(math.prod(v.stack + v.core) for v in views) != size:
        return False
    if len(views) == 1:
        return True
    seen = np.zeros(size, np.int64)
    with jax.ensure_compile_time_eval():
        index = jnp.arange(size).reshape(shape)
        for view in views:
            seen[np.asarray(view.read(index)).ravel()] += 1
    return bool((seen == 1).all())


def kronecker_or_unit_tag(
    group: Group, name: str, paths: Sequence[tuple], walk: Walk
) -> LayerTag:
    """The tag of a dense, conv or scale_shift layer."""
    roles = tuple(r for r in ROLES if r in group.views)
    views = tuple(group.views[r] for r in roles)
    geometry = group.sites[0].geometry
    stack = views[0].stack
    if isinstance(geometry, (DenseGeometry, ConvGeometry)):
        blocks = stack + geometry.blocks
        n_in = geometry.n_in + ("bias" in roles)
        a_shape, g_shape = (
            blocks + (n_in, n_in),
            blocks + (geometry.n_out, geometry.n_out),
        )
    else:
        a_shape, g_shape = (geometry.units, len(roles), len(roles)), ()
    elsewhere = [p for v in views for p in walk.uses.get(v.leaf, [])]
    note = f"also used by {', '.join(sorted(set(elsewhere)))}" if elsewhere else ""
    return LayerTag(
        name=name,
        kind=group.kind,
        params=tuple(jax.tree_util.keystr(paths[v.leaf]) for v in views),
        a_shape=a_shape,
        g_shape=g_shape,
        views=views,
        roles=roles,
        elements=sum(math.prod(v.stack + v.core) for v in views),
        note=note,
    )


def diagonal_tag(
    leaf: int, shape: Shape, path: tuple, used: set[str], reason: str
) -> LayerTag:
    """The tag of a parameter that no rule recognised."""
    name = unique(plain(path) or "params", used)
    return LayerTag(
        name=name,
        kind="diagonal",
        params=(jax.tree_util.keystr(path),),
        a_shape=shape,
        g_shape=(),
        views=(View.of_leaf(leaf, shape),),
        roles=("leaf",),
        elements=math.prod(shape),
        note=reason,
    )


def fallback_reason(walk: Walk, leaf: int, reasons: dict[int, str]) -> str:
    """Why a leaf is in no layer, in words."""
    if not walk.reached >> leaf & 1:
        return "does not reach the loss"
    if leaf in reasons:
        return reasons[leaf]
    uses = sorted(set(walk.uses.get(leaf, [])))
    return f"no rule for {', '.join(uses)}" if uses else "used in no layer"


def plain(path: tuple) -> str:
    """A key path as ``a/b/0``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def name_groups(groups: list[list[int]], paths: Sequence[tuple]) -> list[str]:
    """Names every group by its parameters' path: the parent if that is unambiguous."""
    owners: dict[tuple, set[int]] = {}
    for number, leaves in enumerate(groups):
        for leaf in leaves:
            owners.setdefault(paths[leaf][:-1], set()).add(number)
    names: list[str] = []
    used: set[str] = set()
    for number, leaves in enumerate(groups):
        parent = paths[leaves[0]][:-1]
        together = all(paths[leaf][:-1] == parent for leaf in leaves)
        alone = parent and together and owners[parent] == {number}
        names.append(unique(plain(parent if alone else paths[leaves[0]]), used))
    return names


def unique(name: str, used: set[str]) -> str:
    """``name``, or ``name.1``, ``name.2`` … if taken; records the choice."""
    base, k, name = name or "params", 0, name or "params"
    while name in used:
        k += 1
        name = f"{base}.{k}"
    used.add(name)
    return name
