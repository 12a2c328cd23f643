"""Tags of layers: names, factor shapes and forms, and what a reader should know."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax

from kfac_jax_lite.core.parameter_views import Shape, View
from kfac_jax_lite.core.types import UNREACHED, LayerTag
from kfac_jax_lite.kronecker.factors import DIAGONAL, FULL, form_for
from kfac_jax_lite.tagging.analysis import Walk
from kfac_jax_lite.tagging.examples import terms_of
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
