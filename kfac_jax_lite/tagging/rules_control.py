"""Rules for primitives that hold other programs: calls, loops, branches."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from kfac_jax_lite.core.parameter_views import View
from kfac_jax_lite.core.pytree import varying_of_type
from kfac_jax_lite.core.types import Jaxpr, JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import (
    Beside,
    Fact,
    Output,
    Scaled,
    Scope,
    Walk,
    leaves_of,
    rule,
)
from kfac_jax_lite.tagging.example_axes import ELEMENTWISE
from kfac_jax_lite.tagging.liveness import Live, Liveness
from kfac_jax_lite.tagging.rules_elementwise import function
from kfac_jax_lite.tagging.rules_structure import keep
from kfac_jax_lite.tagging.sites import (
    BY_HAND,
    CALLS,
    CHECKPOINTS,
    CUSTOM_RULES,
    Derived,
    Plan,
    Ref,
    Site,
    inside,
    manual_axes,
    scan_counts,
    spec_axes,
)


@rule("stop_gradient", always=True)
def stop_gradient(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """What is behind ``stop_gradient`` is data; no derivative goes through it."""
    scope.walk.touched.update(leaves_of(facts[0]))
    scope.deps[eqn.outvars[0]] &= scope.walk.data_bit
    return [None]


def inner(
    scope: Scope, index: int, jaxpr: Jaxpr, facts: list[Fact], deps: list[int]
) -> tuple[list[Fact], list[int]]:
    """Walks a jaxpr inside an equation under a plan of its own."""
    plan, eqn, walk = Plan(), scope.jaxpr.eqns[index], scope.walk
    scope.plan.children[index] = scope.plan.children.get(index, ()) + (plan,)

    def results(part: Live, liveness: Liveness) -> list[bool]:
        flags = [v in part.variables for v in eqn.outvars]
        return liveness.results_inside(eqn, flags)

    outs = results(scope.live, walk.liveness)
    marked = {k: results(scope.reaching[k], own) for k, own in walk.of_marks.items()}
    called = Scope(walk, plan, jaxpr, outs, marked)
    called.caller = scope, index
    return called.run(facts, deps)


def enterable(scope: Scope, atoms: Sequence[Any], facts: list[Fact]) -> list[Fact]:
    """Facts as a nested jaxpr sees them."""
    kept: list[Fact] = []
    for atom, fact in zip(atoms, facts, strict=True):
        fact = keep(scope, atom, fact)
        kept.append(fact.seen_from(scope.plan) if isinstance(fact, Scaled) else fact)
    return kept


def leaving(plan: Plan, fact: Fact) -> Fact:
    """A fact as it leaves a call that runs in line."""
    if isinstance(fact, Scaled) and not fact.constant:
        plan.exports = True
        return fact.seen_from(plan)
    return fact


@rule(*CALLS, *CHECKPOINTS, always=True)
def call(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Calls that run their jaxpr once."""
    jaxpr = inside(eqn).jaxpr
    facts = enterable(scope, eqn.invars, facts)
    if eqn.params.get("name") == BY_HAND:
        return [by_hand(scope, index, list(eqn.invars), facts, jaxpr), None]
    deps = [scope.dependencies([a]) for a in eqn.invars]
    out, out_deps = inner(scope, index, jaxpr, facts, deps)
    if eqn.primitive.name in CHECKPOINTS:
        # Variables inside are recomputed: only whole parameters leave with a fact.
        out = [f if isinstance(f, View) else None for f in out]
    for var, bits in zip(eqn.outvars, out_deps, strict=True):
        scope.deps[var] = bits
    plan = scope.plan.children[index][-1]
    return [leaving(plan, f) for f in out]


def by_hand(
    scope: Scope, index: int, atoms: list[Any], facts: list[Fact], jaxpr: Jaxpr
) -> Output | None:
    """A layer that the user named; it replaces what the rules made of its output."""
    if isinstance(facts[0], Output):
        for site in (facts[0].site, *facts[0].beside):
            scope.drop_site(site)
    output = stand_in(scope, index, atoms, [None, *facts[1:]], jaxpr)
    if output is None:
        scope.mark_used(facts[1:], "a layer tagged by hand that is not one layer")
    else:
        output.site.by_hand = True
    return output


@rule(*CUSTOM_RULES, always=True)
def custom_rule(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A function with a derivative of its own: tapped from outside or not at all.

    The cotangents inside it are not those its rule computes, so nothing inside is
    tapped. Where its result *is* a layer's output (a matrix product with its own
    derivative), the tap stands behind the call; else its parameters fall back.
    """
    facts = enterable(scope, eqn.invars, facts)
    if not any(isinstance(f, View | Scaled) for f in facts):
        return [None] * len(eqn.outvars)
    output: Any = None
    jaxpr = inside(eqn).jaxpr
    if len(eqn.outvars) == 1 and by_entries(jaxpr):
        output = (function(scope, index, eqn, facts) or [None])[0]
    elif len(eqn.outvars) == 1:
        output = stand_in(scope, index, eqn.invars, facts, jaxpr)
    if output is None:
        kind = eqn.primitive.name.removesuffix("_call").removesuffix("_call_jaxpr")
        scope.mark_used(facts, f"{kind}, a function with a gradient of your own")
    return [output] + [None] * (len(eqn.outvars) - 1)


def by_entries(jaxpr: Jaxpr) -> bool:
    """Whether a program computes every entry of its results from those in its place."""
    inner: list[Any] = [inside(eqn).jaxpr for eqn in jaxpr.eqns]
    plain = ELEMENTWISE.split()
    return all(
        by_entries(own) if own is not None else eqn.primitive.name in plain
        for eqn, own in zip(jaxpr.eqns, inner, strict=True)
    )


def stand_in(
    scope: Scope, index: int, atoms: list[Any], facts: list[Fact], jaxpr: Jaxpr
) -> Output | None:
    """Treats an equation as the one layer that a jaxpr of its operands would be."""
    trial = Walk(scope.walk.data_bit.bit_length() - 1, scope.walk.liveness)
    trial.scopes.update(scope.walk.scopes)
    deps = [scope.dependencies([a]) for a in atoms]
    outs = [a is jaxpr.outvars[-1] for a in jaxpr.outvars]
    (*_, out), _ = Scope(trial, Plan(), jaxpr, outs).run(list(facts), deps)
    outside = dict(zip(jaxpr.invars, atoms, strict=True))
    if len(trial.sites) != 1 or trial.uses or not isinstance(out, Output):
        return None
    inputs = []
    for atom in out.site.inputs:
        known = isinstance(atom, Ref) and atom.plan in scope.walk.scopes
        if not known and not isinstance(atom, Literal) and atom not in outside:
            return None
        inputs.append(outside[atom] if isinstance(atom, Var) else atom)
    out.site.inputs = tuple(inputs)
    scope.add_site(index, out.site)
    return out


@rule("scan", always=True)
def scan(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Loop constants stay whole parameters; scanned ones become stacked layers."""
    n_const, n_carry = scan_counts(eqn)
    body = inside(eqn).jaxpr
    facts = enterable(scope, eqn.invars, facts)
    carried = body.outvars[:n_carry]
    stacked = set()
    entering: list[Fact] = []
    for i, fact in enumerate(facts):
        if isinstance(fact, Scaled | Beside) and i < n_const:
            entering.append(fact)
            continue
        view = fact if isinstance(fact, View) else None
        if isinstance(fact, Scaled | Beside):
            scope.mark_used([fact], "scan over a computed parameter")
        if view is not None and i >= n_const + n_carry:
            slices = view.unstack()
            if slices is None:
                scope.mark_used([view], "scan over a broadcast parameter")
            else:
                stacked.add(view.leaf)
            view = slices
        elif view is not None and i >= n_const:
            if carried[i - n_const] is not body.invars[i]:
                scope.mark_used([view], "scan carry")
                view = None
        entering.append(view)
    scope.plan.unstacked[index] = frozenset(stacked)
    bits = scope.dependencies(eqn.invars)
    walk, outer = scope.walk, scope.walk.loops
    walk.loops = outer + (eqn.params["length"],)
    out, _ = inner(scope, index, body, entering, [bits] * len(entering))
    walk.loops = outer
    # A carried parameter that the body hands through unchanged is still itself.
    results = out[:n_carry] + [None] * (len(out) - n_carry)
    return [f if isinstance(f, View) and f in facts else None for f in results]


@rule("cond", always=True)
def cond(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Every branch is walked; only one of them runs."""
    facts = enterable(scope, eqn.invars, facts)[1:]
    facts = [f if isinstance(f, View | Scaled | Beside) else None for f in facts]
    deps = [scope.dependencies([a]) for a in eqn.invars[1:]]
    walk, outer = scope.walk, scope.walk.branch
    walk.branches += 1
    number = walk.branches
    for k, branch in enumerate(eqn.params["branches"]):
        walk.branch = (*outer, (number, k))
        inner(scope, index, branch.jaxpr, facts, deps)
    walk.branch = outer
    return [None] * len(eqn.outvars)


@rule("shard_map", always=True)
def shard_map(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A program that every device runs on its own part of the data.

    Parameters must enter whole. The cotangents of what enters whole are summed over the
    devices, those of probes too: statistics of one device are parts of a sum.
    """
    p, walk = eqn.params, scope.walk
    sizes = {axis: p["mesh"].shape[axis] for axis in manual_axes(eqn)}
    bits = {axis: walk.mesh_bit(axis) for axis in sizes}
    entering: list[Fact] = []
    deps = []
    for atom, fact, spec in zip(eqn.invars, facts, p["in_specs"], strict=True):
        along = spec_axes(spec)
        if isinstance(fact, Scaled | Beside) or (along and leaves_of(fact)):
            what = "sharded" if along else "computed"
            scope.mark_used([fact], f"shard_map over a {what} parameter")
            fact = None
        entering.append(fact if isinstance(fact, View) else None)
        varying = [bits[axis] for axis in along if axis in bits]
        deps.append(functools.reduce(operator.or_, varying, scope.dependencies([atom])))
    sites, marks = len(walk.sites), len(walk.marks)
    _, out = inner(scope, index, inside(eqn).jaxpr, entering, deps)
    for site in walk.sites[sites:]:
        place_on_mesh(walk, site, sizes, p["check_vma"])
    devices = math.prod(
        sizes[a] for a in {a for s in p["in_specs"] for a in spec_axes(s)}
    )
    for number in range(marks, len(walk.marks)):
        mark = walk.marks[number]
        walk.marks[number] = mark._replace(loops=(*mark.loops, devices))
        walk.nested_marks = True
    outside = functools.reduce(operator.or_, bits.values(), 0)
    for var, found in zip(eqn.outvars, out, strict=True):
        scope.deps[var] = found & ~outside
    return [None] * len(eqn.outvars)


def place_on_mesh(walk: Walk, site: Site, sizes: dict[Any, int], checked: bool) -> None:
    """Notes along which mesh axes a site's rows differ; it is run by all devices."""
    plan, index = site.place  # type: ignore[misc]
    scope = walk.scopes[plan]
    out = scope.jaxpr.eqns[index].outvars[site.output]
    atoms = [out, *(a for a in site.inputs if not isinstance(a, Literal | Derived))]
    if checked:
        types = [varying_of_type(atom.aval) for atom in atoms]
        axes = frozenset().union(*types) & sizes.keys()
        site.axes = site.axes | axes
    else:
        bits = scope.dependencies(atoms)
        axes = {axis for axis in sizes if bits & walk.mesh_bit(axis)}
        site.copies *= math.prod(sizes[axis] for axis in sizes if axis not in axes)
    site.devices *= math.prod(sizes[axis] for axis in axes)


@rule("psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather_invariant",
      always=True)  # fmt: skip
def over_devices(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """What is summed over devices is the same on all of them."""
    del index
    named = eqn.params.get("axes") or eqn.params.get("axis_name") or ()
    for axis in named if isinstance(named, tuple) else (named,):
        for var in eqn.outvars:
            scope.deps[var] &= ~scope.walk.mesh_bits.get(axis, 0)
    return None if any(facts) else [None] * len(eqn.outvars)


@rule("axis_index", always=True)
def axis_index(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """The number of a device differs from device to device."""
    del index, facts
    bit = scope.walk.mesh_bits.get(eqn.params["axis_name"], 0)
    scope.deps[eqn.outvars[0]] |= bit
    return [None]


@rule("while", always=True)
def while_loop(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """No reverse-mode derivative exists: remember which parameters got here."""
    del index
    scope.walk.while_leaves |= scope.dependencies(eqn.invars) & ~scope.walk.data_bit
    scope.mark_used(facts, "while")
    return [None] * len(eqn.outvars)
