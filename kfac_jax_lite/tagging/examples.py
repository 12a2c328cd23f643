"""Which rows of a site belong to one example.

The terms of the loss are numbered by the leading axes of the marked output, else of the
arguments, else of what the loss closes over. A site whose output has these axes has the
examples there. Statistics that add up the positions of an example (scales and shifts,
``weight_sharing="reduce"``, squares) want them first: rows are put in that order.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from kfac_jax_lite.core.likelihoods import BESIDE, row_shape
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.pytree import is_raw_key
from kfac_jax_lite.core.types import Jaxpr
from kfac_jax_lite.tagging.analysis import Walk, shape_of
from kfac_jax_lite.tagging.follow import Followed, follow
from kfac_jax_lite.tagging.indices import (
    Axes,
    Axis,
    fresh_axes,
    length,
    settled,
    unify,
)
from kfac_jax_lite.tagging.sites import (
    ConvGeometry,
    DenseGeometry,
    EmbeddingGeometry,
    Geometry,
    Plan,
    RaggedGeometry,
    Site,
)


def place_examples(
    walk: Walk,
    plan: Plan,
    jaxpr: Jaxpr,
    num_leaves: int,
    num_examples: int,
    num_terms: Sequence[int],
) -> tuple[Followed, "dict[Place, Examples]"]:
    """Sets ``positions`` of every candidate site; rows get the examples first."""
    found: Followed = {}
    follow(jaxpr, plan, [fresh_axes(shape_of(v)) for v in jaxpr.invars], found)
    given = [found[plan][v] for v in jaxpr.invars[num_leaves:] if has_rows(v.aval)]
    closed = [found[plan][v] for v in jaxpr.constvars if has_rows(v.aval)]
    batch = tuple(axes[0] for axes in (*given, *closed))
    terms = marked_terms(walk, found)
    if not walk.marks:
        first = numbering(given, num_examples) or numbering(closed, num_examples)
        for other in first[1:]:
            unify(first[0], other)
        terms = first[:1]
    # Where the terms are not known, the uses of one parameter agree on their order.
    orders: dict[int, Axis] = {}
    examples: dict[Place, Examples] = {}
    for site in walk.sites:
        n = terms_of(site, num_terms, num_examples)
        chosen = [terms[k] for k in sorted(site.marks or range(len(terms)))]
        chosen = [axis for axis in chosen if length(axis) == n]
        for other in chosen[1:]:
            unify(chosen[0], other)
        known = Examples(chosen[0] if chosen else (), batch, n)
        examples[place_of(site)] = known
        own = known.terms or orders.get(site.primary.leaf, ())
        before = row_axes(walk, site, found)
        site.positions = positions(site, before, here(known._replace(terms=own), site))
        axes = row_axes(walk, site, found)  # in the order that the rows have now
        if not own and site.positions is not None:
            orders[site.primary.leaf] = leading(axes or (), n)
        if isinstance(site.geometry, RaggedGeometry) and site.positions != 1:
            site.positions = None  # an example's rows are of several groups
        site.places = has_places(walk, site)
        if site.positions is None and site.kind == "scale_shift":
            site.positions = by_sequence(site.geometry.rows, axes, here(known, site))
    apart_on_devices(walk.sites)
    return found, examples


def apart_on_devices(sites: list[Site]) -> None:
    """Examples of several devices cannot be added up over several uses of a layer."""
    uses: dict[int, int] = {}
    for site in sites:
        leaf = site.primary.leaf
        uses[leaf] = uses.get(leaf, 0) + site.repeat
    for site in sites:
        if site.devices > 1 and uses[site.primary.leaf] > 1:
            site.positions = None


def terms_of(site: Site, num_terms: Sequence[int], num_examples: int) -> int:
    """``N`` of the outputs that depend on a site; of the first where they differ."""
    numbers = {num_terms[k] for k in site.marks}
    return numbers.pop() if len(numbers) == 1 else num_examples


# A plan, an equation's number and that of its result: what stands there.
Place = tuple[Plan, int, int]


def place_of(site: Site) -> Place:
    """Where a site stands."""
    plan, index = site.place  # type: ignore[misc]
    return plan, index, site.output


class Examples(NamedTuple):
    """What is known of the examples.

    Attributes:
        terms: The indices that number the terms of the loss, if it can be said.
        batch: First axes of the arguments and of what the loss closes over.
        num_examples: ``N``.
    """

    terms: Axis
    batch: Axes
    num_examples: int


def numbering(arguments: list[Axes], size: int) -> list[Axis]:
    """What numbers ``size`` terms, of arguments.

    First axes; else several, where all arguments that have so many agree about them
    (labels and what a convolution over time has seen do not).
    """
    first = [axes[0] for axes in arguments if length(axes[0]) == size]
    several = dict.fromkeys(settled(leading(axes, size)) for axes in arguments)
    fitting = [indices for indices in several if length(indices) == size]
    return first or (fitting if len(fitting) == 1 else [])


def leading(axes: Axes, size: int) -> Axis:
    """The slowest indices that take ``size`` values in all."""
    found: Axis = ()
    for index in (index for axis in axes for index in axis):
        if length(found) < size:
            found = (*found, index)
    return found


def has_rows(aval: Any) -> bool:
    """Whether an argument may have examples along its first axis (a key has not)."""
    return bool(aval.shape) and not is_raw_key(aval)


def marked_terms(walk: Walk, found: Followed) -> list[Axis]:
    """The indices that number the terms of every marked output, in program order."""
    terms: list[Axis] = []
    where = {
        id(walk.scopes[plan].jaxpr.eqns[index]): (plan, index)
        for plan in found
        for index in plan.marks
    }
    for mark in walk.marks:
        if mark.name in BESIDE:
            continue
        if id(mark.eqn) not in where:  # inside what is not followed
            terms.append(())
            continue
        plan, index = where[id(mark.eqn)]
        (var,) = walk.scopes[plan].jaxpr.eqns[index].outvars
        own = found[plan][var][: len(row_shape(shape_of(var), mark.name))]
        terms.append(tuple(index for axis in own for index in axis))
    return terms


def row_axes(walk: Walk, site: Site, found: Followed) -> Axes | None:
    """What is known of the axes of a site's rows."""
    plan, index = site.place  # type: ignore[misc]
    var: Any = walk.scopes[plan].jaxpr.eqns[index].outvars[site.output]
    axes, order = found.get(plan, {}).get(var), row_order(site.geometry)
    if axes is None or any(i >= len(axes) for i in order):
        return None
    return tuple(settled(axes[i]) for i in order)


def row_order(geometry: Geometry) -> Shape:
    """The axes of a site's output that are its rows, in their order."""
    if isinstance(geometry, ConvGeometry):
        return (geometry.out_spec[0], *geometry.out_spec[2:])
    if isinstance(geometry, DenseGeometry | EmbeddingGeometry):
        first = block_axes(geometry)
        return geometry.output_order[first : first + len(geometry.rows)]
    return geometry.order[: len(geometry.rows)]


def here(known: "Examples", site: Site) -> "Examples":
    """What is known of the examples of one device, where a site is run by several."""
    plan, _ = site.place  # type: ignore[misc]
    gone = settled(plan.devices)
    terms = tuple(index for index in settled(known.terms) if index not in gone)
    n = known.num_examples // site.devices
    if site.devices == 1 or (known.terms and length(terms) != n):
        return known
    batch = tuple(
        tuple(i for i in settled(axis) if i not in gone) for axis in known.batch
    )
    return Examples(terms, batch, n)


def block_axes(geometry: DenseGeometry | EmbeddingGeometry) -> int:
    """How many axes of a site's output number its blocks."""
    return 0 if isinstance(geometry, RaggedGeometry) else len(geometry.blocks)


def has_places(walk: Walk, site: Site) -> bool:
    """Whether rows are places of an expert that examples are sent to, some left empty.

    They hold data and there are matrices for every block, but examples have no axis.
    """
    plan, _ = site.place  # type: ignore[misc]
    geometry = site.geometry
    blocks = isinstance(geometry, DenseGeometry) and geometry.blocks
    if not blocks or site.positions is not None or isinstance(geometry, RaggedGeometry):
        return False
    return bool(walk.scopes[plan].dependencies(site.inputs[:1]) & walk.data_bit)


def positions(site: Site, axes: Axes | None, known: Examples) -> int | None:
    """How many rows belong to one term; the rows are put in order if need be.

    Of terms that nothing is known of, the shape must tell.
    """
    n, terms = known.num_examples, settled(known.terms)
    seen = [index for axis in axes or () for index in axis]
    if not terms:
        return positions_per_example(site.geometry.rows, n)
    if axes is None or any(seen.count(index) > 1 for index in terms):
        return None
    heads = {k: axis[0] for k, axis in enumerate(axes) if axis and within(axis, terms)}
    first = sorted(heads, key=lambda k: terms.index(heads[k]))
    order = (*first, *(k for k in range(len(axes)) if k not in heads))
    moved = reordered(site.geometry, order)
    if moved is not None:
        site.geometry, axes = moved, tuple(axes[k] for k in order)
    slowest = tuple(index for axis in axes for index in axis)[: len(terms)]
    return math.prod(site.geometry.rows) // n if slowest == terms else None


def by_sequence(rows: Shape, axes: Axes | None, known: Examples) -> int | None:
    """How many rows belong to an example that has several terms of the loss.

    So it is for a parameter that is added to whole sequences.
    """
    terms, n = settled(known.terms), known.num_examples
    if not axes or not axes[0] or axes[0] not in map(settled, known.batch):
        return None
    first = axes[0]
    # Rows that might be a term each are not grouped where nothing is known of terms.
    may_be_terms = n in itertools.accumulate(rows, operator.mul)
    slowest = first == terms[: len(first)] if terms else not may_be_terms
    rest = any(index in terms for axis in axes[1:] for index in axis)
    whole = slowest and not rest and rows[0] < n and n % rows[0] == 0
    return math.prod(rows[1:]) if whole else None


def within(axis: Axis, terms: Axis) -> bool:
    """Whether an axis numbers terms only."""
    return all(index in terms for index in axis)


def reordered(geometry: Geometry, order: Shape) -> Geometry | None:
    """The geometry with the axes of its rows in another order; None: it cannot."""
    if isinstance(geometry, ConvGeometry | RaggedGeometry):
        return None
    n = len(geometry.rows)

    def moved(axes: Shape, first: int = 0) -> Shape:
        rows = axes[first : first + n]
        return (*axes[:first], *(rows[k] for k in order), *axes[first + n :])

    rows = moved(geometry.rows)
    if isinstance(geometry, DenseGeometry | EmbeddingGeometry):
        first = block_axes(geometry)
        output = moved(geometry.output_order, first)
        if isinstance(geometry, DenseGeometry):
            own = 0 if geometry.shared else first
            return dataclasses.replace(
                geometry,
                rows=rows,
                input_order=moved(geometry.input_order, own),
                output_order=output,
            )
        if geometry.unit_rows != geometry.rows:
            return None  # rows were repeated along new axes
        return dataclasses.replace(
            geometry,
            rows=rows,
            unit_rows=rows,
            index_order=moved(geometry.index_order, first),
            output_order=output,
        )
    return dataclasses.replace(geometry, rows=rows, order=moved(geometry.order))


def positions_per_example(rows: Shape, num_examples: int) -> int | None:
    """How many rows belong to one example, by their shape: examples come first.

    They are the leading axes whose product is ``num_examples``. If a later axis is as
    long they may be there: nothing is said.

    Returns:
        ``R / N`` with rows reshapable to ``[N, R / N]``, or None when they are not.
    """
    if num_examples == 1:
        return math.prod(rows)
    rows = tuple(size for size in rows if size != 1)
    leading = [math.prod(rows[: k + 1]) for k in range(len(rows))]
    known = num_examples in leading and num_examples not in rows[1:]
    return math.prod(rows) // num_examples if known else None
