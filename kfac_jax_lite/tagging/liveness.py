"""Which equations the derivative of the loss passes through.

Automatic differentiation of a network leaves equations behind whose results nobody
reads (the value beside a tangent), and ``stop_gradient`` leaves some that are read but
not differentiated. Neither is a use of a layer: their rows have no cotangents, and
would dilute the factors. An equation is *live* if a derivative of the loss, or of a
marked output that is sampled, passes through it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from kfac_jax_lite.core.likelihoods import LIKELIHOODS, PREFIX
from kfac_jax_lite.core.types import Jaxpr, JaxprEqn, Var
from kfac_jax_lite.tagging.sites import BY_HAND, CALLS, CHECKPOINTS, inside, scan_counts

# Programs that run once, with the results of the equation.
ONCE = (*CALLS, *CHECKPOINTS, "shard_map")
# Results of floating point whose derivative is zero everywhere.
FLAT = ("stop_gradient", "sign", "floor", "ceil", "round", "nextafter", "clz")


class Live(NamedTuple):
    """The live part of a jaxpr.

    Attributes:
        variables: Those through which a derivative passes.
        equations: Numbers of the equations through which one does.
    """

    variables: frozenset[Var]
    equations: frozenset[int]


class Liveness:
    """Finds the live part of a program and of those inside it, each once.

    Args:
        sampled: Whether marked outputs are differentiated, too. One whose result is
            never read counts; one that is read only where no derivative passes, as in a
            second network behind ``stop_gradient``, does not.
        mark: The equation of a marked output that is differentiated, beside what is
            asked for.
        every: Whether every marked output counts.
    """

    def __init__(
        self, sampled: bool, mark: JaxprEqn | None = None, every: bool = False
    ):
        self.sampled: bool = sampled
        self.mark: JaxprEqn | None = mark
        self.every: bool = every
        self.known: dict[tuple[Jaxpr, tuple[bool, ...]], Live] = {}

    def part(self, jaxpr: Jaxpr, outs: Sequence[bool]) -> Live:
        """The live part of a jaxpr, given which of its results are."""
        key = jaxpr, tuple(outs)
        if key not in self.known:
            self.known[key] = self._part(*key)
        return self.known[key]

    def _part(self, jaxpr: Jaxpr, outs: tuple[bool, ...]) -> Live:
        variables: set[Any] = {
            v for v, live in zip(jaxpr.outvars, outs, strict=True) if live and real(v)
        }
        equations: set[int] = set()
        read = {a for eqn in jaxpr.eqns for a in eqn.invars if isinstance(a, Var)}
        read |= {a for a in jaxpr.outvars if isinstance(a, Var)}
        for index, eqn in reversed([*enumerate(jaxpr.eqns)]):
            flags = [v in variables for v in eqn.outvars]
            root = eqn is self.mark or self.sampled_mark(eqn, read)
            if not (root or self.live(eqn, flags)):
                continue
            equations.add(index)
            passed = self.operands(eqn, flags)
            variables.update(
                a for a, p in zip(eqn.invars, passed, strict=True) if p and real(a)
            )
        return Live(frozenset(variables), frozenset(equations))

    def sampled_mark(self, eqn: JaxprEqn, read: set[Var]) -> bool:
        """Whether it marks an output that is sampled although nothing reads it."""
        if not (self.sampled and is_mark(eqn)):
            return False
        return self.every or eqn.outvars[0] not in read

    def live(self, eqn: JaxprEqn, flags: Sequence[bool]) -> bool:
        """Whether an equation is live, given which of its results are."""
        if eqn.primitive.name in ONCE:
            return bool(self.part(inside(eqn).jaxpr, flags).equations) or any(flags)
        return any(flags) and eqn.primitive.name not in FLAT

    def operands(self, eqn: JaxprEqn, flags: Sequence[bool]) -> list[bool]:
        """Which operands of a live equation a derivative reaches."""
        name = eqn.primitive.name
        if eqn.params.get("name") == BY_HAND:  # its reference says what layer it is
            flags = [any(flags)] * len(flags)
        if name in ONCE:
            return self.inputs(inside(eqn).jaxpr, flags)
        if name == "scan":
            return self.inputs(inside(eqn).jaxpr, self.results_inside(eqn, flags))
        if name == "cond":
            branches = [self.inputs(b.jaxpr, flags) for b in eqn.params["branches"]]
            return [False, *(any(each) for each in zip(*branches, strict=True))]
        return [True] * len(eqn.invars)

    def inputs(self, jaxpr: Jaxpr, outs: Sequence[bool]) -> list[bool]:
        """Which inputs of a jaxpr are live."""
        variables = self.part(jaxpr, outs).variables
        return [v in variables for v in jaxpr.invars]

    def results_inside(self, eqn: JaxprEqn, flags: Sequence[bool]) -> list[bool]:
        """Which results of the program inside an equation are live.

        What a loop carries is live if it is read after any turn.
        """
        flags = list(flags)
        if eqn.primitive.name != "scan":
            return flags
        n_const, n_carry = scan_counts(eqn)
        body = inside(eqn).jaxpr
        while True:
            carried = self.inputs(body, flags)[n_const : n_const + n_carry]
            more = [a or b for a, b in zip(flags[:n_carry], carried, strict=True)]
            if more == flags[:n_carry]:
                return flags
            flags[:n_carry] = more


def is_mark(eqn: JaxprEqn) -> bool:
    """Whether an equation marks an output."""
    if eqn.primitive.name != "name":
        return False
    return eqn.params["name"] in [PREFIX + likelihood for likelihood in LIKELIHOODS]


def marks_in(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that mark outputs, outside loops and branches."""
    found: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        if is_mark(eqn):
            found.append(eqn)
        elif eqn.primitive.name in CALLS + CHECKPOINTS:
            found += marks_in(inside(eqn).jaxpr)
    return found


def real(atom: object) -> bool:
    """Whether an atom is a variable of real or complex numbers."""
    if isinstance(atom, Literal):
        return False
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)  # type: ignore[attr-defined]
