"""Rules for primitives that move values without making a layer."""

import dataclasses
import math
from typing import Any

from kfac_jax_lite.core.likelihoods import BESIDE, PREFIX
from kfac_jax_lite.core.parameter_views import Shape, View, remap_unit_axes
from kfac_jax_lite.core.types import JaxprEqn
from kfac_jax_lite.tagging.analysis import (
    Beside,
    Counting,
    Fact,
    Factor,
    Mark,
    Output,
    Scaled,
    Scope,
    rule,
    shape_of,
)
from kfac_jax_lite.tagging.sites import EmbeddingGeometry


@rule(
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "optimization_barrier",
    "sharding_constraint",
    "reshard",
    "reduce_precision",
    "pvary",
    "pcast",
)
def same(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Values pass as they are (a change of precision does not change the layer)."""
    return [keep(scope, a, f) for a, f in zip(eqn.invars, facts, strict=True)]


def keep(scope: Scope, atom: Any, fact: Fact) -> Fact:
    """A fact, unless it is a layer's output that something else reads too."""
    return None if isinstance(fact, Output) and not scope.used_once(atom) else fact


@rule("name", always=True)
def name(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """``checkpoint_name``: the marks of the network's output travel as such."""
    text = eqn.params["name"]
    if text.startswith(PREFIX):
        likelihood = text.removeprefix(PREFIX)
        if likelihood not in BESIDE and dead_mark(scope, index, eqn):
            return [None]
        scope.plan.marks[index] = likelihood
        if scope.walk.liveness.sampled:
            scope.walk.reached |= scope.dependencies(eqn.invars)
        shape = shape_of(eqn.invars[0])
        scope.walk.marks.append(Mark(likelihood, shape, scope.walk.loops, eqn))
        if scope.walk.loops or scope.walk.branch:
            scope.walk.nested_marks = True
        return [None]
    return [keep(scope, eqn.invars[0], facts[0])]


def dead_mark(scope: Scope, index: int, eqn: JaxprEqn) -> bool:
    """Whether a marked output is read, but by nothing that is differentiated."""
    # As where the network is evaluated a second time, behind stop_gradient.
    out = eqn.outvars[0]
    if out in scope.live.variables or scope.walk.liveness.every:
        return False
    later = (a for other in scope.jaxpr.eqns[index:] for a in other.invars)
    return any(a is out for a in (*later, *scope.jaxpr.outvars))


@rule("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim")
def move_axes(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Axes move; a layer's output keeps its labels while they can be followed."""
    fact = keep(scope, eqn.invars[0], facts[0])
    step = axis_step(eqn)
    if isinstance(fact, View):
        view = move_view(fact, step)
        return None if view is None else [view]
    shape = shape_of(eqn.invars[0])
    if isinstance(fact, Scaled):
        return [move_scaled(fact, step)]
    if isinstance(fact, Beside):
        return [move_beside(fact, shape, step)]
    if isinstance(fact, Output):
        return [repeated(scope, index, fact, shape, step)]
    if isinstance(fact, Counting):
        return [move_counting(fact, shape, step)]
    return [None]


def axis_step(eqn: JaxprEqn) -> tuple[str, Any]:
    """An equation that moves axes as ``(name, argument)``."""
    if eqn.primitive.name == "transpose":
        return ("transpose", tuple(map(int, eqn.params["permutation"])))
    out = shape_of(eqn.outvars[0])
    if eqn.primitive.name == "broadcast_in_dim":
        dims = tuple(map(int, eqn.params["broadcast_dimensions"]))
        return ("broadcast", (out, dims))
    return ("reshape", out)


def move_view(view: View, step: tuple[str, Any]) -> View | None:
    """Applies a step to a view."""
    if step[0] == "broadcast":
        return view.broadcast(*step[1])
    return getattr(view, step[0])(step[1])


def axis_sources(shape: Shape, step: tuple[str, Any]) -> tuple[int | None, ...] | None:
    """For every axis after a step the axis before it; None for new unit axes."""
    name, argument = step
    if name == "transpose":
        return argument
    if name == "broadcast":
        new, dims = argument
        return tuple(dims.index(i) if i in dims else None for i in range(len(new)))
    return remap_unit_axes(shape, argument, tuple(range(len(shape))))


def move_scaled(fact: Scaled, step: tuple[str, Any]) -> Scaled | None:
    """Applies a step to the view and to every factor beside it.

    A factor has the view's rank with unit axes where it is broadcast, or is a scalar.
    """
    view = move_view(fact.view, step)
    source = axis_sources(fact.view.shape, step)
    entire = all(f.shape in ((), fact.view.shape) for f in fact.factors)
    if view is None or (source is None and not entire):
        return None
    factors = []
    for factor in fact.factors:
        if factor.shape and source is None:
            shape = step[1]
            factor = Factor(factor.atom, shape, (*factor.steps, ("reshape", shape)))
        elif factor.shape:
            shape = tuple(1 if i is None else factor.shape[i] for i in source or ())
            steps = (step,) if step[0] == "transpose" else (("reshape", shape),)
            factor = Factor(factor.atom, shape, factor.steps + steps)
        factors.append(factor)
    return Scaled(view, tuple(factors))


def move_beside(fact: Beside, shape: Shape, step: tuple[str, Any]) -> Beside | None:
    """Applies a step to views that stand side by side."""
    source = axis_sources(shape, step)
    if source is None or fact.axis not in source:
        return None
    axis, views = source.index(fact.axis), []
    for view in fact.views:
        own = step
        if step[0] != "transpose":
            new = step[1][0] if step[0] == "broadcast" else step[1]
            new = tuple(
                view.shape[fact.axis] if i == axis else d for i, d in enumerate(new)
            )
            own = (step[0], (new, step[1][1]) if step[0] == "broadcast" else new)
        views.append(move_view(view, own))
    return None if None in views else Beside(tuple(views), axis)


def move_counting(
    fact: Counting, shape: Shape, step: tuple[str, Any]
) -> Counting | None:
    """Applies a step to the axis that counts."""
    source = axis_sources(shape, step)
    if source is None:
        return None
    labels = tuple(i is not None and fact.labels[i] for i in source)
    return Counting(labels, fact.one_hot) if any(labels) else None


def repeated(
    scope: Scope, index: int, fact: Output, shape: Shape, step: tuple[str, Any]
) -> Output | None:
    """A layer's output after a step that may repeat it along new axes."""
    new = step[1][0] if step[0] == "broadcast" else ()
    lookup = isinstance(fact.site.geometry, EmbeddingGeometry)
    if not lookup or step[0] != "broadcast" or math.prod(new) == math.prod(shape):
        return move_output(fact, shape, step)
    source = axis_sources(shape, step) or ()
    labels = tuple(None if i is None else fact.labels[i] for i in source)
    before = tuple(1 if i is None else shape[i] for i in source)
    moved = dataclasses.replace(fact, labels=labels)
    return moved if spread_site(scope, index, moved, before, new) else None


def move_output(fact: Output, shape: Shape, step: tuple[str, Any]) -> Output | None:
    """Applies a step to the labels of a layer's output."""
    labels = fact.labels
    if step[0] == "transpose":
        rows = [p for p in step[1] if labels[p] is None and shape[p] > 1]
        if fact.site.kind == "embedding" and rows != sorted(rows):
            return None
        return dataclasses.replace(fact, labels=tuple(labels[p] for p in step[1]))
    new = step[1][0] if step[0] == "broadcast" else step[1]
    if step[0] == "broadcast" and math.prod(new) != math.prod(shape):
        return None
    moved = remap_unit_axes(shape, new, labels)
    if moved is None:  # rows in front may be merged or split before intact output axes
        tail = sum(label is not None for label in labels)
        if any(label is not None for label in labels[: len(labels) - tail]):
            return None
        if tail == 0 or tuple(new[-tail:]) != shape[-tail:]:
            return None
        if fact.site.kind == "embedding":
            return None
        moved = (None,) * (len(new) - tail) + labels[-tail:]
    return dataclasses.replace(fact, labels=moved)


@rule("slice")
def slice_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A static slice of a parameter is a view of part of it."""
    if not isinstance(facts[0], View):
        return [None]
    p = eqn.params
    view = facts[0].slice(p["start_indices"], p["limit_indices"], p["strides"])
    return None if view is None else [view]


@rule("rev")
def rev_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A parameter read backwards, as the kernel of a transposed convolution."""
    if not isinstance(facts[0], View):
        return [None]
    view = facts[0].rev(tuple(eqn.params["dimensions"]))
    return None if view is None else [view]


@rule("tile")
def tile_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A parameter repeated along axes of length one."""
    view, reps = facts[0], tuple(map(int, eqn.params["reps"]))
    if not isinstance(view, View):
        return [None]
    if any(r > 1 and d > 1 for r, d in zip(reps, view.shape, strict=True)):
        return None
    return [view.broadcast(shape_of(eqn.outvars[0]), tuple(range(len(reps))))]


@rule("concatenate")
def concatenate_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Whole parameters side by side: several layers in one matrix product."""
    views = [f for f in facts if isinstance(f, View) and f.dense]
    if len(views) < len(facts):
        return None
    return [Beside(tuple(views), eqn.params["dimension"])]


@rule("split")
def split_rule(
    scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]
) -> list[Any] | None:
    """``jnp.split`` of a fused parameter: one view per piece."""
    view = facts[0]
    if not isinstance(view, View):
        return [None] * len(eqn.outvars)
    axis, at, pieces = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        start = tuple(at if i == axis else 0 for i in range(len(view.shape)))
        at += int(size)
        limit = tuple(at if i == axis else d for i, d in enumerate(view.shape))
        pieces.append(view.slice(start, limit, None))
    return None if any(p is None for p in pieces) else pieces


def spread_site(
    scope: Scope, index: int, fact: Output, before: Shape, shape: Shape
) -> bool:
    """Moves an embedding's tap behind an equation that repeats its rows."""
    geometry = fact.site.geometry
    assert isinstance(geometry, EmbeddingGeometry)
    rows = [i for i, label in enumerate(fact.labels) if label is None]
    outs = [i for i, label in enumerate(fact.labels) if label is not None]
    unit = tuple(before[i] for i in rows)
    seen = [d for d in geometry.unit_rows if d > 1]
    if geometry.blocks or geometry.unit_rows != geometry.rows:
        return False
    if [d for d in unit if d > 1] != seen or any(before[i] != shape[i] for i in outs):
        return False
    outs.sort(key=lambda i: fact.labels[i] or 0)
    fact.site.geometry = dataclasses.replace(
        geometry,
        rows=tuple(shape[i] for i in rows),
        unit_rows=unit,
        output_order=tuple(rows + outs),
    )
    scope.move_site(index, fact.site)
    return True
