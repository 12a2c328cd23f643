"""Abstract walk over a jaxpr: which variable reads which parameter, and how.

Every variable carries a *fact*: it is a ``View`` of a parameter, a ``Scaled`` view (a
view times other variables), several views ``Beside`` each other, the ``Output`` of a
layer to which a bias may still be added, ``Counting`` numbers or one-hot vectors, or
nothing known. ``RULES`` holds one small handler per primitive; a handler returns the
facts of the outputs, or None where it does not apply. A parameter whose fact is lost on
the way, in either case, counts as used outside a layer.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from kfac_jax_lite.core.parameter_views import Shape, View
from kfac_jax_lite.core.types import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from kfac_jax_lite.tagging.liveness import Live, Liveness, marks_in
from kfac_jax_lite.tagging.sites import (
    CALLS,
    CHECKPOINTS,
    CUSTOM_RULES,
    Branch,
    Derived,
    Plan,
    Ref,
    ScaleShiftGeometry,
    Site,
    Steps,
    seen_from,
)


@dataclasses.dataclass(frozen=True)
class Factor:
    """A variable beside a view; ``steps`` bring it to ``shape``."""

    atom: Any
    shape: Shape
    steps: Steps = ()


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A view times other variables, elementwise."""

    view: View
    factors: tuple[Factor, ...]

    @property
    def constant(self) -> bool:
        """Whether the factors are literals."""
        return all(isinstance(f.atom, Literal) for f in self.factors)

    def seen_from(self, plan: Plan) -> "Scaled":
        """The fact as another jaxpr sees it: its variables are those of ``plan``."""

        def refer(factor: Factor) -> Factor:
            return dataclasses.replace(factor, atom=seen_from(plan, factor.atom))

        return Scaled(self.view, tuple(map(refer, self.factors)))


@dataclasses.dataclass(frozen=True)
class Beside:
    """Views that stand side by side along one axis of the variable."""

    views: tuple[View, ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class Output:
    """Output of a layer; ``labels`` number its output axes, None for row axes.

    ``beside`` are the sites of further layers that wrote the same variable, each a span
    of the only output axis.
    """

    site: Site
    labels: tuple[int | None, ...]
    beside: tuple[Site, ...] = ()


@dataclasses.dataclass(frozen=True)
class Counting:
    """``0, 1, 2, …`` along one axis; ``one_hot``: compared with something."""

    labels: tuple[bool, ...]
    one_hot: bool = False


def leaves_of(fact: "Fact") -> list[int]:
    """The leaves that a fact reads, once for every view."""
    views = fact.views if isinstance(fact, Beside) else (fact,)
    views = [v.view if isinstance(v, Scaled) else v for v in views]
    return [v.leaf for v in views if isinstance(v, View)]


def count_leaves(facts: "Iterable[Fact]") -> collections.Counter[int]:
    """How many views of every leaf some facts hold."""
    return collections.Counter(leaf for fact in facts for leaf in leaves_of(fact))


def shape_of(atom: Any) -> Shape:
    """Shape of a jaxpr variable or literal."""
    return tuple(map(int, atom.aval.shape))


Fact = View | Scaled | Beside | Output | Counting | None
Handler = Callable[["Scope", int, JaxprEqn, list[Fact]], "Sequence[Fact] | None"]
RULES: dict[str, Handler] = {}


ALWAYS: set[str] = set()
PROGRAMS = (*CALLS, *CHECKPOINTS, *CUSTOM_RULES, "scan", "cond", "while", "shard_map")


def rule(*primitives: str, always: bool = False) -> Callable[[Handler], Handler]:
    """Registers a handler for primitives, by name (names outlive JAX's modules)."""

    def register(handler: Handler) -> Handler:
        for name in primitives:
            RULES[name] = handler
            if always:
                ALWAYS.add(name)
        return handler

    return register


class Mark(NamedTuple):
    """A marked value.

    Attributes:
        name: Likelihood, or what stands in front of one.
        shape: Its shape.
        loops: Lengths of the loops around it.
        eqn: The equation.
    """

    name: str
    shape: Shape
    loops: Shape
    eqn: JaxprEqn


class Walk:
    """What one walk over a whole loss has found, at any depth.

    Attributes:
        sites: Candidate layer applications, in program order.
        uses: Leaf number to the primitives that use it outside candidate layers.
        marks: The marked outputs, and what stands in front of them.
        loops: Lengths of the loops around the current equation.
        branch: The ``cond`` branches around the current equation, outermost first.
        touched: Leaves that a site or a use has accounted for at the current equation.
        while_leaves: Leaves that reach a ``while`` loop, as bits.
        nested_marks: Whether an output is marked inside a loop or branch.
        reached: Leaves that the loss, or what is sampled, depends on, as bits.
        scopes: The scope of every plan.
        liveness: Where derivatives of the loss pass.
        of_marks: Where derivatives of single marked outputs pass, if it matters, by the
            identity of their equations.
        mesh_bits: Bits of the dependencies for mesh axes of a ``shard_map``.
    """

    def __init__(
        self,
        num_leaves: int,
        liveness: Liveness,
        of_marks: dict[int, Liveness] | None = None,
    ):
        self.liveness: Liveness = liveness
        self.of_marks: dict[int, Liveness] = of_marks or {}
        self.sites: list[Site] = []
        self.uses: dict[int, list[str]] = collections.defaultdict(list)
        self.marks: list[Mark] = []
        self.loops: Shape = ()
        self.branch: Branch = ()
        self.touched: collections.Counter[int] = collections.Counter()
        self.data_bit: int = 1 << num_leaves
        self.while_leaves = 0
        self.branches = 0
        self.reached = 0
        self.nested_marks = False
        self.scopes: dict[Plan, Scope] = {}
        self.mesh_bits: dict[Any, int] = {}

    def mesh_bit(self, axis: Any) -> int:
        """The bit of what differs along a mesh axis."""
        bit = self.data_bit << (1 + len(self.mesh_bits))
        return self.mesh_bits.setdefault(axis, bit)


class Scope:
    """Facts and dependencies of the variables of one jaxpr.

    Args:
        walk: The walk over the whole loss.
        plan: The jaxpr's plan.
        jaxpr: The jaxpr.
        outs: Through which of its results a derivative of the loss passes.
        marked: The same of marked outputs, by the identity of their equations.
    """

    def __init__(
        self,
        walk: Walk,
        plan: Plan,
        jaxpr: Jaxpr,
        outs: Sequence[bool],
        marked: Mapping[int, Sequence[bool]] = MappingProxyType({}),
    ):
        self.walk: Walk = walk
        self.plan: Plan = plan
        self.jaxpr: Jaxpr = jaxpr
        self.facts: dict[Var, Fact] = {}
        self.deps: dict[Var, int] = {}
        self.consumers: dict[Var, list[int]] = collections.defaultdict(list)
        self.producers: dict[Var, int] = {}
        self.live: Live = walk.liveness.part(jaxpr, outs)
        none = (False,) * len(jaxpr.outvars)
        self.reaching: dict[int, Live] = {
            k: part.part(jaxpr, marked.get(k, none))
            for k, part in walk.of_marks.items()
        }
        self.loops: Shape = walk.loops
        self.caller: tuple[Scope, int] | None = None
        self.numbers: dict[Var, Any] = {}
        walk.scopes[plan] = self
        for i, eqn in enumerate(jaxpr.eqns):
            for atom in eqn.invars:
                if not isinstance(atom, Literal) and i in self.live.equations:
                    self.consumers[atom].append(i)
            self.producers.update(dict.fromkeys(eqn.outvars, i))
        for atom, live in zip(jaxpr.outvars, outs, strict=True):
            if not isinstance(atom, Literal) and live:
                self.consumers[atom].append(-1)

    def fact(self, atom: Any) -> Fact:
        """The fact of an atom (None for literals and unknowns)."""
        return None if isinstance(atom, Literal) else self.facts.get(atom)

    def dependencies(self, atoms: Iterable[Any]) -> int:
        """Bit set of the leaves (and the data) that atoms depend on."""
        bits = 0
        for atom in atoms:
            if isinstance(atom, Ref):
                bits |= self.walk.scopes[atom.plan].deps.get(atom.atom, 0)
            elif isinstance(atom, Derived):
                bits |= self.dependencies(atom.atoms)
            elif not isinstance(atom, Literal):
                bits |= self.deps.get(atom, 0)
        return bits

    def used_once(self, atom: Any) -> bool:
        """Whether a single equation (or the output list) reads the variable."""
        return not isinstance(atom, Literal) and len(self.consumers[atom]) == 1

    def add_site(self, index: int, site: Site) -> None:
        """Records a candidate behind equation ``index``."""
        site.branch = self.walk.branch
        site.place = self.plan, index
        stacked = math.prod(site.primary.stack)
        site.repeat = math.prod(self.walk.loops) // stacked
        self.plan.sites.setdefault(index, []).append(site)
        self.walk.sites.append(site)
        self.walk.touched.update(v.leaf for v in site.views.values())

    def join(self, site: Site, role: str, view: View) -> None:
        """Adds a parameter to a site."""
        site.views[role] = view
        self.walk.touched[view.leaf] += 1

    def drop_site(self, site: Site) -> None:
        """Takes a candidate back."""
        plan, index = site.place or (self.plan, 0)
        plan.sites[index].remove(site)
        self.walk.sites.remove(site)

    def move_site(self, index: int, site: Site) -> None:
        """Lets a site stand behind a later equation."""
        plan, old = site.place or (self.plan, index)
        if plan is not self.plan:
            site.inputs = tuple(seen_from(plan, a) for a in site.inputs)
            plan.exports = True
        plan.sites[old].remove(site)
        self.plan.sites.setdefault(index, []).append(site)
        site.place, site.output = (self.plan, index), 0

    def add_units(
        self,
        index: int,
        views: dict[str, View],
        factors: tuple[Factor, ...],
        shape: Shape,
        output: int = 0,
    ) -> Output | None:
        """Records a scale or shift: units are the view's axes, the rest are rows.

        Args:
            views: Its role and its view, of rank ``len(shape)``.
        """
        (role, view), *_ = views.items()
        axis_of = {a: i for i, a in enumerate(view.axes) if a is not None}
        labelled = [axis_of[a] for a in sorted(axis_of)]
        core = view.flat()
        if core is None:
            self.mark_used([view], "mul" if role == "scale" else "add")
            return None
        rest = [i for i in range(len(shape)) if i not in labelled]
        geometry = ScaleShiftGeometry(
            order=tuple(rest + labelled),
            rows=tuple(shape[i] for i in rest),
            units=math.prod(view.core),
            factor_ops=tuple(f.steps for f in factors),
        )
        inputs = tuple(f.atom for f in factors)
        site = Site("scale_shift", {role: core}, inputs, geometry, output)
        self.add_site(index, site)
        labels: list[int | None] = [None] * len(shape)
        for label, axis in enumerate(labelled):
            labels[axis] = label
        return Output(site, tuple(labels)) if role == "scale" else None

    def unclaimed(self, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
        """Facts of operands that no rule covers.

        A parameter that was repeated along new axes (a class token, a mask token) is
        tapped where it was repeated: a shift of zeros.
        """
        left: list[Fact] = []
        for atom, fact in zip(eqn.invars, facts, strict=True):
            repeated = isinstance(fact, View) and not fact.dense
            at = self.producers.get(atom) if isinstance(atom, Var) else None
            if not repeated or at is None or not self.used_once(atom):
                left.append(fact)
                continue
            results: list[Any] = list(self.jaxpr.eqns[at].outvars)
            views: dict[str, Any] = {"shift": fact}
            self.add_units(at, views, (), shape_of(atom), results.index(atom))
        return left

    def mark_used(self, facts: Iterable[Fact], primitive: str) -> None:
        """Notes that parameters are used in a way no layer rule covers."""
        for fact in facts:
            for leaf in leaves_of(fact):
                self.walk.uses[leaf].append(primitive)
                self.walk.touched[leaf] += 1

    def run(self, facts: list[Fact], deps: list[int]) -> tuple[list[Fact], list[int]]:
        """Walks the jaxpr; returns facts and dependencies of its outputs."""
        for var, fact, bits in zip(self.jaxpr.invars, facts, deps, strict=True):
            self.facts[var], self.deps[var] = fact, bits
        for index, eqn in enumerate(self.jaxpr.eqns):
            self.step(index, eqn)
        for atom in self.jaxpr.outvars:
            if isinstance(atom, Literal) or self.used_once(atom):
                continue
            if isinstance(self.facts.get(atom), Output):
                self.facts[atom] = None
        outs = self.jaxpr.outvars
        return [self.fact(a) for a in outs], [self.dependencies([a]) for a in outs]

    def step(self, index: int, eqn: JaxprEqn) -> None:
        """Applies the rule of one equation."""
        bits = self.dependencies(eqn.invars)
        for var in eqn.outvars:
            self.deps[var] = bits
        facts: list[Fact] = [self.fact(a) for a in eqn.invars]
        name = eqn.primitive.name
        if index not in self.live.equations:
            if name in PROGRAMS:
                return
            facts[:] = [f if isinstance(f, Counting) else None for f in facts]
        elif name in PROGRAMS:  # whose operands may lead to nothing that is live
            flags = [v in self.live.variables for v in eqn.outvars]
            passed = self.walk.liveness.operands(eqn, flags)
            facts[:] = [
                f if p or isinstance(f, Counting) else None
                for f, p in zip(facts, passed, strict=True)
            ]
        if name not in ALWAYS and not any(f is not None for f in facts):
            return
        handler = RULES.get(name)
        outer, self.walk.touched = self.walk.touched, collections.Counter()
        results = handler(self, index, eqn, facts) if handler else None
        if results is None:
            self.mark_used(self.unclaimed(eqn, facts), name)
            results = [None] * len(eqn.outvars)
        lost = count_leaves(facts) - count_leaves(results) - self.walk.touched
        for leaf in lost:
            self.walk.uses[leaf].append(name)
        outer.update(self.walk.touched)
        outer.update(lost)
        self.walk.touched = outer
        for var, fact in zip(eqn.outvars, results, strict=True):
            self.facts[var] = fact


def is_known(value: Any) -> bool:
    """Whether a constant of a program is a concrete array of whole numbers."""
    dtype = getattr(value, "dtype", np.dtype(object))
    whole = jnp.issubdtype(dtype, jnp.integer) and not isinstance(
        value, jax.core.Tracer
    )
    return whole and getattr(value, "is_fully_addressable", True)


def analyse(
    closed: ClosedJaxpr, num_leaves: int, sampled: bool, outputs_only: bool = False
) -> tuple[Walk, Plan]:
    """Walks a traced loss."""
    jaxpr = closed.jaxpr
    marks = marks_in(jaxpr)
    several = sampled or len(marks) > 1
    of_marks = {id(eqn): Liveness(False, eqn) for eqn in marks if several}
    liveness = Liveness(sampled, every=outputs_only)
    walk, plan = Walk(num_leaves, liveness, of_marks), Plan()
    outs = [i == 0 for i in range(len(jaxpr.outvars))]
    scope = Scope(walk, plan, jaxpr, outs)
    scope.deps.update(dict.fromkeys(jaxpr.constvars, walk.data_bit))
    known = zip(jaxpr.constvars, closed.consts, strict=True)
    scope.numbers.update({v: np.asarray(x) for v, x in known if is_known(x)})
    shapes = [tuple(v.aval.shape) for v in jaxpr.invars[:num_leaves]]
    facts: list[Fact] = [View.of_leaf(i, s) for i, s in enumerate(shapes)]
    facts += [None] * (len(jaxpr.invars) - num_leaves)
    deps = [1 << i for i in range(num_leaves)]
    deps += [walk.data_bit] * (len(jaxpr.invars) - num_leaves)
    _, out = scope.run(facts, deps)
    walk.reached |= out[0] if out else 0
    return walk, plan
