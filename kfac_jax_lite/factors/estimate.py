"""``tag`` and ``TaggedLoss``: value, gradient and statistics in one backward pass."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.factors import dense
from kfac_jax_lite.factors.sites import tap_site
from kfac_jax_lite.factors.slots import make_slots, read_state
from kfac_jax_lite.factors.state import zero_statistics
from kfac_jax_lite.likelihoods import sampled_cotangent, square_root_column
from kfac_jax_lite.tagging.interpreter import Interpreter
from kfac_jax_lite.tagging.layers import Site
from kfac_jax_lite.tagging.table import table
from kfac_jax_lite.tagging.trace import Trace, trace
from kfac_jax_lite.types import (
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
    Statistics,
)

FISHERS = ("empirical", "mc", "exact")
WEIGHT_SHARING = ("expand", "reduce")


def tag(
    loss_fn: Callable,
    params: Any,
    *args: Any,
    fisher: str = "empirical",
    weight_sharing: str = "expand",
    has_aux: bool = False,
    num_examples: int | None = None,
    strict: bool = False,
) -> "TaggedLoss":
    """Finds the layers of a loss function; nothing is executed.

    Args:
        loss_fn: ``loss_fn(params, *args)``, the *mean* of ``N`` loss terms: a scalar,
            or ``(scalar, aux)`` with ``has_aux``.
        params: Any pytree of real arrays or ``jax.ShapeDtypeStruct``.
        *args: Further arguments, arrays or ``jax.ShapeDtypeStruct``.
        fisher: ``"empirical"`` (gradients of the loss), ``"mc"`` (labels sampled from
            the marked output) or ``"exact"`` (the output's Hessian, one backward pass
            per output).
        weight_sharing: ``"expand"`` (every position is a row) or ``"reduce"``
            (positions of one example are reduced first).
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.
        num_examples: ``N``, where it is neither the rows of a marked output nor the
            leading axis that all arguments share.
        strict: Raise when a parameter falls back to a diagonal.

    Returns:
        The tagged loss. ``print`` it for the table of layers.

    Raises:
        TypeError: Parameters that are not real arrays; a loss that is not a scalar.
        ValueError: ``N`` cannot be told; the batch is empty; a parameter sits inside a
            ``while`` loop; ``strict`` and a parameter fell back.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671; Grosse & Martens, 2016,
        arXiv:1602.01407; Eschenhagen et al., 2023, arXiv:2311.00636.
    """
    for name, value, known in (
        ("fisher", fisher, FISHERS),
        ("weight_sharing", weight_sharing, WEIGHT_SHARING),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}.")
    sampled = fisher != "empirical"
    found = trace(loss_fn, params, args, has_aux, num_examples, sampled)
    tagged = TaggedLoss(
        loss_fn, found.layers, fisher, weight_sharing, has_aux, num_examples
    )
    fallen = [t for t in found.layers if t.kind == "diagonal"]
    if strict and fallen:
        lines = "\n".join(f"  {', '.join(t.params)}: {t.note}" for t in fallen)
        raise ValueError(f"no layer rule covers these parameters:\n{lines}")
    return tagged


@dataclasses.dataclass(frozen=True)
class TaggedLoss:
    """A loss function whose layers are known.

    Attributes:
        loss_fn: The user's function.
        layers: One ``LayerTag`` per curvature block; every parameter is in one.
        fisher: ``"empirical"``, ``"mc"`` or ``"exact"``.
        weight_sharing: ``"expand"`` or ``"reduce"``.
        has_aux: Whether the function returns ``(loss, aux)``.
        num_examples: ``N`` if the user gave it.
    """

    loss_fn: Callable
    layers: tuple[LayerTag, ...]
    fisher: str
    weight_sharing: str
    has_aux: bool
    num_examples: int | None

    def __str__(self) -> str:
        """The table of layers."""
        return table(self.layers)

    def value_and_grad(
        self, params: Any, *args: Any, opt_state: Any = None, key: Any = None
    ) -> tuple[Any, Any, dict[str, Statistics]]:
        """Loss, gradient and statistics: one forward pass, one backward pass.

        ``fisher="mc"`` pulls a second cotangent back, ``"exact"`` one per output, both
        only when a layer is due. Call it inside ``jax.jit``: outside, every call traces
        the loss anew.

        Args:
            params: Parameters, structured as in ``tag``.
            *args: Further arguments; other batch sizes retrace.
            opt_state: Optimiser state that contains a ``KFACState``: layers it does not
                list as due return zeros and cost nothing. None: all layers.
            key: PRNG key, for ``fisher="mc"``.

        Returns:
            ``(value, grads, statistics)``; ``value`` is ``(loss, aux)`` with
            ``has_aux``; ``statistics[layer.name]`` is a NamedTuple by kind.

        Raises:
            ValueError: ``key`` is missing; the state is of another model; the layers
                are no longer those of ``tag``.
        """
        if self.fisher == "mc" and key is None:
            raise ValueError('fisher="mc" samples labels: pass key=jax.random.key(…).')
        sampled = self.fisher != "empirical"
        found = trace(
            self.loss_fn, params, args, self.has_aux, self.num_examples, sampled
        )
        self._check_layers(found)
        due, bases = read_state(opt_state, found.layers)
        slots = make_slots(found.layers, params, due, bases)
        scalings = {t.name: self._scaling(t, found) for t in found.layers if t.g_shape}
        on_site = functools.partial(tap_site, tags(found), scalings, found.num_examples)
        run = Interpreter(on_site, {t.name: t.views[0].leaf for t in found.layers}).run
        leaves = jax.tree.leaves((params, args))
        num = len(jax.tree.leaves(params))
        closed, probes = found.closed, {k: s.probes for k, s in slots.items()}

        def tapped(flat, probes):
            filled = {k: s._replace(probes=probes[k]) for k, s in slots.items()}
            operands = [*flat, *leaves[num:]]
            out, marked = run(found.plan, closed.jaxpr, closed.consts, operands, filled)
            return (out[0], marked if sampled else []), out

        (loss, marked), pullback, out = jax.vjp(
            tapped, leaves[:num], probes, has_aux=True
        )
        zeros = [jnp.zeros_like(z) for z in marked]
        flat_grads, raw = pullback((jnp.ones_like(loss), zeros))
        curvature_grads = flat_grads
        if sampled:
            curvature_grads, raw = self._sampled(
                found, pullback, loss, marked, key, flat_grads, raw, slots
            )
        grads = jax.tree.unflatten(jax.tree.structure(params), flat_grads)
        statistics = pack_statistics(found, curvature_grads, raw)
        value = jax.tree.unflatten(found.out_tree, out)
        return value, grads, statistics

    def _sampled(self, found: Trace, pullback, loss, marked, key, grads, raw, slots):
        """Replaces what depends on cotangents by its MC or exact Fisher version.

        Of ``raw`` only input factors are used: XLA then drops the other statistics of
        the plain backward pass.

        Returns:
            Gradients for the diagonals, and statistics.
        """
        dues = [s.due for s in slots.values() if s.due is not None]
        zeros = {k: tuple(map(jnp.zeros_like, v)) for k, v in raw.items()}
        zero = jnp.zeros_like(loss)
        n = found.num_examples

        def pull(cotangents):
            scaled = [c / n for c in cotangents]
            return pullback((zero, scaled))

        def resample():
            if self.fisher == "exact":
                return grads, exact_statistics(found.marks, marked, pull, zeros)
            keys = jax.random.split(key, len(marked))
            triples = zip(found.marks, marked, keys, strict=True)
            return pull([sampled_cotangent(*t) for t in triples])

        if len(dues) < len(slots) or not dues:
            new_grads, new = resample()
        else:
            any_due = jnp.any(jnp.stack(dues))
            new_grads, new = lax.cond(any_due, resample, lambda: (grads, zeros))
        # The input factor is the first statistic of a Kronecker layer and does not
        # depend on the labels: it comes from the plain backward pass.
        kronecker = {t.name for t in found.layers if t.kronecker}
        merged = {
            k: (raw[k][0], *v[1:]) if k in kronecker else v for k, v in new.items()
        }
        return new_grads, merged

    def _scaling(self, layer: LayerTag, found: Trace) -> dense.Scaling:
        reduce = self.weight_sharing == "reduce"
        return dense.Scaling(
            num_examples=found.num_examples,
            num_rows=count_rows(found.sites[layer.name], found.num_examples, reduce),
            bias="bias" in layer.roles,
            reduce=reduce,
        )

    def _check_layers(self, found: Trace) -> None:
        def facts(layer):
            return layer.name, layer.kind, layer.params, layer.a_shape, layer.g_shape

        before, now = map(facts, self.layers), map(facts, found.layers)
        changed = set(before) ^ set(now)
        if changed:
            names = ", ".join(sorted({f[0] for f in changed}))
            raise ValueError(
                f"layers {names} differ from those found by kfac.tag: the parameters "
                "or the loss function's structure changed; tag it again."
            )


def tags(found: Trace) -> dict[str, LayerTag]:
    """Layers by name."""
    return {t.name: t for t in found.layers}


def count_rows(sites: list[Site], num_examples: int, reduce: bool) -> int:
    """``R``: rows over all sites and repetitions; of a ``cond``, the largest branch."""
    total = 0
    branches: dict[int, collections.Counter] = {}
    for site in sites:
        rows = math.prod(site.geometry.rows)
        if reduce:
            rows //= dense.positions(site.geometry.rows, num_examples)
        if site.branch is None:
            total += rows * site.repeat
        else:
            number, k = site.branch
            counter = branches.setdefault(number, collections.Counter())
            counter[k] += rows * site.repeat
    return total + sum(max(c.values()) for c in branches.values())


def exact_statistics(marks, marked: list, pull: Callable, total: dict) -> dict:
    """Adds the statistics of each column of the output Hessian's square root."""
    for number, (name, z) in enumerate(zip(marks, marked, strict=True)):
        columns, column = square_root_column(name, z)

        def add(total, j, number=number, column=column):
            zeros = [jnp.zeros_like(other) for other in marked]
            zeros[number] = column(j)
            _, statistics = pull(zeros)
            return jax.tree.map(jnp.add, total, statistics), None

        total, _ = lax.scan(add, total, jnp.arange(columns))
    return total


def pack_statistics(found: Trace, flat_grads: list, raw: dict) -> dict[str, Statistics]:
    """The cotangents of the probes as named statistics; diagonals from the gradient."""
    statistics: dict[str, Statistics] = {}
    for layer in found.layers:
        if layer.kind == "diagonal":
            gradient = flat_grads[layer.views[0].leaf]
            zeros = zero_statistics(layer, gradient.dtype)
            n = jnp.full((), found.num_examples, jnp.float32)
            gradient = gradient.astype(zeros.gradient.dtype)  # type: ignore[union-attr]
            statistics[layer.name] = DiagonalStatistics(gradient, n)
        elif not raw[layer.name]:
            continue
        elif layer.kind == "scale_shift":
            statistics[layer.name] = ScaleShiftStatistics(*raw[layer.name])
        else:
            statistics[layer.name] = KroneckerStatistics(*raw[layer.name])
    return statistics
