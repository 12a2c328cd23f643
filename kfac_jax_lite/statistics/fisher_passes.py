"""Backward passes for the curvature: sampled labels, or every column of the Hessian.

The plain backward pass gives the loss's gradient, the input factors and, for the
empirical Fisher, everything. The MC and exact Fisher pull further cotangents of the
marked outputs back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from kfac_jax_lite.core.likelihoods import (
    BESIDE,
    Output,
    sampled_cotangent,
    square_root_column,
    weighted_rows,
)
from kfac_jax_lite.core.mesh import automatic, explicit_mesh, specs_of, zeros_like
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array, Jaxpr, Var
from kfac_jax_lite.statistics.estimators import (
    COUNTS,
    INPUT_SIDE,
    Recipe,
    Share,
    blended,
    finish,
)
from kfac_jax_lite.tagging.interpreter import Slot, bind
from kfac_jax_lite.tagging.sites import CALLS, CHECKPOINTS, inside

ALL_FIELDS = frozenset({"a", "g", "a_out", "g_out", "s", "blocks", "squares"})


@dataclasses.dataclass(frozen=True)
class Finisher:
    """Gives what the taps returned its last touch, inside the gates of the layers.

    Attributes:
        recipes: Recipe of every slot.
        slots: The slots, by name.
        outputs: The marked outputs, with their weights.
        sampled: Whether cotangents are sampled (or columns of the Hessian's root).
    """

    recipes: dict[str, Recipe]
    slots: dict[str, Slot]
    outputs: list[Output]
    sampled: bool

    def __call__(
        self, raw: dict[str, Any], wanted: frozenset[str] = ALL_FIELDS
    ) -> dict[str, Any]:
        """Statistics by layer and field, of what the taps of every slot returned."""
        by_layer: dict[str, dict[str, Any]] = {}
        for slot, values in raw.items():
            if values:
                own = by_layer.setdefault(self.recipes[slot].layer.name, {})
                own[slot] = values
        return {k: self._finish(raw, wanted) for k, raw in by_layer.items()}

    def _terms(self, recipe: Recipe) -> Any:
        """How many terms of the loss count where outputs are masked; None: all."""
        if not recipe.masked:
            return None
        numbers = sorted(recipe.marks or range(len(self.outputs)))
        masked = [k for k in numbers if self.outputs[k].mask is not None]
        return self.outputs[masked[0]].terms

    def _share(self, recipe: Recipe, raw: dict[str, Any]) -> Share:
        """What a slot adds to its layer's statistics."""
        terms = self._terms(recipe)
        n = recipe.num_examples if terms is None else terms
        own = [self.outputs[k] for k in self._numbers(recipe)]
        given = [1 if o.given is None else jnp.mean(o.given) for o in own]
        weight = sum(given) / len(own) if own else 1
        scale: Any = 1
        if self.sampled:
            scale = self.outputs[0].terms / n if own else 1
        elif len(own) == 1:
            scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)

        def rows(name: str, static: int):
            live = raw.get(name, raw.get("count"))
            if live is None:
                return static / n
            return (live.sum(-1) if name not in raw else live) / n

        found = rows("rows", recipe.num_rows), rows("rows_out", recipe.rows_out)
        return Share(weight, scale, *found)

    def _finish(self, raw: dict[str, Any], wanted: frozenset[str]) -> dict[str, Any]:
        """The statistics of one layer, from its slots."""
        recipes = {name: self.recipes[name] for name in raw}
        slot = self.slots[next(iter(raw))]
        whole = len(raw) == 1 and not self._weighs(*recipes.values())

        def touch(raw: dict[str, Any]):
            parts = []
            for name, values in raw.items():
                recipe, terms = recipes[name], self._terms(recipes[name])
                fields = finish(recipe, values, slot.basis, terms, wanted)
                if whole:
                    return fields
                parts.append((fields, self._share(recipe, values)))
            return blended(parts)

        touched = [r.counted or r.by_example for r in recipes.values()]
        if slot.due is None or (whole and not any(touched)):
            return touch(raw)
        shapes, axes = jax.eval_shape(touch, raw), varying_axes(raw)

        def skip(raw: dict[str, Any]):
            del raw
            return vary(zeros_of(shapes), axes)

        return lax.cond(slot.due, lambda raw: vary(touch(raw), axes), skip, raw)

    def _weighs(self, recipe: Recipe) -> bool:
        """Whether one slot alone has a weight, or other terms than the first output."""
        numbers = self._numbers(recipe)
        first = numbers == [0] and self.outputs[0].given is None
        return bool(numbers) and not first

    def _numbers(self, recipe: Recipe) -> list[int]:
        """Which outputs depend on a slot."""
        only = [0] if len(self.outputs) == 1 else []
        return sorted(recipe.marks) or only


def zeros_of(shapes: Any) -> Any:
    """Zeros in the shapes of a tree."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def sampled_pull(
    names: Sequence[str],
    marked: Sequence[jax.Array],
    pullback: Callable[..., Any],
    plain: dict[str, Any],
    n: Any,
    finisher: Finisher,
    leaves: Sequence[int],
    cotangents: list[jax.Array],
) -> tuple[dict[int, jax.Array], dict[str, Any]]:
    """Pulls cotangents of the outputs back: gradients and statistics but ``A``.

    Gradients that nobody reads must not leave the conditional around this: XLA would
    compute them.
    """
    waiting = iter(cotangents)
    marks = [
        zeros_like(mark) if name in BESIDE else (next(waiting) / n).astype(mark.dtype)
        for name, mark in zip(names, marked, strict=True)
    ]
    grads, raw = pullback(marks)
    for name, values in raw.items():
        counts = {k: plain[name][k] for k in values if k in COUNTS and name in plain}
        raw[name] = values | counts
    return {i: grads[i] for i in leaves}, finisher(raw, ALL_FIELDS - INPUT_SIDE)


def resampled(
    fisher: str,
    outputs: list[Output],
    pull: Callable[..., Any],
    plain: dict[str, Any],
    key: Any,
    grads: dict[int, jax.Array],
    finisher: Any,
    gated: bool,
) -> tuple[dict[int, jax.Array], dict[str, Any]]:
    """The MC or exact Fisher's statistics, computed when any layer is due.

    Input factors come from the plain backward pass: XLA drops the other statistics of
    that pass.
    """
    pull = canonical(functools.partial(pull, list(grads)))
    dues = [s.due for s in finisher.slots.values() if s.due is not None]
    shapes = jax.eval_shape(pull, [o.value for o in outputs])[1]
    axes = varying_axes([o.value for o in outputs])

    def nothing():
        return grads, vary(zeros_of(shapes), axes)

    def resample():
        if fisher == "exact":
            return grads, exact_statistics(outputs, pull, nothing()[1])
        keys = jax.random.split(key, len(outputs))
        pairs = zip(outputs, keys, strict=True)
        draws = [(o, typed_like(o, sampled_cotangent, k)) for o, k in pairs]
        return pull([weighted_rows(output, draw, 0.5) for output, draw in draws])

    if len(dues) < len(finisher.slots) or not dues or not gated:
        grads, found = resample()
    else:
        grads, found = lax.cond(jnp.any(jnp.stack(dues)), resample, nothing)
    sides = finisher(plain, INPUT_SIDE)
    return grads, {k: found[k] | sides[k] for k in found}


def typed_like(
    output: Output, function: Callable[..., jax.Array], argument: Any
) -> jax.Array:
    """``function(likelihood, value, argument)``, typed like a marked output's value."""
    run = functools.partial(function, output.likelihood)
    if explicit_mesh(output.value) is None:
        return run(output.value, argument)
    specs = specs_of(output.value)
    return automatic(run, output.value, argument, out_specs=specs)


def hessian_column(likelihood: str, value: jax.Array, j: jax.Array) -> jax.Array:
    """Column ``j`` of the square root of the output's Hessian."""
    return square_root_column(likelihood, value)[1](j)


def exact_statistics(
    outputs: list[Output], pull: Callable[..., Any], total: dict[str, Any]
) -> dict[str, Any]:
    """Adds the statistics of each column of the output Hessian's square root."""
    for number, output in enumerate(outputs):
        columns, _ = square_root_column(output.likelihood, output.value)

        def add(total: Any, j: Array, number: int = number, output: Output = output):
            zeros = [zeros_like(other.value) for other in outputs]
            root = typed_like(output, hessian_column, j)
            zeros[number] = weighted_rows(output, root, 0.5)
            _, statistics = pull(zeros)
            return jax.tree.map(jnp.add, total, statistics), None

        total, _ = lax.scan(add, total, jnp.arange(columns))
    return total


def canonical(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function, its convolutions ``[batch, *space, feature]`` throughout.

    Those inside ``jit`` and ``jax.checkpoint`` are found too; those in the body of a
    loop, slow in the user's program already, stay as they are.
    """

    def run(argument: Any) -> Any:
        closed, shapes = jax.make_jaxpr(lambda: function(argument), return_shape=True)()
        found = evaluate(closed.jaxpr, closed.consts, ())
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return run


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, convolutions in canonical order."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def value(atom: Var | Literal):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        given = [value(a) for a in eqn.invars]
        name = eqn.primitive.name
        if name == "conv_general_dilated" and not eqn.params.get("out_sharding"):
            results = [convolve(eqn.params, *given)]
        elif name in CALLS:
            results = evaluate(*inside(eqn), given)
        elif name in CHECKPOINTS:
            results = jax.checkpoint(
                functools.partial(evaluate, *inside(eqn)),
                prevent_cse=eqn.params["prevent_cse"],
                policy=eqn.params["policy"],
            )(given)
        else:
            results = bind(jaxpr, eqn, given)
        env.update(zip(eqn.outvars, results, strict=True))
    return [value(a) for a in jaxpr.outvars]


def convolve(params: dict[str, Any], x: Array, kernel: Array) -> Array:
    """One ``conv_general_dilated``: operands and result are transposed around it."""
    params = dict(params)
    numbers = params.pop("dimension_numbers")
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    space = tuple(range(2, x.ndim))
    last = (0, *space, 1)
    x = lax.transpose(x, [lhs[i] for i in last])
    kernel = lax.transpose(kernel, [rhs[i] for i in (*space, 1, 0)])
    order = (0, x.ndim - 1, *range(1, x.ndim - 1))
    spec = lax.ConvDimensionNumbers(
        order, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)), order
    )
    y = lax.conv_general_dilated(x, kernel, dimension_numbers=spec, **params)
    return lax.transpose(y, tuple(np.argsort([out[i] for i in last])))
