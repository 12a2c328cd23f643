"""Layers that no rule can see: named by the user, in terms of what rules can see.

A *reference* is a plain JAX function that computes the same layer, such as
``lambda x, w: x @ w``. It is traced, never executed: its one layer says what the tap
behind the real thing has to estimate.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, JaxprEqn, Primitive
from kfac_jax_lite.tagging.analysis import RULES, Fact, Scope, shape_of
from kfac_jax_lite.tagging.rules_control import enterable, stand_in
from kfac_jax_lite.tagging.sites import BY_HAND

BUILT_IN = frozenset(RULES)


def tag_as(output: Array, reference: Callable[..., Array], *operands: Any) -> Array:
    """Says that ``output`` is the layer ``reference(*operands)``; the identity.

    Use it inside the loss function, where a kernel hides its parameters (``custom_vjp``
    around a Pallas call). Gradients are those of ``output`` alone.

    Args:
        output: The layer's output, bias included if the reference adds one.
        reference: Computes the same from the operands with one matrix product,
            convolution or lookup of a parameter. Traced, not executed under ``jit``.
        *operands: Inputs and parameters.

    Returns:
        ``output``, unchanged.

    Raises:
        ValueError: The reference's result has another shape.
    """
    shape = jax.eval_shape(reference, *operands).shape
    if shape != jnp.shape(output):
        raise ValueError(
            f"kfac.tag_as: the output has shape {jnp.shape(output)} and the reference "
            f"gives {shape}."
        )

    def layer(output: Array, *operands: Any):
        return output, reference(*operands)

    layer.__name__ = BY_HAND
    return jax.jit(layer)(output, *operands)[0]


def tag_dense(output: Array, x: Array, w: Array, b: Array | None = None) -> Array:
    """Says that ``output`` is ``x @ w + b``; the identity.

    Args:
        output: ``[..., out]``.
        x: ``[..., in]``.
        w: ``[in, out]``.
        b: ``[out]``, or None.

    Returns:
        ``output``, unchanged.

    Raises:
        ValueError: The shapes do not fit.
    """
    if b is None:
        return tag_as(output, lambda x, w: x @ w, x, w)
    return tag_as(output, lambda x, w, b: x @ w + b, x, w, b)


def tag_conv(
    output: Array, x: Array, w: Array, b: Array | None = None, **options: Any
) -> Array:
    """Says that ``output`` is ``lax.conv_general_dilated(x, w, **options) + b``.

    Args:
        output: The layer's output.
        x: Input.
        w: Kernel.
        b: Bias over the output's feature axis, or None.
        **options: ``window_strides``, ``padding`` and so on; ``dimension_numbers``
            default to ``("NHWC", "HWIO", "NHWC")`` in two dimensions.

    Returns:
        ``output``, unchanged.

    Raises:
        ValueError: The shapes do not fit.
    """
    space = "DHW"[-(jnp.ndim(x) - 2) :]
    last = (f"N{space}C", f"{space}IO", f"N{space}C")
    options = {"dimension_numbers": last} | options
    numbers = lax.conv_dimension_numbers(
        jnp.shape(x), jnp.shape(w), options["dimension_numbers"]
    )
    feature = numbers.out_spec[1]

    def reference(x: Array, w: Array, *bias: Array):
        z = lax.conv_general_dilated(x, w, **options)
        for each in bias:
            z = z + lax.broadcast_in_dim(each, z.shape, (feature,))
        return z

    return tag_as(output, reference, x, w, *(() if b is None else (b,)))


def abstract(atom: Any) -> tuple[Shape, Any]:
    """Shape and dtype of a jaxpr variable or literal."""
    return shape_of(atom), atom.aval.dtype


def register_rule(
    primitive: Primitive | str, reference: Callable[..., Array]
) -> Callable[..., Array]:
    """Teaches the tagger a primitive: what layer it computes.

    The rule holds for every ``kfac.tag`` after it. The primitive's first result is the
    layer's output.

    Args:
        primitive: The primitive or its name.
        reference: ``reference(*operands, **params)`` computes the first result with
            one matrix product, convolution or lookup; ``params`` are the equation's.

    Returns:
        ``reference``.

    Raises:
        ValueError: The library has a rule of its own for that primitive.
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    if name in BUILT_IN:
        raise ValueError(f"the primitive {name} has a rule in the library already.")

    def handler(scope: Scope, index: int, eqn: JaxprEqn, facts: list[Fact]):
        shapes = [jax.ShapeDtypeStruct(*abstract(a)) for a in eqn.invars]
        closed = jax.make_jaxpr(lambda *xs: reference(*xs, **eqn.params))(*shapes)
        if shape_of(closed.jaxpr.outvars[0]) != shape_of(eqn.outvars[0]):
            raise ValueError(
                f"kfac.register_rule({name!r}): the reference gives the shape "
                f"{shape_of(closed.jaxpr.outvars[0])}, the primitive "
                f"{shape_of(eqn.outvars[0])}."
            )
        facts = enterable(scope, eqn.invars, facts)
        output = stand_in(scope, index, list(eqn.invars), facts, closed.jaxpr)
        if output is None:
            return None
        return [output] + [None] * (len(eqn.outvars) - 1)

    RULES[name] = handler
    return reference
