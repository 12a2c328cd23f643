"""Uses of a layer before the examples appear, tapped as if broadcast over them.

Reverse mode acts on a cotangent that is the same for all examples, so that the last
layer of ``jax.hessian(network)`` is applied once for the whole batch; the tangents of a
Laplacian are the same for all, too. Such a use has a cotangent for every example all
the same: each example's at the place where the value meets what differs between
examples. To see it, the layer's output is broadcast over the examples, ``[N, …]``, and
taken along, one copy for each, until it meets the axis of examples:

* an equation whose other operands have no such axis acts on every copy (``map``);
* where a new axis turns out to be that of the examples, copies take its place
  (``broadcast``);
* elementwise and in a product (``dot_general``), copy ``n`` meets example ``n``.

Where it meets something else, leads to the loss without meeting an example, or would
be larger than anything that every example has, the use stays as it is.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from kfac_jax_lite.core.types import Array, JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import Scope, Walk, leaves_of, shape_of
from kfac_jax_lite.tagging.example_axes import (
    ELEMENTWISE,
    Examples,
    Followed,
    Index,
    Place,
    place_of,
    positions,
    row_axes,
    settled,
)
from kfac_jax_lite.tagging.sites import CALLS, DenseGeometry, Plan, Site, Step, inside

ALIKE = frozenset(ELEMENTWISE.split())
Origins = frozenset[Site]


class Failure(Exception):
    """Copies cannot be taken along."""

    def __init__(self, origins: Origins):
        super().__init__()
        self.origins: Origins = origins


def spread_sites(walk: Walk, found: Followed, known: dict[Place, Examples]) -> None:
    """Finds the uses that can be tapped as if broadcast, and gives them rows."""
    groups: dict[Index, set[Site]] = {}
    for site in walk.sites:
        terms = settled(known[place_of(site)].terms)
        if terms and is_candidate(walk, site, found, terms):
            groups.setdefault(terms[0], set()).add(site)
    for index, sites in groups.items():
        for site in Spreading(walk, found, index).possible(sites):
            before = row_axes(walk, site, found) or ()
            site.spread = index.size
            site.geometry = broadcast_geometry(site.geometry, index.size)
            axes = ((index,), *before)
            site.positions = positions(site, axes, known[place_of(site)])


def plan_spreads(walk: Walk, found: Followed, known: dict[Place, Examples]) -> None:
    """Notes at every equation what becomes of the copies that the sites make."""
    groups: dict[Index, set[Site]] = {}
    for site in walk.sites:
        if not site.spread or site.layer is None:
            continue
        groups.setdefault(settled(known[place_of(site)].terms)[0], set()).add(site)
    for index, own in groups.items():
        Spreading(walk, found, index).run(own)


def is_candidate(
    walk: Walk, site: Site, found: Followed, terms: Sequence[Index]
) -> bool:
    """Whether a site's output has no axis of examples."""
    plan, index = site.place  # type: ignore[misc]
    var: Any = walk.scopes[plan].jaxpr.eqns[index].outvars[site.output]
    axes = found.get(plan, {}).get(var)
    if axes is None or not isinstance(site.geometry, DenseGeometry):
        return False
    seen = {i for axis in axes for i in settled(axis)}
    return site.kind == "dense" and not site.by_hand and not seen & set(terms)


def broadcast_geometry(geometry: Any, size: int) -> DenseGeometry:
    """The geometry of a use whose input and output have the examples in front."""

    def moved(order: Sequence[int], blocks: int):
        later = tuple(i + 1 for i in order)
        return (*later[:blocks], 0, *later[blocks:])

    blocks = len(geometry.blocks)
    return dataclasses.replace(
        geometry,
        rows=(size, *geometry.rows),
        input_order=moved(geometry.input_order, 0 if geometry.shared else blocks),
        output_order=moved(geometry.output_order, blocks),
    )


class Spreading:
    """Follows copies through the program; one axis of examples.

    Args:
        walk: The walk over the loss.
        found: Axes of every variable.
        index: What numbers the examples.
    """

    def __init__(self, walk: Walk, found: Followed, index: Index):
        self.walk: Walk = walk
        self.found: Followed = found
        self.index: Index = index
        self.sites: set[Site] = set()
        self.origins: dict[Plan, dict[Var, Origins]] = {}
        self.steps: dict[Plan, dict[int, Step]] = {}
        self.largest: int = self._largest()

    def _largest(self) -> int:
        """The most numbers that one variable holds for every example."""
        sizes = [0]
        for plan, axes in self.found.items():
            scope = self.walk.scopes.get(plan)
            for var, own in axes.items():
                if scope and var in scope.live.variables and self.place(own) != ():
                    sizes.append(math.prod(shape_of(var)) // self.index.size)
        return max(sizes)

    def place(self, axes: Any) -> tuple[int, ...]:
        """Along which axes the examples are."""
        return tuple(i for i, axis in enumerate(axes) if self.index in settled(axis))

    def possible(self, sites: set[Site]) -> set[Site]:
        """The largest set of these sites that can be followed."""
        sites = set(sites)
        while sites:
            try:
                self.run(sites, note=False)
            except Failure as failure:
                sites -= failure.origins
            else:
                return sites
        return sites

    def run(self, sites: set[Site], note: bool = True) -> None:
        """Follows the copies of these sites' outputs from where they begin."""
        self.sites, self.origins, self.steps = sites, {}, {}
        scopes = self.walk.scopes
        inner = {c for plan in scopes for own in plan.children.values() for c in own}
        (outer,) = (plan for plan in scopes if plan not in inner)
        loss = self.follow(scopes[outer], {})[0]
        if loss:
            raise Failure(loss)
        if note:
            for plan, steps in self.steps.items():
                plan.steps |= steps

    def follow(self, scope: Scope, entering: dict[Var, Origins]) -> list[Origins]:
        """Follows copies through one jaxpr; returns those of its results."""
        plan, jaxpr = scope.plan, scope.jaxpr
        if plan not in self.found:
            return [frozenset()] * len(jaxpr.outvars)
        spread = self.origins[plan] = dict(entering)
        for number, eqn in enumerate(jaxpr.eqns):
            if number not in scope.live.equations:
                continue
            results = self.equation(scope, number, eqn)
            for site in plan.sites.get(number, ()):
                if site in self.sites:
                    results[site.output] |= {site}
            for var, own in zip(eqn.outvars, results, strict=True):
                if own:
                    spread[var] = own
        return [
            frozenset() if isinstance(v, Literal) else spread.get(v, frozenset())
            for v in jaxpr.outvars
        ]

    def equation(self, scope: Scope, number: int, eqn: JaxprEqn) -> list[Origins]:
        """Which results of an equation are copies, and how they are made."""
        plan, name = scope.plan, eqn.primitive.name
        spread = self.origins[plan]
        own = [
            frozenset() if isinstance(a, Literal) else spread.get(a, frozenset())
            for a in eqn.invars
        ]
        origins: Origins = frozenset().union(*own)
        none: list[Origins] = [frozenset()] * len(eqn.outvars)
        children = plan.children.get(number, ())
        if name in CALLS and len(children) == 1:
            return self.call(plan, number, eqn, own)
        for child in children:  # a loop or branch: copies begin and end inside
            if any(self.follow(self.walk.scopes[child], {})):
                raise Failure(self.begun(child))
        if not origins:
            return none
        if any(p.sites or p.marks or self.steps.get(p) for p in children):
            raise Failure(origins)
        read = {leaf for a in eqn.invars for leaf in leaves_of(scope.fact(a))}
        tapped = [s for s in plan.sites.get(number, ()) if s in self.sites]
        known = {s.views["bias"].leaf for s in origins if "bias" in s.views}
        if number in plan.marks or (not tapped and read - known):
            raise Failure(origins)
        step = self.step(plan, eqn, [bool(o) for o in own])
        if step is None:
            raise Failure(origins)
        self.steps.setdefault(plan, {})[number] = step
        return [origins] * len(eqn.outvars) if step.name == "map" else none

    def begun(self, plan: Plan) -> Origins:
        """The sites whose copies begin in a jaxpr or in one inside it."""
        own = {s for sites in plan.sites.values() for s in sites if s in self.sites}
        inner = (c for children in plan.children.values() for c in children)
        return frozenset(own).union(*map(self.begun, inner))

    def call(
        self, plan: Plan, number: int, eqn: JaxprEqn, own: Sequence[Origins]
    ) -> list[Origins]:
        """A program that runs in line."""
        (child,) = plan.children[number]
        pairs = zip(inside(eqn).jaxpr.invars, own, strict=True)
        results = self.follow(self.walk.scopes[child], {v: o for v, o in pairs if o})
        if any(own) or self.steps.get(child) or any(results):
            self.steps.setdefault(plan, {})[number] = Step("call", 0)
        return results

    def step(self, plan: Plan, eqn: JaxprEqn, copies: Sequence[bool]) -> Step | None:
        """What to do at an equation some of whose operands are copies."""
        axes, name = self.found[plan], eqn.primitive.name
        places: list[tuple[int, ...]] = [
            () if c or isinstance(a, Literal) else self.place(axes.get(a, ()))
            for a, c in zip(eqn.invars, copies, strict=True)
        ]
        outs = [self.place(axes[v]) for v in eqn.outvars]
        if not any(places) and not any(outs):
            sizes = [math.prod(shape_of(v)) for v in eqn.outvars]
            return Step("map", 0) if max(sizes) <= self.largest else None
        if len(eqn.outvars) != 1 or len(outs[0]) != 1:
            return None
        (place,) = outs[0]
        shape = shape_of(eqn.outvars[0])
        if shape[place] != self.index.size:
            return None
        if not any(places):
            known = name == "broadcast_in_dim" and len(eqn.invars) == 1
            return Step("broadcast", place) if known else None
        if name in ALIKE and all(p in ((), (place,)) for p in places):
            shapes = [shape_of(a) for a, c in zip(eqn.invars, copies, strict=True) if c]
            unit = all(not s or s[place] == 1 for s in shapes)
            return Step("elementwise", place) if unit else None
        if name == "dot_general" and len(eqn.invars) == 2 and sum(copies) == 1:
            side = [*copies].index(False)
            (contract, batch) = eqn.params["dimension_numbers"]
            free = len(places[side]) == 1 and places[side][0] not in (
                *contract[side],
                *batch[side],
            )
            return Step("product", place) if free else None
        return None


def taken(
    step: Step,
    eqn: JaxprEqn,
    operands: Sequence[Any],
    copies: Sequence[Array | None],
    bind: Any,
) -> list[Array]:
    """An equation on copies of some of its operands.

    Args:
        copies: ``[N, …]``, those of which there are copies; else None.
    """
    shape = shape_of(eqn.outvars[0])
    if step.name == "map":
        here = [i for i, c in enumerate(copies) if c is not None]

        def one(own: Sequence[Any]):
            filled = list(operands)
            for i, value in zip(here, own, strict=True):
                filled[i] = value
            return bind(filled)

        return jax.vmap(one)([copies[i] for i in here])
    if step.name == "broadcast":
        (copy,) = (c for c in copies if c is not None)
        places = [int(i) for i in eqn.params["broadcast_dimensions"]]
        if step.axis in places:
            copy = jnp.squeeze(copy, 1 + places.index(step.axis))
            places.remove(step.axis)
        return [lax.broadcast_in_dim(copy, shape, (step.axis, *places))]
    if step.name == "elementwise":
        filled = [
            value if copy is None else along(copy, step.axis, shape)
            for value, copy in zip(operands, copies, strict=True)
        ]
        return bind(filled)
    return [product(step, eqn, operands, copies)]


def along(copy: Array, axis: int, shape: Sequence[int]) -> Array:
    """Copies ``[N, …]`` with ``N`` along an axis where a single one has length one."""
    if copy.ndim == 1:
        copy = copy.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    else:
        copy = jnp.moveaxis(jnp.squeeze(copy, 1 + axis), 0, axis)
    return jnp.broadcast_to(copy, shape)


def product(
    step: Step, eqn: JaxprEqn, operands: Sequence[Any], copies: Sequence[Array | None]
) -> Array:
    """``dot_general`` of copy ``n`` with example ``n`` of the other operand."""
    (contract, batch), p = eqn.params["dimension_numbers"], eqn.params
    side = 0 if copies[1] is None else 1  # of the copies
    other = 1 - side
    free = [
        i
        for i in range(jnp.ndim(operands[other]))
        if i not in (*contract[other], *batch[other])
    ]
    first = len(batch[0])
    if other == 1:
        first += jnp.ndim(operands[0]) - len(contract[0]) - len(batch[0])
    example = free[step.axis - first]
    values: list[Any] = [None, None]
    dims: list[Any] = [(), ()]
    batches: list[Any] = [(), ()]
    values[side], values[other] = copies[side], operands[other]
    dims[side] = tuple(i + 1 for i in contract[side])
    dims[other] = tuple(contract[other])
    batches[side] = (0, *(i + 1 for i in batch[side]))
    batches[other] = (example, *batch[other])
    result = lax.dot_general(
        *values,
        dimension_numbers=(tuple(dims), tuple(batches)),
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    return jnp.moveaxis(result, 0, step.axis)
