"""Evaluates a jaxpr while following a plan: the traced loss, tapped.

``tap`` is the identity on a layer's output. Its backward rule hands the cotangent on
unchanged and returns, as the cotangents of zero-valued probes, whatever the estimators
compute from the layer's inputs and that cotangent. Sites of one layer share its probes,
so reverse mode itself adds up what weight sharing repeats.

Equations without a site, at any depth, are bound exactly as they were traced. Nested
jaxprs that hold sites are rebuilt from the public function that made them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import PartitionSpec

from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array, ClosedJaxpr, Jaxpr, JaxprEqn
from kfac_jax_lite.tagging.sites import (
    CALLS,
    CHECKPOINTS,
    Derived,
    Plan,
    Ref,
    Site,
    inside,
    manual_axes,
    scan_counts,
)
from kfac_jax_lite.tagging.unbatched import taken

Estimator = Callable[[Any, Array], Array]
Estimators = tuple[tuple[str, Estimator], ...]
Probes = dict[str, Array]


class Slot(NamedTuple):
    """What the taps of one layer share.

    Attributes:
        due: Scalar bool, or None for always.
        probes: Zeros, shaped like what the layer's taps return, by name.
        basis: Eigenbases ``(Q_A, Q_G)`` for EKFAC, else an empty tuple.
        output: Zeros, shaped like the output whose cotangent is wanted, or None.
    """

    due: Array | None
    probes: Probes
    basis: tuple[Array, ...] = ()
    output: Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(
    estimators: Estimators, output: Array, inputs: Any, due: Any, probes: Probes
) -> Array:
    """Returns ``output``; see the module's docstring.

    Args:
        estimators: For every probe its name and a function ``(inputs, cotangent) ->
            statistic``.
    """
    del estimators, inputs, due, probes
    return output


def _forward(
    estimators: Estimators, output: Array, inputs: Any, due: Any, probes: Probes
):
    del estimators
    return output, (inputs, due, probes)


def _backward(estimators: Estimators, residuals: tuple[Any, ...], cotangent: Array):
    inputs, due, probes = residuals
    statistics = estimated(estimators, inputs, cotangent, due, probes)
    return cotangent, None, None, statistics


def estimated(
    estimators: Estimators, inputs: Any, cotangent: Array, due: Any, probes: Probes
) -> Probes:
    """What the estimators make of a site's inputs and cotangent, where it is due."""
    statistics = {}
    for name, estimate in estimators:
        probe = probes[name]

        def refresh(
            inputs: Any, cotangent: Array, probe: Array, estimate: Estimator = estimate
        ):
            statistic = automatic(estimate, inputs, cotangent).astype(probe.dtype)
            return vary(statistic, varying_axes(probe))

        def skip(inputs: Any, cotangent: Array, probe: Array):
            del inputs, cotangent
            return untouched(probe)

        if due is None:
            statistics[name] = refresh(inputs, cotangent, probe)
            continue
        statistics[name] = lax.cond(due, refresh, skip, inputs, cotangent, probe)
    return statistics


def untouched(probe: Array) -> Array:
    """The zeros of a skipped statistic.

    Fresh zeros spare XLA a copy of the probe; under ``shard_map`` they would lack the
    probe's varying axes, which both branches of a ``cond`` must share.
    """
    return probe if varying_axes(probe) else jnp.zeros_like(probe)


tap.defvjp(_forward, _backward)


@jax.custom_vjp
def watch(output: Array, probe: Array) -> Array:
    """Returns ``output``; the cotangent of ``probe``, shaped alike, is the output's."""
    del probe
    return output


watch.defvjp(
    lambda output, probe: (output, probe),
    lambda probe, c: (c, vary(c, varying_axes(probe))),
)


Slots = dict[str, Slot]
OnSite = Callable[[Site, Array, list[Any], Slot], Array]


class Interpreter:
    """Runs planned jaxprs.

    Args:
        on_site: ``(site, output, inputs, slot) -> output`` for every site, where
            ``slot`` is the site's entry of ``slots``; None: sites are nothing special.
        stack_leaf: Layer name to the leaf that a ``scan`` may consume by slices.
        on_mark: ``(likelihood, output) -> output`` for marked outputs; None leaves
            them.
    """

    def __init__(
        self,
        on_site: OnSite | None,
        stack_leaf: dict[str, int],
        on_mark: Callable[[str, Array], Array] | None = None,
    ):
        self.on_site: OnSite | None = on_site
        self.stack_leaf: dict[str, int] = stack_leaf
        self.on_mark: Callable[[str, Array], Array] | None = on_mark
        self.envs: dict[Plan, dict[Any, Any]] = {}
        # Copies for every example, by variable (see ``spread``).
        self.copies: dict[Plan, dict[Any, Array]] = {}

    def run(
        self,
        plan: Plan,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        slots: Slots,
        copied: Sequence[Array | None] = (),
    ) -> tuple[list[Any], list[Any]]:
        """Evaluates ``jaxpr``; returns its outputs and the marked outputs passed."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        self.envs[plan], marked = env, []
        copies = self.copies[plan] = {
            v: c for v, c in zip(jaxpr.invars, copied, strict=False) if c is not None
        }

        def value(atom: Any):
            if isinstance(atom, Ref):
                return self.envs[atom.plan][atom.atom]
            if isinstance(atom, Derived):
                return atom.function(*map(value, atom.atoms))
            return atom.val if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            operands = [value(a) for a in eqn.invars]
            plans = plan.children.get(index, ())
            own = [
                None if isinstance(a, Literal) else copies.get(a) for a in eqn.invars
            ]
            if any(p.active for p in plans):
                handler = HANDLERS[eqn.primitive.name]
                more = (own,) if index in plan.steps else ()
                results, inner = handler(self, plan, index, eqn, operands, slots, *more)
                marked += inner
                if more:
                    found = self.copies[plans[0]]
                    pairs = zip(eqn.outvars, inside(eqn).jaxpr.outvars, strict=True)
                    copies |= {v: found[o] for v, o in pairs if o in found}
            else:
                results = bind(jaxpr, eqn, operands)
                if self.on_site is not None and index in plan.steps:
                    step = plan.steps[index]
                    bound = functools.partial(bind, jaxpr, eqn)
                    found = taken(step, eqn, operands, own, bound)
                    if step.name == "map":
                        copies |= zip(eqn.outvars, found, strict=True)
                    else:
                        results = found
            if index in plan.marks:
                results = [*map(as_array, results)]
                if self.on_mark is not None:
                    results = [self.on_mark(plan.marks[index], *results)]
                marked += results
            env.update(zip(eqn.outvars, results, strict=True))
            for site in plan.sites.get(index, ()):
                if self.on_site is None or site.layer is None:
                    continue
                var = eqn.outvars[site.output]
                inputs = [as_array(value(a)) for a in site.inputs]
                slot = slots[site.slot]
                slot = slot._replace(probes=vary(slot.probes, site.axes))
                if not site.spread:
                    env[var] = self.on_site(site, env[var], inputs, slot)
                    continue
                atom = site.inputs[0]
                first = None if isinstance(atom, Literal) else copies.get(atom)
                inputs[0] = broadcast(inputs[0], site) if first is None else first
                output = copies.get(var)
                output = broadcast(env[var], site) if output is None else output
                copies[var] = self.on_site(site, output, inputs, slot)
        return [value(a) for a in jaxpr.outvars], marked


def as_array(value: Any) -> Array:
    """A literal as an array; arrays keep their type."""
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def broadcast(x: Array, site: Site) -> Array:
    """A copy for every example."""
    return jnp.broadcast_to(x, (site.spread, *x.shape))


def bind(jaxpr: Jaxpr, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Evaluates one equation as it was traced: ``jaxpr`` cut down to that equation.

    How a primitive binds the functions in its parameters differs between JAX releases;
    ``jaxpr_as_fun`` is the public way that holds in all of them.
    """
    given = zip(eqn.invars, operands, strict=True)
    values = {a: v for a, v in given if not isinstance(a, Literal)}
    single = jaxpr.replace(
        constvars=[],
        invars=list(values),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return jaxpr_as_fun(ClosedJaxpr(single, ()))(*values.values())


def run_call(
    self: Interpreter,
    plan: Plan,
    index: int,
    eqn: JaxprEqn,
    operands: list[Any],
    slots: Slots,
    copied: Sequence[Array | None] = (),
) -> tuple[list[Any], list[Any]]:
    """``jit`` and plain calls: evaluated in line."""
    (inner,) = plan.children[index]
    return self.run(inner, *inside(eqn), operands, slots, copied)


def run_checkpoint(
    self: Interpreter,
    plan: Plan,
    index: int,
    eqn: JaxprEqn,
    operands: list[Any],
    slots: Slots,
) -> tuple[list[Any], list[Any]]:
    """``jax.checkpoint``: the taps are rematerialised with the rest."""
    (inner,) = plan.children[index]

    def body(operands: list[Any], slots: Slots):
        return self.run(inner, *inside(eqn), operands, slots)

    body = jax.checkpoint(
        body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    return body(operands, slots)


def run_scan(
    self: Interpreter,
    plan: Plan,
    index: int,
    eqn: JaxprEqn,
    operands: list[Any],
    slots: Slots,
) -> tuple[list[Any], list[Any]]:
    """``scan``: slots of layers whose parameter it slices are sliced along."""
    p, (n_const, n_carry) = eqn.params, scan_counts(eqn)
    consts = operands[:n_const]
    carry = operands[n_const : n_const + n_carry]
    (inner,) = plan.children[index]
    here = {site.slot for site in inner.all_sites() if site.primary.stack}
    sliced = {k for k in here if self.stack_leaf.get(k) in plan.unstacked[index]}
    whole = {k: v for k, v in slots.items() if k not in sliced}
    stacked = {k: slots[k] for k in sliced}
    dues = {k: stacked[k].due for k in sliced}
    stacked = {k: v._replace(due=None) for k, v in stacked.items()}

    def body(carry: list[Any], x: tuple[Any, ...]):
        xs, layer_slots = x
        layer_slots = {k: v._replace(due=dues[k]) for k, v in layer_slots.items()}
        out, _ = self.run(
            inner,
            *inside(eqn),
            [*consts, *carry, *xs],
            {**whole, **layer_slots},
        )
        return out[:n_carry], out[n_carry:]

    xs = (operands[n_const + n_carry :], stacked)
    carry, ys = lax.scan(
        body, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carry, *ys], []


def run_cond(
    self: Interpreter,
    plan: Plan,
    index: int,
    eqn: JaxprEqn,
    operands: list[Any],
    slots: Slots,
) -> tuple[list[Any], list[Any]]:
    """``cond`` and ``switch``: every branch gets its taps."""
    which, *operands = operands
    branches = []
    for inner, closed in zip(plan.children[index], eqn.params["branches"], strict=True):

        def branch(
            operands: list[Any],
            slots: Slots,
            inner: Plan = inner,
            closed: ClosedJaxpr = closed,
        ):
            out, _ = self.run(inner, closed.jaxpr, closed.consts, operands, slots)
            return out

        branches.append(branch)
    return lax.switch(which, branches, operands, slots), []


def run_shard_map(
    self: Interpreter,
    plan: Plan,
    index: int,
    eqn: JaxprEqn,
    operands: list[Any],
    slots: Slots,
) -> tuple[list[Any], list[Any]]:
    """``shard_map``: probes enter whole, so that their cotangents are summed up."""
    p, (inner,) = eqn.params, plan.children[index]
    sites = inner.all_sites()
    here = {site.layer: slots[site.layer] for site in sites if site.layer}
    axes = {name: {s.axes for s in sites if s.layer == name} for name in here}

    def body(operands: list[Any], slots: Slots):
        own = {}
        for name, slot in slots.items():
            # Once here and not at every site, where all sites agree.
            first, *others = axes[name]
            probes = slot.probes if others else vary(slot.probes, first)
            own[name] = slot._replace(probes=probes)
        return self.run(inner, *inside(eqn), operands, own)[0]

    run = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=(list(p["in_specs"]), PartitionSpec()),
        out_specs=list(p["out_specs"]),
        axis_names=manual_axes(eqn),
        check_vma=p["check_vma"],
    )
    return run(operands, here), []


HANDLERS: dict[str, Callable[..., tuple[list[Any], list[Any]]]] = {
    **dict.fromkeys(CALLS, run_call),
    **dict.fromkeys(CHECKPOINTS, run_checkpoint),
    "scan": run_scan,
    "cond": run_cond,
    "shard_map": run_shard_map,
}


def in_line(plan: Plan, jaxpr: Jaxpr) -> list[tuple[Site, jax.ShapeDtypeStruct]]:
    """Sites outside loops, branches and checkpoints, with their outputs' shapes."""
    found = []
    for index, eqn in enumerate(jaxpr.eqns):
        if HANDLERS.get(eqn.primitive.name) is run_call:
            for child in plan.children.get(index, ()):
                found += in_line(child, inside(eqn).jaxpr)
        for site in plan.sites.get(index, ()):
            kind: Any = eqn.outvars[site.output].aval
            shape = (site.spread, *kind.shape) if site.spread else kind.shape
            found.append((site, jax.ShapeDtypeStruct(shape, kind.dtype)))
    return found
