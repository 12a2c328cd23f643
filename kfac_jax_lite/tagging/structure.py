"""Rules for primitives that move or nest values without making a layer."""

import math

from jax.extend.core import JaxprEqn, Literal

from kfac_jax_lite.likelihoods import PREFIX
from kfac_jax_lite.tagging.analysis import (
    Fact,
    Factor,
    Output,
    Scaled,
    Scope,
    Walk,
    rule,
    shape_of,
)
from kfac_jax_lite.tagging.layers import Plan
from kfac_jax_lite.types import View, remap_unit_axes


@rule(
    "convert_element_type",
    "copy",
    "copy_p",
    "optimization_barrier",
    "sharding_constraint",
    "reduce_precision",
    "pvary",
    "pcast",
)
def same(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Values pass as they are (a change of precision does not change the layer)."""
    return [keep(scope, a, f) for a, f in zip(eqn.invars, facts, strict=True)]


def keep(scope: Scope, atom, fact: Fact) -> Fact:
    """A fact, unless it is a layer's output that something else reads too."""
    return None if isinstance(fact, Output) and not scope.used_once(atom) else fact


@rule("name", always=True)
def name(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """``checkpoint_name``: the marks of the network's output travel as such."""
    text = eqn.params["name"]
    if text.startswith(PREFIX):
        likelihood = text.removeprefix(PREFIX)
        scope.plan.marks[index] = likelihood
        shape = shape_of(eqn.invars[0])
        scope.walk.marks.append((likelihood, shape, scope.walk.loops))
        if scope.walk.loops or scope.walk.branch:
            scope.walk.nested_marks = True
        return [None]
    return [keep(scope, eqn.invars[0], facts[0])]


@rule("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim")
def move_axes(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Axes move; a layer's output keeps its labels while they can be followed."""
    fact = keep(scope, eqn.invars[0], facts[0])
    if len(eqn.invars) > 1:  # dynamic shapes
        return None
    step = axis_step(eqn)
    if isinstance(fact, View):
        view = move_view(fact, step)
        return None if view is None else [view]
    if isinstance(fact, Scaled):
        return [move_scaled(fact, step)]
    if isinstance(fact, Output):
        shape = shape_of(eqn.invars[0])
        return [move_output(fact, shape, step)]
    return [None]


def axis_step(eqn: JaxprEqn) -> tuple:
    """An equation that moves axes as ``(name, argument)``."""
    if eqn.primitive.name == "transpose":
        return ("transpose", tuple(eqn.params["permutation"]))
    out = shape_of(eqn.outvars[0])
    if eqn.primitive.name == "broadcast_in_dim":
        return ("broadcast", (out, tuple(eqn.params["broadcast_dimensions"])))
    return ("reshape", out)


def move_view(view: View, step: tuple) -> View | None:
    """Applies a step to a view."""
    if step[0] == "broadcast":
        return view.broadcast(*step[1])
    return getattr(view, step[0])(step[1])


def move_scaled(fact: Scaled, step: tuple) -> Scaled | None:
    """Applies a step to the view and to every factor beside it.

    A factor has the view's rank with unit axes where it is broadcast, or is a scalar.

    Returns:
        The moved fact, or None where it cannot be followed.
    """
    view = move_view(fact.view, step)
    old, rank = fact.view.shape, len(fact.view.shape)
    if view is None:
        return None
    if step[0] == "transpose":
        source: tuple[int | None, ...] = step[1]
    elif step[0] == "broadcast":
        shape, dims = step[1]
        source = tuple(dims.index(i) if i in dims else None for i in range(len(shape)))
    else:
        remapped = remap_unit_axes(old, step[1], tuple(range(rank)))
        if remapped is None:
            return None
        source = remapped
    factors = []
    for factor in fact.factors:
        if factor.shape:
            shape = tuple(1 if i is None else factor.shape[i] for i in source)
            steps = (step,) if step[0] == "transpose" else (("reshape", shape),)
            factor = Factor(factor.atom, shape, factor.steps + steps)
        factors.append(factor)
    return Scaled(view, tuple(factors))


def move_output(fact: Output, shape: tuple, step: tuple) -> Output | None:
    """Applies a step to the labels of a layer's output."""
    labels = fact.labels
    if step[0] == "transpose":
        return Output(fact.site, tuple(labels[p] for p in step[1]))
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
        moved = (None,) * (len(new) - tail) + labels[-tail:]
    return Output(fact.site, moved)


@rule("slice")
def slice_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A static slice of a parameter is a view of part of it."""
    if not isinstance(facts[0], View):
        return [None]
    p = eqn.params
    view = facts[0].slice(p["start_indices"], p["limit_indices"], p["strides"])
    return None if view is None else [view]


@rule("dynamic_slice")
def dynamic_slice_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A slice whose start is written in the program is a static slice."""
    starts = eqn.invars[1:]
    known = [int(a.val) for a in starts if isinstance(a, Literal)]
    if not isinstance(facts[0], View) or len(known) < len(starts):
        return None
    sizes = tuple(eqn.params["slice_sizes"])
    limits = [d - s for d, s in zip(facts[0].shape, sizes, strict=True)]
    start = tuple(min(max(a, 0), m) for a, m in zip(known, limits, strict=True))
    limit = tuple(a + s for a, s in zip(start, sizes, strict=True))
    view = facts[0].slice(start, limit, None)
    return None if view is None else [view]


@rule("split")
def split_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
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


@rule("stop_gradient")
def stop_gradient(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """What is behind ``stop_gradient`` is data."""
    scope.deps[eqn.outvars[0]] = scope.walk.data_bit
    return [None]


def inner(scope: Scope, index: int, jaxpr, facts, deps):
    """Walks a jaxpr inside an equation under a plan of its own."""
    plan = Plan()
    scope.plan.children[index] = scope.plan.children.get(index, ()) + (plan,)
    return Scope(scope.walk, plan, jaxpr).run(facts, deps)


def enterable(scope: Scope, atoms, facts: list[Fact]) -> list[Fact]:
    """Facts that may cross into a nested jaxpr."""
    kept: list[Fact] = []
    for atom, fact in zip(atoms, facts, strict=True):
        fact = keep(scope, atom, fact)
        if isinstance(fact, Scaled) and not fact.constant:
            scope.mark_used([fact], "a nested function")
            fact = None
        kept.append(fact)
    return kept


@rule("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", always=True)
def call(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Calls that run their jaxpr once."""
    jaxpr = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    facts = enterable(scope, eqn.invars, facts)
    deps = [scope.dependencies([a]) for a in eqn.invars]
    out, out_deps = inner(scope, index, jaxpr, facts, deps)
    if eqn.primitive.name in ("remat2", "checkpoint"):
        # Variables inside are recomputed: only whole parameters leave with a fact.
        out = [f if isinstance(f, View) else None for f in out]
    for var, bits in zip(eqn.outvars, out_deps, strict=True):
        scope.deps[var] = bits
    return [f if not isinstance(f, Scaled) or f.constant else None for f in out]


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", always=True)
def custom_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A function with a derivative of its own: tapped from outside or not at all.

    The cotangents inside it are not those its rule computes, so nothing inside is
    tapped. Where its result *is* a layer's output (a matrix product with its own
    derivative), the tap stands behind the call; else its parameters fall back.

    Returns:
        The facts of the results.
    """
    facts = enterable(scope, eqn.invars, facts)
    if not any(isinstance(f, View) for f in facts):
        return [None] * len(eqn.outvars)
    key = "call_jaxpr" if "call_jaxpr" in eqn.params else "fun_jaxpr"
    jaxpr = eqn.params[key].jaxpr
    trial = Walk(scope.walk.data_bit.bit_length() - 1)
    deps = [scope.dependencies([a]) for a in eqn.invars]
    (out, *_), _ = Scope(trial, Plan(), jaxpr).run(facts, deps)
    outside = dict(zip(jaxpr.invars, eqn.invars, strict=True))
    lone = len(trial.sites) == len(eqn.outvars) == 1 and not trial.uses
    if lone and isinstance(out, Output):
        known = [a for a in out.site.inputs if isinstance(a, Literal) or a in outside]
        if len(known) == len(out.site.inputs):
            inputs = (a if isinstance(a, Literal) else outside[a] for a in known)
            out.site.inputs = tuple(inputs)
            scope.add_site(index, out.site)
            return [out]
    scope.mark_used(facts, eqn.primitive.name.removesuffix("_call"))
    return [None] * len(eqn.outvars)


@rule("scan", always=True)
def scan(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Loop constants stay whole parameters; scanned ones become stacked layers."""
    n_const, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    body = eqn.params["jaxpr"].jaxpr
    facts = enterable(scope, eqn.invars, facts)
    carried = body.outvars[:n_carry]
    stacked = set()
    inside: list[Fact] = []
    for i, fact in enumerate(facts):
        view = fact if isinstance(fact, View) else None
        if view is not None and i >= n_const + n_carry:
            slices = view.unstack()
            if slices is None:
                scope.mark_used([view], "scan over a reshaped parameter")
            else:
                stacked.add(view.leaf)
            view = slices
        elif view is not None and i >= n_const:
            if carried[i - n_const] is not body.invars[i]:
                scope.mark_used([view], "scan carry")
                view = None
        inside.append(view)
    scope.plan.unstacked[index] = frozenset(stacked)
    bits = scope.dependencies(eqn.invars)
    walk, outer = scope.walk, scope.walk.loops
    walk.loops = outer + (eqn.params["length"],)
    out, _ = inner(scope, index, body, inside, [bits] * len(inside))
    walk.loops = outer
    # A carried parameter that the body hands through unchanged is still itself.
    results = out[:n_carry] + [None] * (len(out) - n_carry)
    return [f if isinstance(f, View) else None for f in results]


@rule("cond", always=True)
def cond(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Every branch is walked; only one of them runs."""
    facts = enterable(scope, eqn.invars, facts)[1:]
    facts = [f if isinstance(f, View) else None for f in facts]
    deps = [scope.dependencies([a]) for a in eqn.invars[1:]]
    walk, outer = scope.walk, scope.walk.branch
    walk.branches += 1
    number = walk.branches
    for k, branch in enumerate(eqn.params["branches"]):
        walk.branch = (number, k)
        inner(scope, index, branch.jaxpr, facts, deps)
    walk.branch = outer
    return [None] * len(eqn.outvars)


@rule("while", always=True)
def while_loop(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """No reverse-mode derivative exists: remember which parameters got here."""
    del index
    scope.walk.while_leaves |= scope.dependencies(eqn.invars) & ~scope.walk.data_bit
    scope.mark_used(facts, "while")
    return [None] * len(eqn.outvars)
