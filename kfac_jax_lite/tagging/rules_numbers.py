"""Whole numbers that a program computes from nothing: loop counters, written indices.

``w[i]`` in a loop over ``i = 0, 1, …`` reads one slice of a stacked parameter a turn,
as ``scan`` over ``w`` does. A variable that depends on literals and on counters alone
has a value for every turn of the loops around it; it is computed when it is asked for.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from kfac_jax_lite.core.parameter_views import Shape, View
from kfac_jax_lite.core.types import JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import Scope, shape_of
from kfac_jax_lite.tagging.interpreter import bind
from kfac_jax_lite.tagging.sites import CALLS, CHECKPOINTS, Plan, scan_counts

# No more numbers than this are computed while a program is traced.
MOST = 1 << 16


def values(scope: Scope, atom: Any) -> np.ndarray | None:
    """The numbers of a variable in every turn of the loops around it.

    Returns:
        ``[*loops, *shape]``, or None where they depend on more than counters.
    """
    shape = (*scope.loops, *shape_of(atom))
    whole = np.issubdtype(atom.aval.dtype, np.integer) or atom.aval.dtype == bool
    if not whole or math.prod(shape) > MOST:
        return None
    if isinstance(atom, Literal):
        return np.broadcast_to(np.asarray(atom.val), shape)
    if atom not in scope.numbers:
        scope.numbers[atom] = None  # nothing is known of what asks for itself
        found = computed(scope, atom)
        scope.numbers[atom] = None if found is None else np.broadcast_to(found, shape)
    return scope.numbers[atom]


def computed(scope: Scope, var: Var) -> np.ndarray | None:
    """What ``values`` keeps."""
    at = scope.producers.get(var)
    if at is None:
        return entered(scope, var)
    eqn, plans = scope.jaxpr.eqns[at], scope.plan.children.get(at, ())
    if eqn.primitive.name in (*CALLS, *CHECKPOINTS) and plans:
        called = scope.walk.scopes[plans[-1]]
        return values(called, called.jaxpr.outvars[eqn.outvars.index(var)])
    if plans or eqn.effects or eqn.primitive.name in ("scan", "while", "cond"):
        return None
    operands = [values(scope, atom) for atom in eqn.invars]
    if any(x is None for x in operands):
        return None
    return run(scope, eqn, var, operands)


def run(
    scope: Scope, eqn: JaxprEqn, var: Var, operands: list[Any]
) -> np.ndarray | None:
    """One result of an equation, in every turn."""
    known = [k for k, a in enumerate(eqn.invars) if not isinstance(a, Literal)]

    def turn(*values: Any):
        whole = dict(zip(known, values, strict=True))
        given = [whole.get(k) for k in range(len(operands))]
        return bind(scope.jaxpr, eqn, given)[eqn.outvars.index(var)]

    flat = [operands[k].reshape(-1, *shape_of(eqn.invars[k])) for k in known]
    with jax.ensure_compile_time_eval():
        out = jax.vmap(turn)(*flat) if flat else turn()
    return np.asarray(out).reshape((*(scope.loops if flat else ()), *shape_of(var)))


def entered(scope: Scope, var: Var) -> np.ndarray | None:
    """What enters a jaxpr: its own constants, or what its caller hands in."""
    if scope.caller is None or var not in scope.jaxpr.invars:
        return None
    caller, index = scope.caller
    eqn, place = caller.jaxpr.eqns[index], scope.jaxpr.invars.index(var)
    if eqn.primitive.name == "cond":
        place += 1
    found = values(caller, eqn.invars[place])
    if eqn.primitive.name != "scan" or found is None:
        return found
    n_const, n_carry = scan_counts(eqn)
    if place >= n_const + n_carry:
        return found
    found = np.expand_dims(found, len(caller.loops))
    if place < n_const:
        return found
    step = increment(scope, var, scope.jaxpr.outvars[place - n_const])
    if step is None or shape_of(var):
        return None
    turns = np.arange(eqn.params["length"])
    return found + step * (turns[::-1] if eqn.params["reverse"] else turns)


def increment(scope: Scope, var: Var, out: Any) -> int | None:
    """What a loop adds to a counter every turn."""
    if out is var:
        return 0
    at = None if isinstance(out, Literal) else scope.producers.get(out)
    eqn = None if at is None else scope.jaxpr.eqns[at]
    if eqn is None or eqn.primitive.name not in ("add", "sub"):
        return None
    one, two = eqn.invars
    if eqn.primitive.name == "add" and two is var:
        one, two = two, one
    if one is not var or not isinstance(two, Literal):
        return None
    return -int(two.val) if eqn.primitive.name == "sub" else int(two.val)


# ---------------------------------------------------------------- parameters by number


def loops_around(scope: Scope) -> list[tuple[Plan, int]]:
    """The loops around a jaxpr, outermost first: a plan and an equation each."""
    found: list[tuple[Plan, int]] = []
    while scope.caller is not None:
        caller, index = scope.caller
        if caller.jaxpr.eqns[index].primitive.name == "scan":
            found.insert(0, (caller.plan, index))
        scope = caller
    return found


def affine(start: np.ndarray) -> tuple[int, tuple[int, ...]] | None:
    """``(base, steps)`` of numbers that grow by as much in every turn of each loop."""
    base = int(start.reshape(-1)[0]) if start.size else 0
    steps = []
    for axis, size in enumerate(start.shape):
        first = np.moveaxis(start, axis, 0).reshape(size, -1)
        steps.append(int(first[1, 0]) - base if size > 1 else 0)
    grid = np.indices(start.shape)
    wanted = base + sum(s * i for s, i in zip(steps, grid, strict=True))
    return (base, tuple(steps)) if np.array_equal(start, wanted) else None


def sliced(
    scope: Scope, view: View, starts: list[np.ndarray], sizes: Shape
) -> View | None:
    """A part of a parameter that starts where known numbers say.

    An axis along which the start moves on in every turn of a loop is an axis of stacked
    layers; the loop is noted to consume it by slices.

    Args:
        starts: ``[*loops]`` for each of its axes, or ``[*loops, n]`` for ``n`` parts.

    Returns:
        The view of what is read, ``[*sizes]`` or ``[n, *sizes]``.
    """
    limits = [d - s for d, s in zip(view.shape, sizes, strict=True)]
    pairs = zip(starts, limits, strict=True)
    clipped = [np.asarray(np.clip(x, 0, m)) for x, m in pairs]
    lengths, depth = starts[0].shape, len(scope.loops)
    axis_of: dict[int, int] = {}  # by loop; the parts are one more
    ranges, split, turned = [], [], []
    for axis, (start, size) in enumerate(zip(clipped, sizes, strict=True)):
        found = affine(start)
        if found is None:
            return None
        base, moving = found[0], [k for k, step in enumerate(found[1]) if step]
        if len(moving) > 1 or set(moving) & set(axis_of):
            return None
        turns, step = 1, 1
        for loop in moving:
            turns, step = lengths[loop], found[1][loop]
            axis_of[loop] = axis
            base += min(step, 0) * (turns - 1)
            turned += [2 * axis] if step < 0 else []
        if size > 1 and turns > 1 and abs(step) != size:
            return None
        stride = abs(step) if size == 1 else 1
        ranges.append((base, base + stride * (turns * size - 1) + 1, stride))
        split += [turns, size]
    loops = sorted(set(axis_of) - {depth})
    around = loops_around(scope)
    taken = [k for k, (plan, i) in enumerate(around) if view.leaf in plan.unstacked[i]]
    if view.stack and loops and loops[0] <= max(taken, default=-1):
        return None  # slices of an inner loop before those of an outer one
    if len(lengths) > depth and lengths[depth] > 1 and depth not in axis_of:
        return None
    part = view.slice(*zip(*ranges, strict=True)) if sizes else view
    part = part and part.reshape(tuple(split))
    part = part and part.rev(tuple(turned))
    front = [2 * axis_of[k] for k in (*loops, depth) if k in axis_of]
    rest = [axis for axis in range(len(split)) if axis not in front]
    part = part and part.transpose((*front, *rest))
    for _ in loops:
        part = part and part.unstack()
    part = part and part.reshape((*lengths[depth:], *sizes))
    for loop in loops if part else []:
        plan, index = around[loop]
        plan.unstacked[index] = plan.unstacked[index] | {view.leaf}
    return part
