"""Parameters read by number: rows of a table, and slices whose place is known."""

import math

import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from kfac_jax_lite.core.parameter_views import View
from kfac_jax_lite.core.types import JaxprEqn
from kfac_jax_lite.tagging.analysis import (
    Counting,
    Fact,
    Factor,
    Output,
    Scaled,
    Scope,
    rule,
    shape_of,
)
from kfac_jax_lite.tagging.rules_numbers import sliced, values
from kfac_jax_lite.tagging.rules_products import scales_of, weight_of
from kfac_jax_lite.tagging.sites import EmbeddingGeometry, Site


@rule("dynamic_slice")
def dynamic_slice(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A slice whose start is known in every turn of the loops around it is a view."""
    if not isinstance(facts[0], View):
        return None
    starts = [values(scope, atom) for atom in eqn.invars[1:]]
    known = [start for start in starts if start is not None]
    if len(known) < len(starts):
        scope.mark_used(facts[:1], "dynamic_slice where the data says")
        return [None]
    view = sliced(scope, facts[0], known, tuple(map(int, eqn.params["slice_sizes"])))
    return None if view is None else [view]


def matrices_by_number(scope: Scope, eqn: JaxprEqn, fact: Fact) -> View | None:
    """The view of matrices that a gather picks by numbers known in advance.

    One in every turn of a loop, or some in a row; vectors are rows of a table.
    """
    dims, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    parts, out = shape_of(eqn.invars[1])[:-1], shape_of(eqn.outvars[0])
    matrices = sum(size > 1 for size in sizes) > 1
    if not isinstance(fact, View) or dims.operand_batching_dims or not matrices:
        return None
    numbers = values(scope, eqn.invars[1]) if len(parts) < 2 else None
    if numbers is None:
        return None
    zeros = np.zeros(scope.loops + parts, int)
    named = dict(zip(dims.start_index_map, np.moveaxis(numbers, -1, 0), strict=True))
    starts = [named.get(axis, zeros) for axis in range(len(sizes))]
    if any(x.min() < 0 or x.max() >= fact.shape[i] for i, x in enumerate(starts)):
        return None
    view = sliced(scope, fact, starts, sizes)
    gone = dims.collapsed_slice_dims
    kept = tuple(size for axis, size in enumerate(sizes) if axis not in gone)
    view = view and view.reshape(parts + kept)
    places = [i for i in range(len(out)) if i not in dims.offset_dims]
    order = [*places, *dims.offset_dims]
    return view and view.transpose(tuple(map(order.index, range(len(out)))))


@rule("gather")
def gather(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Whole rows of a parameter, selected by indices."""
    if not isinstance(facts[0], View | Scaled):
        return None
    numbered = matrices_by_number(scope, eqn, facts[0])
    if numbered is not None:
        return [numbered]
    view, factors = weight_of(facts[0])
    dims, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    batch = tuple(dims.operand_batching_dims)
    starts = tuple(dims.start_index_map)
    tokens = tuple(i for i in starts if sizes[i] == 1)
    rest = tuple(i for i in range(len(sizes)) if i not in batch + tokens)
    if not tokens or any(sizes[i] != view.shape[i] for i in rest):
        return None
    blocks = tuple(view.shape[i] for i in batch)
    n_in = math.prod(view.shape[i] for i in tokens)
    n_out = math.prod(view.shape[i] for i in rest)
    weight = view.transpose(batch + tokens + rest).reshape(blocks + (n_in, n_out))
    weight = weight and weight.settle()
    if weight is None or not constant(factors):
        return None
    scales = scales_of(factors, (), (), (), ())
    # Indices are [..., coordinates]; their other axes are axes of the result.
    index_shape, out_shape = shape_of(eqn.invars[1]), shape_of(eqn.outvars[0])
    offsets = tuple(dims.offset_dims)
    shared = [i for i in range(len(out_shape)) if i not in offsets]
    index_batch = tuple(dims.start_indices_batching_dims)
    rows = [i for i in range(len(index_shape) - 1) if i not in index_batch]
    kept = [i for i in range(len(sizes)) if i not in dims.collapsed_slice_dims + batch]
    of_axis = dict(zip(kept, offsets, strict=True))
    units = [of_axis[i] for i in tokens if i in of_axis]
    outs = [of_axis[i] for i in rest]
    row_axes, block_axes = [shared[i] for i in rows], [shared[i] for i in index_batch]
    lengths = tuple(index_shape[i] for i in rows)
    geometry = EmbeddingGeometry(
        index_order=(*index_batch, *rows, len(index_shape) - 1),
        output_order=(*block_axes, *row_axes, *units, *outs),
        blocks=blocks,
        rows=lengths,
        n_in=n_in,
        n_out=n_out,
        coordinates=tuple((starts.index(i), view.shape[i]) for i in tokens),
        clip=GatherScatterMode.from_any(eqn.params["mode"]) == GatherScatterMode.CLIP,
        unit_rows=lengths,
        scales=scales,
    )
    inputs = (eqn.invars[1], *(f.atom for f in factors))
    site = Site("embedding", {"weight": weight}, inputs, geometry)
    scope.add_site(index, site)
    labels: list[int | None] = [None] * len(out_shape)
    for label, axis in enumerate([*block_axes, *outs]):
        labels[axis] = label
    return [Output(site, tuple(labels))]


def constant(factors: tuple[Factor, ...]) -> bool:
    """Whether everything that multiplies a table is a real scalar."""
    real = not any(
        jnp.issubdtype(f.atom.aval.dtype, jnp.complexfloating) for f in factors
    )
    return real and all(math.prod(f.shape) == 1 for f in factors)


@rule("iota", always=True)
def iota(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Counts along one axis: half of a one-hot vector."""
    del scope, index, facts
    rank = len(shape_of(eqn.outvars[0]))
    return [Counting(tuple(i == eqn.params["dimension"] for i in range(rank)))]


@rule("eq")
def equal(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Something compared with the numbers along an axis is one-hot along it."""
    del scope, index
    for fact, atom in zip(facts, eqn.invars, strict=True):
        other = eqn.invars[1] if atom is eqn.invars[0] else eqn.invars[0]
        if isinstance(fact, Counting) and not fact.one_hot:
            axis = fact.labels.index(True)
            shape = shape_of(other)
            if not shape or shape[axis] == 1:
                return [Counting(fact.labels, one_hot=True)]
    return [None]
