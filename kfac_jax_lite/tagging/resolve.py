"""From candidate sites to layers: every parameter in exactly one, all of it named.

Tags say names, factor shapes and forms, and what a reader should know.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.parameter_views import Shape, View
from kfac_jax_lite.core.types import UNREACHED, LayerTag
from kfac_jax_lite.kronecker.factors import DIAGONAL, FULL, form_for
from kfac_jax_lite.tagging.analysis import Walk
from kfac_jax_lite.tagging.example_axes import terms_of
from kfac_jax_lite.tagging.sites import ScaleShiftGeometry, Site

REPARAMETRISED = (
    "used as a function of its entries: the derivative enters by row and by column"
)
ROLES = ("weight", "bias", "scale", "shift")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of the loss beside its jaxpr.

    Attributes:
        paths: Key path of every parameter leaf.
        shapes: Shape of every parameter leaf.
        num_examples: ``N``, the number of terms of the mean loss.
        terms: ``N_k`` of every marked output.
        batch_sizes: Leading axes of the arguments.
        max_factor_dim: Largest Kronecker factor that is kept in full.
    """

    paths: Sequence[tuple[Any, ...]]
    shapes: Sequence[Shape]
    num_examples: int
    terms: Sequence[int]
    batch_sizes: Collection[int]
    max_factor_dim: int

    def examples(self, site: Site) -> int:
        """``N`` of the outputs that depend on a site."""
        return terms_of(site, self.terms, self.num_examples)


@dataclasses.dataclass
class Group:
    """Sites that apply the same parameters: one layer in the making."""

    kind: str
    views: dict[str, View]
    sites: list[Site]
    tied: bool = False


def layer_tag(group: Group, name: str, facts: Facts, walk: Walk) -> LayerTag:
    """The tag of a layer that is not a fallback."""
    roles = tuple(r for r in ROLES if r in group.views)
    views = tuple(group.views[r] for r in roles)
    geometry = group.sites[0].geometry
    notes = []
    form_a = form_g = FULL
    if isinstance(geometry, ScaleShiftGeometry):
        a_shape = (*views[0].stack, geometry.units, len(roles), len(roles))
        g_shape: Shape = ()
    else:
        blocks, limit = views[0].stack + geometry.blocks, facts.max_factor_dim
        n_in, n_out = geometry.n_in + ("bias" in roles), geometry.n_out
        one_hot = group.kind == "embedding"
        form_a = DIAGONAL if one_hot else form_for(n_in, limit)
        form_g = form_for(n_out, limit)
        a_shape = form_a.shape(blocks, n_in, limit)
        g_shape = form_g.shape(blocks, n_out, limit)
        for side, form, size in (("A", form_a, n_in), ("G", form_g, n_out)):
            if not form.whole and not (one_hot and side == "A"):
                kept = form.name.replace("_", "-")
                notes.append(f"factor {side} is {kept} ({size:,} > {limit:,})")
    elements = sum(math.prod(v.stack + v.core) for v in views)
    scales = [s for site in group.sites for s in getattr(site.geometry, "scales", ())]
    if any(scale.side == "both" for scale in scales):
        notes.append(REPARAMETRISED)
    if group.tied:
        notes.append("also used in the opposite direction")
    if views[0].leaf not in walk.uses and once_for_all(group, facts):
        notes.append("applied once for the whole batch: its rows are not examples")
    elsewhere = [p for v in views for p in walk.uses.get(v.leaf, [])]
    if elsewhere and not any(site.by_hand for site in group.sites):
        notes.append(f"also used by {', '.join(sorted(set(elsewhere)))}")
    return LayerTag(
        name=name,
        kind=group.kind,
        params=tuple(jax.tree_util.keystr(facts.paths[v.leaf]) for v in views),
        a_shape=a_shape,
        g_shape=g_shape,
        views=views,
        roles=roles,
        elements=elements,
        note="; ".join(notes),
        a_form=form_a.name,
        g_form=form_g.name,
        tied=group.tied,
    )


def once_for_all(group: Group, facts: Facts) -> bool:
    """Whether a lookup or product has no rows of its own for every example.

    The rows of all members of an ensemble, or of all experts, count together.
    """

    def few(site: Site) -> bool:
        shape = site.geometry.blocks + site.geometry.rows
        rows = math.prod(shape) * site.repeat * site.devices
        return rows < facts.examples(site) and not set(shape) & set(facts.batch_sizes)

    return group.kind != "scale_shift" and any(map(few, group.sites))


def with_unused(tags: list[LayerTag], facts: Facts) -> list[LayerTag]:
    """Counts entries that reach no layer to the first tag that has their leaf."""
    left: dict[int, int] = {}
    for view in (view for tag in tags for view in tag.views):
        size = left.get(view.leaf, math.prod(facts.shapes[view.leaf]))
        left[view.leaf] = size - math.prod(view.stack + view.core)
    return [
        plus_unused(tag, sum(left.pop(leaf, 0) for leaf in {v.leaf for v in tag.views}))
        for tag in tags
    ]


def plus_unused(tag: LayerTag, unused: int) -> LayerTag:
    """The tag with entries that do not reach the loss."""
    if not unused:
        return tag
    notes = [tag.note] if tag.note else []
    note = "; ".join([*notes, f"{unused:,} entries do not reach the loss"])
    return dataclasses.replace(tag, elements=tag.elements + unused, note=note)


def diagonal_tag(
    leaf: int, shape: Shape, path: tuple[Any, ...], used: set[str], reason: str
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
        return UNREACHED
    if leaf in reasons:
        return reasons[leaf]
    uses = sorted(set(walk.uses.get(leaf, [])))
    return f"no rule for {', '.join(uses)}" if uses else "used in no layer"


def plain(path: tuple[Any, ...]) -> str:
    """A key path as ``a/b/0``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def name_groups(groups: list[list[int]], paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names every group by its parameters' path: the parent if that is unambiguous."""
    owners: dict[tuple[Any, ...], set[int]] = {}
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


def resolve(walk: Walk, facts: Facts) -> tuple[LayerTag, ...]:
    """Chooses the layers among the candidates of a walk and names them."""
    reasons: dict[int, str] = {}
    groups = tie(group_sites(walk, facts, reasons), walk)
    groups = consistent(groups, walk, facts.shapes, reasons)
    leaves = [[v.leaf for v in g.views.values()] for g in groups]
    names = name_groups(leaves, facts.paths)
    tags = []
    for group, name in zip(groups, names, strict=True):
        for site in group.sites:
            site.layer = name
        tags.append(layer_tag(group, name, facts, walk))
    tags = with_unused(tags, facts)
    taken = {v.leaf for t in tags for v in t.views}
    used = {t.name for t in tags}
    for leaf, shape in enumerate(facts.shapes):
        if leaf not in taken:
            reason = fallback_reason(walk, leaf, reasons)
            tags.append(diagonal_tag(leaf, shape, facts.paths[leaf], used, reason))
    return tuple(sorted(tags, key=lambda t: min(v.leaf for v in t.views)))


def group_sites(walk: Walk, facts: Facts, reasons: dict[int, str]) -> list[Group]:
    """Sites by the parameters they apply.

    A bias that only some sites of its layer add is a block of its own. Scales and
    shifts without an example axis are dropped.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    waiting = batched_sites(walk, facts)
    loose = ungrouped(walk, waiting)
    for site in waiting:
        if site.kind == "scale_shift" and loose & set(site.views.values()):
            for view in site.views.values():
                walk.uses[view.leaf].append(
                    "a scale or shift without an axis of "
                    f"{facts.examples(site)} examples"
                )
            continue
        key = (site.kind, site.primary)
        group = groups.setdefault(key, Group(site.kind, dict(site.views), []))
        if group.views != site.views:
            for views, sites in ((group.views, group.sites), (site.views, [site])):
                for role in [r for r in views if r != next(iter(views))]:
                    if role == "bias":
                        waiting += [bias_alone(s, walk) for s in sites]
                    else:
                        reasons[views[role].leaf] = "added at some sites of its layer"
                    views.pop(role)
                    for other in sites:
                        other.views.pop(role, None)
        group.sites.append(site)
    return list(groups.values())


def batched_sites(walk: Walk, facts: Facts) -> list[Site]:
    """The sites, without those that apply a weight outside the batch.

    A weight may meet single vectors beside its layer, such as the singular vectors of
    spectral normalisation: fewer rows than the batch has examples. And of a sampled
    Fisher, what no marked output depends on has no rows.
    """

    def whole(site: Site) -> bool:
        n, rows = facts.examples(site), math.prod(site.geometry.rows)
        sizes = [size for size in facts.batch_sizes if size > 1 and n % size == 0]
        return rows * site.repeat * site.devices >= min((n, *sizes))

    def counts(site: Site) -> bool:
        return whole(site) and (not site.unmarked or site.kind == "scale_shift")

    seen: set[tuple[str, View]] = set()
    for site in filter(counts, walk.sites):
        seen.add((site.kind, site.primary))
        if "weight" in site.views:  # in either direction
            seen.add((site.kind, swapped(site.primary)))
    kept = []
    for site in walk.sites:
        if counts(site) or (site.kind, site.primary) not in seen:
            kept.append(site)
            continue
        outside = "what no marked output depends on"
        if not whole(site):
            outside = "products outside the batch"
        for view in site.views.values():
            walk.uses[view.leaf].append(outside)
    return kept


def ungrouped(walk: Walk, waiting: list[Site]) -> set[View]:
    """Scales and shifts with a use whose rows do not belong to examples.

    They fall back with all their uses: a block without one of them would be wrong.
    """
    sites = [s for s in walk.sites if s.kind == "scale_shift"]
    bad = [s for s in sites if s.positions is None or s not in waiting]
    found: set[View] = set()
    while more := {v for s in bad for v in s.views.values()} - found:
        found |= more
        bad = [s for s in sites if found & set(s.views.values())]
    return found


def bias_alone(site: Site, walk: Walk) -> Site:
    """A site for the bias of a dense layer or convolution, taken out of its block."""
    views = {"bias": site.views["bias"]}
    geometry = dataclasses.replace(site.geometry, n_in=0)
    alone = dataclasses.replace(
        site, kind="dense", views=views, geometry=geometry, reverse=False
    )
    plan, index = alone.place  # type: ignore[misc]
    plan.sites[index].append(alone)
    walk.sites.append(alone)
    return alone


def tie(groups: list[Group], walk: Walk) -> list[Group]:
    """Joins uses of one weight in opposite directions; a lookup is the forward one."""
    # By their views in either direction: of a vector, turning twice reads another way.
    found: dict[View, Group] = {}
    mirrored: dict[View, Group] = {}
    joined: list[Group] = []
    for group in sorted(groups, key=lambda g: g.kind != "embedding"):
        weight = group.views.get("weight")
        if weight is None or group.kind not in ("dense", "embedding"):
            joined.append(group)
            continue
        forward = found.get(swapped(weight)) or mirrored.get(weight)
        if forward is None or group.kind == "embedding":
            found.setdefault(weight, group)
            mirrored.setdefault(swapped(weight), group)
            joined.append(group)
            continue
        for site in group.sites:
            site.reverse = True
        joined += split_bias(group, walk) + split_bias(forward, walk)
        forward.sites += group.sites
        forward.tied = True
    return joined


def split_bias(group: Group, walk: Walk) -> list[Group]:
    """Takes the bias out of a group; returns it as a group of its own, if any."""
    if "bias" not in group.views:
        return []
    alone = [bias_alone(site, walk) for site in group.sites]
    for site in group.sites:
        site.views.pop("bias")
    return [Group("dense", {"bias": group.views.pop("bias")}, alone)]


def swapped(weight: View) -> View:
    """The view ``[*blocks, out, in]`` of a weight ``[*blocks, in, out]``."""
    order = list(range(len(weight.core)))
    order[-2:] = reversed(order[-2:])
    turned = weight.transpose(tuple(order)).settle()
    assert turned is not None, "weights hold every entry once"
    return turned


def consistent(
    groups: list[Group], walk: Walk, shapes: Sequence[Shape], reasons: dict[int, str]
) -> list[Group]:
    """Drops claims until every claimed leaf is claimed entry by entry exactly once.

    A leaf of which only a part reaches the loss may be claimed in that part.
    """
    while True:
        claims: dict[int, list[tuple[Group, str]]] = {}
        for group in groups:
            for role, view in group.views.items():
                claims.setdefault(view.leaf, []).append((group, role))
        bad = []
        for leaf, claimed in claims.items():
            elsewhere = leaf in walk.uses or leaf in reasons
            if not covered(claimed, shapes[leaf], part=not elsewhere):
                bad.append(leaf)
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


def covered(claims: list[tuple[Group, str]], shape: Shape, part: bool) -> bool:
    """Whether the views select every entry of the leaf once (``part``: or never)."""
    views = [group.views[role] for group, role in claims]
    size, claimed = math.prod(shape), sum(math.prod(v.stack + v.core) for v in views)
    if claimed > size or (claimed < size and not part):
        return False
    if len(views) == 1:
        return True
    seen = np.zeros(size, np.int64)
    with jax.ensure_compile_time_eval():
        index = jnp.arange(size).reshape(shape)
        for view in views:
            seen[np.asarray(view.read(index)).ravel()] += 1
    return bool((seen <= 1).all())
