"""Which rows of a site belong to one example.

The terms of the loss are the leading axes of the marked output, or of the arguments; a
site whose output has these axes has the examples there. Statistics that add up the
positions of an example (scales and shifts, ``weight_sharing="reduce"``, squares) want
them first: rows are put in that order. A site that the axes could not be followed to is
judged by its shape.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.likelihoods import MASK, row_shape
from kfac_jax_lite.tagging.analysis import Walk, shape_of
from kfac_jax_lite.tagging.follow import Followed, follow
from kfac_jax_lite.tagging.indices import Axes, Axis, fresh_axes, settled, unify
from kfac_jax_lite.tagging.layers import (
    ConvGeometry,
    DenseGeometry,
    EmbeddingGeometry,
    Geometry,
    Plan,
    Site,
)
from kfac_jax_lite.types import Jaxpr
from kfac_jax_lite.views import Shape


def place_examples(
    walk: Walk, plan: Plan, jaxpr: Jaxpr, num_leaves: int, num_examples: int
) -> None:
    """Sets ``positions`` of every candidate site; rows get the examples first.

    Args:
        walk: The walk over the loss.
        plan: Its plan.
        jaxpr: The loss.
        num_leaves: How many of its inputs are parameters.
        num_examples: ``N``.
    """
    found: Followed = {}
    follow(jaxpr, plan, [fresh_axes(shape_of(v)) for v in jaxpr.invars], found)
    terms = terms_of(walk, found, num_examples)
    if not walk.marks:
        inputs: Any = jaxpr.invars[num_leaves:]
        held = [found[plan][v] for v in inputs if leads(v.aval, num_examples)]
        terms = [axes[0] for axes in held]
    for other in terms[1:]:
        unify(terms[0], other)
    for site in walk.sites:
        axes = row_axes(walk, site, found)
        place(site, axes, terms[0] if terms else (), num_examples)


def leads(aval: Any, num_examples: int) -> bool:
    """Whether an argument has the examples along its first axis (keys have not)."""
    raw_key = aval.dtype == jnp.uint32 and aval.shape == (2,)
    return aval.shape[:1] == (num_examples,) and not raw_key


def terms_of(walk: Walk, found: Followed, num_examples: int) -> list[Axis]:
    """The indices that number the terms of the loss at every marked output."""
    terms = []
    for plan, axes in found.items():
        for index, likelihood in plan.marks.items():
            (var,) = walk.scopes[plan].jaxpr.eqns[index].outvars
            rows = row_shape(shape_of(var), likelihood)
            if likelihood != MASK and math.prod(rows) == num_examples:
                own = axes[var][: len(rows)]
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
        first = len(geometry.blocks)
        return geometry.output_order[first : first + len(geometry.rows)]
    return geometry.order[: len(geometry.rows)]


def place(site: Site, axes: Axes | None, terms: Axis, num_examples: int) -> None:
    """Sets a site's ``positions``, after its rows have been put in order if need be."""
    rows, terms = site.geometry.rows, settled(terms)
    seen = [index for axis in axes or () for index in axis]
    present = [index for index in terms if index in seen]
    if axes is None or not present or any(seen.count(i) > 1 for i in present):
        # Not followed, or several axes are the examples': by shape, unless it is open.
        site.positions = positions_per_example(rows, num_examples, flat=not terms)
        return
    heads = {k: axis[0] for k, axis in enumerate(axes) if axis and within(axis, terms)}
    leading = sorted(heads, key=lambda k: terms.index(heads[k]))
    order = (*leading, *(k for k in range(len(axes)) if k not in heads))
    moved = reordered(site.geometry, order)
    if moved is not None:
        site.geometry, axes = moved, tuple(axes[k] for k in order)
    first = tuple(index for axis in axes for index in axis)[: len(terms)]
    site.positions = math.prod(rows) // num_examples if first == terms else None


def within(axis: Axis, terms: Axis) -> bool:
    """Whether an axis numbers terms only."""
    return all(index in terms for index in axis)


def reordered(geometry: Geometry, order: Shape) -> Geometry | None:
    """The geometry with the axes of its rows in another order; None: it cannot."""
    if isinstance(geometry, ConvGeometry):
        return None
    n = len(geometry.rows)

    def moved(axes: Shape, first: int = 0) -> Shape:
        rows = axes[first : first + n]
        return (*axes[:first], *(rows[k] for k in order), *axes[first + n :])

    rows = moved(geometry.rows)
    if isinstance(geometry, DenseGeometry | EmbeddingGeometry):
        first = len(geometry.blocks)
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


def positions_per_example(rows: Shape, num_examples: int, flat: bool) -> int | None:
    """How many rows belong to one example, by their shape: examples come first.

    The examples are found as the leading axes whose product is ``num_examples``, or as
    a leading axis that flattens examples and positions. If a later axis is as long as
    there are examples they may be there: nothing is said.

    Args:
        rows: Lengths of the rows' axes.
        num_examples: ``N``.
        flat: Whether a leading axis may flatten examples and positions.

    Returns:
        ``R / N`` with rows reshapable to ``[N, R / N]``, or None when they are not.
    """
    if num_examples == 1:
        return math.prod(rows)
    rows = tuple(size for size in rows if size != 1)
    leading = [math.prod(rows[: k + 1]) for k in range(len(rows))]
    found = num_examples in leading or (
        flat and bool(rows) and rows[0] % num_examples == 0
    )
    known = found and num_examples not in rows[1:]
    return math.prod(rows) // num_examples if known else None
