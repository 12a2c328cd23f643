"""Convolutions in the one axis order that the CPU's fast routine takes.

XLA brings convolutions into this order on a CPU, but only those of a program's entry:
inside a conditional or a loop, others run as plain loops, more than ten times slower
(seen with jaxlib 0.10). The derivative of a convolution by its input, which the second
backward pass of a sampled Fisher consists of, has its kernel in another order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal

from kfac_jax_lite.core.types import Array, Jaxpr, Var
from kfac_jax_lite.tagging.interpreter import bind
from kfac_jax_lite.tagging.sites import CALLS, CHECKPOINTS, inside


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
