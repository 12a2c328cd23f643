"""Elementwise rules: scales and shifts, biases, and weights that are rescaled.

A parameter times data is a scale; plus data, a shift, or the bias of the layer whose
output it is added to. Arithmetic with values that depend on parameters alone (the norm
of a weight, a learned gain) leaves the parameter what it is: the layer's derivative
goes through it, its curvature is that of the layer it ends up in. A function of the
parameter, entry by entry, is the parameter times its derivative there.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from kfac_jax_lite.core.parameter_views import Shape, View
from kfac_jax_lite.core.types import JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import (
    Beside,
    Fact,
    Factor,
    Output,
    Scaled,
    Scope,
    leaves_of,
    rule,
    shape_of,
)
from kfac_jax_lite.tagging.interpreter import bind
from kfac_jax_lite.tagging.rules_structure import axis_step, move_scaled, spread_site
from kfac_jax_lite.tagging.sites import (
    Derived,
    EmbeddingGeometry,
    ScaleShiftGeometry,
    Site,
    moved,
)

# Functions of a parameter, entry by entry, and those that are constant by steps.
FUNCTIONS = """
abs acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt clamp cos cosh
digamma erf erf_inv erfc exp exp2 expm1 integer_pow lgamma log log1p logistic max min
neg polygamma pow rsqrt sin sinh sqrt square tan tanh
""".split()
STEPS = "ceil floor ge gt is_finite le lt ne round sign".split()
MOVES = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims")


@rule("mul", "div")
def scale(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Elementwise product with a parameter: collects factors, then emits a site."""
    owned = [isinstance(f, View | Scaled) for f in facts]
    if not any(owned):
        return [None]
    side = main_operand(facts) if all(owned) else owned.index(True)
    divided = eqn.primitive.name == "div"
    if side is None or (divided and side == 1):
        return function(scope, index, eqn, facts)
    fact, other = facts[side], eqn.invars[1 - side]
    if isinstance(fact, View):
        fact = Scaled(fact, ())
    shape = shape_of(eqn.outvars[0])
    view = stretched(fact.view, shape)  # type: ignore[union-attr]
    scope.mark_used([facts[1 - side]], eqn.primitive.name)
    factor = factor_of(scope, other, divided)
    result = Scaled(view, (*fact.factors, factor))  # type: ignore[union-attr]
    if more_factors_follow(scope, eqn.outvars[0], result):
        return [result]
    atoms = [f.atom for f in result.factors]
    rows = not view.dense or len(view.axes) > len(view.core)
    if not rows or not scope.dependencies(atoms) & scope.walk.data_bit:
        return [result]  # no row has an example of its own: a weight, rescaled
    return [scope.add_units(index, {"scale": view}, result.factors, shape)]


def stretched(view: View, shape: Shape) -> View:
    """The view as an operand of that shape (unit axes and scalars are repeated)."""
    if view.shape == () and shape:
        return view.broadcast(shape, ())
    return dataclasses.replace(view, shape=shape)


def main_operand(facts: list[Fact]) -> int | None:
    """Of two parameters that are multiplied, the one that is not broadcast.

    If one of them is a function of a parameter, such as a gain that must be positive,
    and not clearly the larger one, it is the other.
    """
    views = [f.view if isinstance(f, Scaled) else f for f in facts]
    whole = [isinstance(v, View) and v.dense for v in views]
    sizes = [math.prod(v.core) for v in views if isinstance(v, View)]
    if len(sizes) < 2:
        return None
    computed = [
        isinstance(f, Scaled) and any(isinstance(x.atom, Derived) for x in f.factors)
        for f in facts
    ]
    side = 0 if sizes[0] > sizes[1] else 1
    if sizes[0] != sizes[1] and whole[side]:
        return side
    same = views[0] == views[1]
    return computed.index(False) if sum(computed) == 1 and not same else None


def factor_of(scope: Scope, atom: Any, divided: bool) -> Factor:
    """A variable that multiplies a parameter, without axes it is broadcast along."""
    shape = shape_of(atom)
    steps: tuple[tuple[str, Any], ...] = ()
    at = None if isinstance(atom, Literal) else scope.producers.get(atom)
    producer = None if at is None else scope.jaxpr.eqns[at]
    if producer is not None and producer.primitive.name == "broadcast_in_dim":
        _, (_, dims) = axis_step(producer)
        inner = producer.invars[0]
        own = [1] * len(shape)
        for axis, size in zip(dims, shape_of(inner), strict=True):
            own[axis] = size
        atom, shape, steps = inner, tuple(own), (("reshape", tuple(own)),)
    if math.prod(shape) == 1:
        shape, steps = (), (("reshape", ()),)
    if divided:
        steps = (*steps, ("reciprocal", None))
    return Factor(atom, shape, steps)


def more_factors_follow(scope: Scope, var: Any, fact: Scaled) -> bool:
    """Whether the product's only reader multiplies it by more data."""
    if not scope.used_once(var) or scope.consumers[var][0] < 0:
        return False
    eqn = scope.jaxpr.eqns[scope.consumers[var][0]]
    name = eqn.primitive.name
    if name in ("mul", "div"):
        if name == "div" and eqn.invars[1] is var:
            return False
        other = eqn.invars[1] if eqn.invars[0] is var else eqn.invars[0]
        return not isinstance(other, Literal) and not is_known(scope, other)
    if name == "convert_element_type":
        return more_factors_follow(scope, eqn.outvars[0], fact)
    if name in MOVES:
        moved = move_scaled(fact, axis_step(eqn))
        return moved is not None and more_factors_follow(scope, eqn.outvars[0], moved)
    return False


def is_known(scope: Scope, var: Any) -> bool:
    """Whether a variable has a fact, or will have that of one whose axes it moves."""
    if var in scope.facts or var not in scope.producers:
        return scope.fact(var) is not None
    eqn = scope.jaxpr.eqns[scope.producers[var]]
    source = eqn.invars[0] if eqn.primitive.name in MOVES else None
    return isinstance(source, Var) and is_known(scope, source)


@rule("add", "add_any", "sub")
def shift(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A bias behind a layer joins its block; any other added parameter is a shift."""
    owned = [isinstance(f, View | Beside) for f in facts]
    shape = shape_of(eqn.outvars[0])
    if all(owned) or any(isinstance(f, Scaled) for f in facts):
        return added(scope, index, eqn, facts)
    if not any(owned):
        for atom, fact in zip(eqn.invars, facts, strict=True):
            spread(scope, index, atom, fact, shape)
        return [None]
    side = owned.index(True)
    own, other, atom = facts[side], facts[1 - side], eqn.invars[1 - side]
    if eqn.primitive.name == "sub" and side == 1:
        return function(scope, index, eqn, facts)
    if isinstance(own, Beside):
        if eqn.primitive.name == "sub" or shape_of(atom) != shape:
            return None
        joined = scope.used_once(atom) and biases_beside(scope, own, other)
        return [other] if joined else None
    assert isinstance(own, View)
    whole = own.shape == shape and own.dense
    own = stretched(own, shape)
    joins = eqn.primitive.name != "sub" and scope.used_once(atom)
    if joins and isinstance(other, Output) and not other.beside:
        role = "shift" if other.site.kind == "scale_shift" else "bias"
        bias = aligned(own, other.site, other.labels, shape)
        if bias is not None and shape_of(atom) == shape and takes(other.site, role):
            scope.join(other.site, role, bias)
            return [other]
    spread(scope, index, atom, other, shape)
    if not scope.dependencies([atom]) & scope.walk.data_bit:
        return [own] if whole else None
    return [scope.add_units(index, {"shift": own}, (), shape)]


def added(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A rescaled parameter plus data is a shift that counts by its derivative."""
    side = 0 if isinstance(facts[0], Scaled) else 1
    fact, atom, shape = facts[side], eqn.invars[1 - side], shape_of(eqn.outvars[0])
    if isinstance(fact, Scaled) and not leaves_of(facts[1 - side]):
        view = stretched(fact.view, shape)
        rows = not view.dense or len(view.axes) > len(view.core)
        if rows and scope.dependencies([atom]) & scope.walk.data_bit:
            spread(scope, index, atom, facts[1 - side], shape)
            return [scope.add_units(index, {"scale": view}, fact.factors, shape)]
    return function(scope, index, eqn, facts)


@rule(*FUNCTIONS)
def function(
    scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]
) -> list[Scaled] | None:
    """A function of a parameter, entry by entry: its derivative is a factor."""
    del index
    shape = shape_of(eqn.outvars[0])
    own = [f for f in facts if leaves_of(f)]
    views = {f.view if isinstance(f, Scaled) else f for f in own}
    (view, *others) = views or {None}
    if others or not isinstance(view, View) or view.shape != shape or not view.dense:
        return None  # repeated entries are tapped where they were repeated
    factors = [f.factors if isinstance(f, Scaled) else () for f in facts]
    inner = tuple(f.atom for group in factors for f in group)

    def derivative(*values: Any):
        held = [lax.stop_gradient(value) for value in values]
        operands, rest = held[: len(facts)], iter(held[len(facts) :])
        tangents = {}
        for place, (fact, group) in enumerate(zip(facts, factors, strict=True)):
            parts = [moved(f.steps, next(rest)) for f in group]
            if leaves_of(fact):
                one = jnp.ones(shape, operands[place].dtype)
                tangents[place] = math.prod(parts, start=one).astype(one.dtype)

        def result(*given: Any):
            whole = dict(enumerate(operands)) | dict(zip(tangents, given, strict=True))
            return bind(scope.jaxpr, eqn, list(whole.values()))[0]

        # Backwards: a function may have no other derivative. Entries do not mix.
        out, pullback = jax.vjp(result, *(operands[place] for place in tangents))
        pulled = zip(tangents.values(), pullback(jnp.ones_like(out)), strict=True)
        return sum(tangent * slope for tangent, slope in pulled)

    scope.walk.touched.update(leaf for fact in own for leaf in leaves_of(fact))
    if eqn.primitive.name == "neg":
        return [Scaled(view, (*factors[0], Factor(Derived(lambda: -1.0, ()), ())))]
    factor = Factor(Derived(derivative, (*eqn.invars, *inner)), shape)
    return [Scaled(view, (factor,))]


@rule(*STEPS)
def step(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """Functions without a derivative: what they give is data."""
    del index
    for fact in facts:
        scope.walk.touched.update(leaves_of(fact))
    return [None] * len(eqn.outvars)


@rule("select_n")
def select(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
    """A parameter in some places; or itself, as ``vmap`` makes of ``switch``.

    ``switch`` puts the parameter without its derivative where another branch is taken:
    its values are the parameter's, and those examples have no cotangent.
    """
    which, *cases = eqn.invars
    owned = [f for f in facts[1:] if leaves_of(f)]
    sources = {atom if fact else source(scope, atom)
               for atom, fact in zip(cases, facts[1:], strict=True)}  # fmt: skip
    if not owned:
        return [None]
    fact = owned[0]
    view = fact.view if isinstance(fact, Scaled) else fact
    chosen: Any = range(len(shape_of(which)))
    at = scope.producers.get(which) if isinstance(which, Var) else None
    made = None if at is None else scope.jaxpr.eqns[at]
    if made is not None and made.primitive.name == "broadcast_in_dim":
        chosen = made.params["broadcast_dimensions"]
    if len(sources) == 1 and isinstance(view, View):
        if all(view.axes[i] is None for i in chosen):
            scope.walk.touched.update(leaf for f in owned for leaf in leaves_of(f))
            return [fact]
    return function(scope, index, eqn, facts)


def source(scope: Scope, atom: Any) -> Any:
    """The variable that ``stop_gradient`` gave another name, or the atom itself."""
    at = scope.producers.get(atom) if isinstance(atom, Var) else None
    if at is None or scope.jaxpr.eqns[at].primitive.name != "stop_gradient":
        return id(atom) if isinstance(atom, Literal) else atom
    return scope.jaxpr.eqns[at].invars[0]


def takes(site: Site, role: str) -> bool:
    """Whether a bias or shift fits in the block of a site.

    Lookups have no homogeneous coordinate; behind a weight whose columns are rescaled
    the bias has other cotangents than the weight.
    """
    scales = getattr(site.geometry, "scales", ())
    rescaled = any(scale.side in ("out", "both") for scale in scales)
    return site.kind != "embedding" and not rescaled and role not in site.views


def spread(scope: Scope, index: int, atom: Any, fact: Fact, shape: Shape) -> None:
    """A lookup shared by the whole batch (positions) is tapped where it meets it.

    Behind the sum every example has a row of its own, and a gradient of its own.
    """
    if not isinstance(fact, Output) or not scope.used_once(atom):
        return
    geometry, before = fact.site.geometry, shape_of(atom)
    if not isinstance(geometry, EmbeddingGeometry) or before == shape:
        return
    spread_site(scope, index, fact, before, shape)


def biases_beside(scope: Scope, own: Beside, other: Fact) -> bool:
    """Joins biases side by side to the layers whose outputs stand side by side."""
    if not isinstance(other, Output):
        return False
    sites = (other.site, *other.beside)
    if len(sites) != len(own.views) or other.labels[own.axis] is None:
        return False
    found = []
    for view, site in zip(own.views, sites, strict=True):
        bias = aligned(view, site, other.labels, view.shape)
        if bias is None or not takes(site, "bias"):
            return False
        found.append(bias)
    for bias, site in zip(found, sites, strict=True):
        scope.join(site, "bias", bias)
    return True


def aligned(
    view: View, site: Site, labels: tuple[int | None, ...], shape: Shape
) -> View | None:
    """The bias as ``[*blocks, 1, out]`` (or ``[units]``) if its axes are the outputs'.

    Every output axis must carry the bias and no row axis may.
    """
    pairs = [
        (label, axis)
        for label, axis, size in zip(labels, view.axes, shape, strict=True)
        if size > 1
    ]
    if any((label is None) != (axis is None) for label, axis in pairs):
        return None
    if view.stack != site.primary.stack:
        return None
    order = [axis for _, axis in sorted((lb, a) for lb, a in pairs if a is not None)]
    sizes = tuple(view.core[a] for a in order)
    geometry = site.geometry
    if isinstance(geometry, ScaleShiftGeometry):
        target: Shape = (geometry.units,)
    else:
        target = geometry.blocks + (1, geometry.n_out)
    if not math.prod(sizes) == math.prod(view.core) == math.prod(target):
        return None
    axes: tuple[int | None, ...] = tuple(order)
    plain = View(view.leaf, view.core, axes, sizes, view.ops, view.stack).settle()
    moved = plain and plain.reshape(target)
    return moved and moved.settle()
