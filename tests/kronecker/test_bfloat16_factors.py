"""Factors of bfloat16 layers: products of bfloat16, sums in float32."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import kfac_jax_lite as kfac


def equations(jaxpr):
    """All equations of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: isinstance(v, Jaxpr)
        ):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                yield from equations(inner)


def dense(p, x):
    return x.reshape(len(x), -1) @ p


def conv(p, x):
    z = jax.lax.conv_general_dilated(
        x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return z.sum((1, 2))


@pytest.mark.parametrize(
    ("apply", "shape", "square"), [(dense, (128, 7), 128), (conv, (3, 3, 2, 7), 6)]
)
def test_operands_stay_bfloat16(apply, shape, square):
    """No operand as large as the rows is turned into float32 before a product."""
    p, x = jnp.ones(shape, jnp.bfloat16), jnp.ones((16, 8, 8, 2), jnp.bfloat16)

    def loss(p, x):
        return jnp.mean(kfac.categorical(apply(p, x)).astype(jnp.float32))

    tagged = kfac.tag(loss, p, x)
    found = jax.make_jaxpr(tagged.value_and_grad)(p, x)
    products = [
        eqn
        for eqn in equations(found.jaxpr)
        if eqn.primitive.name == "dot_general"
        and eqn.outvars[0].aval.dtype == jnp.float32
        and eqn.params["precision"] is None  # sums of products are of full precision
    ]
    assert {v.aval.dtype for eqn in products for v in eqn.invars} == {
        jnp.dtype(jnp.bfloat16)
    }
    sizes = {tuple(eqn.outvars[0].aval.shape) for eqn in products}
    assert {(square, square), (7, 7)} <= sizes
