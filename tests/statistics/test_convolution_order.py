"""Convolutions of the second backward pass, in the order of the CPU's routine."""

import re

import jax
import jax.numpy as jnp
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.statistics.fisher_passes import canonical
from tests.helpers import close
from tests.optimizer.test_hlo import computations

ORDERS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HWCN", "IHWO", "CWNH")]
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def convolved(x, kernel, order):
    """A grouped convolution with unequal strides, pads and dilations."""
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 1), ((1, 2), (0, 1)), (1, 2), (2, 1), order, 2
    )


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: f])
def test_derivatives_are_the_same(order, wrap, rng):
    x = jnp.asarray(rng.normal(size=[dict(N=2, H=7, W=6, C=4)[c] for c in order[0]]))
    sizes = dict(H=3, W=2, I=2, O=6)
    kernel = jnp.asarray(rng.normal(size=[sizes[c] for c in order[1]]))

    def gradients(arguments):
        run = wrap(lambda x, k: jnp.sin(convolved(x, k, order)).sum())
        return jax.grad(run, (0, 1))(*arguments)

    close(jax.jit(canonical(gradients))((x, kernel)), gradients((x, kernel)), 1e-12)


def convnet(params, x, y):
    """Mean loss of two convolutions."""
    for kernel in params:
        x = jnp.tanh(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=ORDERS[0]
            )
        )
    logits = kfac.categorical(x.mean((1, 2)))
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_gated_convolutions_are_canonical_and_of_inputs_only(fisher, rng):
    params = [jnp.asarray(rng.normal(size=s)) for s in ((3, 3, 2, 4), (3, 3, 4, 4))]
    args = (params, jnp.ones((8, 6, 6, 2)), jnp.zeros(8, int))
    tagged = kfac.tag(convnet, *args, fisher=fisher)
    state = kfac.scale_by_kfac(tagged.layers).init(params)

    def run(state, key, *args):
        return tagged.value_and_grad(*args, opt_state=state, key=key)

    program = jax.jit(run).lower(state, jax.random.key(0), *args).compile()
    found, entry = computations(program.as_text())
    own = " ".join(found.pop(entry))
    # Fused computations of the entry count as the entry.
    gated = [
        LABELS.search(line)
        for name, lines in found.items()
        for line in lines
        if " convolution(" in line and f"calls=%{name}" not in own
    ]
    assert [m.groups() for m in gated if m] == [("b01f", "01io", "b01f")]
