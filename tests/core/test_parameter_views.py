"""Parameters that reach their layer cut, turned, repeated, stacked or computed.

Gradients are those of the loss. What is claimed as a layer has the statistics of the
same network with the finished weight as its parameter; the rest falls back and says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import close

B, IN, OUT = 5, 4, 3


def shapes(**sizes):
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=s)) for name, s in sizes.items()}


WEIGHT = shapes(w=(IN, OUT))
LARGE = shapes(w=(IN + 2, OUT + 1))
# Parameters, the weight made of them, and what they are reported as.
VIEWS = {
    "dynamic_slice": (LARGE, lambda p: lax.dynamic_slice(p["w"], (1, 0), (IN, OUT)), 1),
    "dynamic_slice_clipped": (
        LARGE,
        lambda p: lax.dynamic_slice(p["w"], (9, 9), (IN, OUT)),
        1,
    ),
    "slice_of_transpose": (
        shapes(w=(OUT + 1, IN + 2)),
        lambda p: p["w"].T[1:-1, :OUT],
        1,
    ),
    "reversed": (WEIGHT, lambda p: jnp.flip(p["w"], 0), 1),
    "reversed_slice": (LARGE, lambda p: jnp.flip(p["w"][:IN, :OUT], (0, 1)), 1),
    "reshaped": (shapes(w=(2, 2, OUT)), lambda p: p["w"].reshape(IN, OUT), 1),
    "reshaped_slice": (
        shapes(w=(3, 2, OUT)),
        lambda p: p["w"][1:].reshape(IN, OUT),
        1,
    ),
    "flat": (shapes(w=(IN * OUT,)), lambda p: p["w"].reshape(IN, OUT), 1),
    "flat_part": (
        shapes(w=(IN * OUT + 2,)),
        lambda p: p["w"][2:].reshape(IN, OUT),
        1,
    ),
    "reversed_and_reshaped": (
        shapes(w=(2, 2, OUT)),
        lambda p: jnp.flip(p["w"], 1).reshape(IN, OUT),
        1,
    ),
    "reversed_and_transposed": (
        shapes(w=(OUT, IN)),
        lambda p: jnp.flip(p["w"], 1).T,
        1,
    ),
    "strided": (shapes(w=(2 * IN, OUT)), lambda p: p["w"][::2], 1),
    "transposed_twice": (WEIGHT, lambda p: p["w"].T.T, 1),
    "squeezed": (shapes(w=(1, IN, 1, OUT)), lambda p: p["w"][0, :, 0], 1),
    "tiled_once": (shapes(w=(1, IN, OUT)), lambda p: jnp.tile(p["w"], (1, 1, 1))[0], 1),
    "tiled": (shapes(w=(2, OUT)), lambda p: jnp.tile(p["w"], (2, 1)), 0),
    "repeated": (
        shapes(w=(1, OUT)),
        lambda p: jnp.broadcast_to(p["w"], (IN, OUT)),
        None,
    ),
    "difference": (shapes(w=(IN, OUT), v=(IN, OUT)), lambda p: p["w"] - p["v"], 0),
    "product": (shapes(w=(IN, OUT), v=(IN, OUT)), lambda p: p["w"] * p["v"], None),
    "cumulated": (WEIGHT, lambda p: jnp.cumsum(p["w"], 0), 0),
    "stopped": (WEIGHT, lambda p: lax.stop_gradient(p["w"]), None),
    "padded": (
        shapes(w=(IN - 1, OUT)),
        lambda p: jnp.pad(p["w"], ((1, 0), (0, 0))),
        None,
    ),
    "joined": (
        shapes(v=(1, OUT), w=(IN - 1, OUT)),
        lambda p: jnp.concatenate([p["v"], p["w"]]),
        None,
    ),
}


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, IN)), rng.normal(size=(B, OUT))


def network(weight):
    def loss(p, x, y):
        return jnp.mean(jnp.sum((jnp.tanh(x @ weight(p)) - y) ** 2, -1))

    return loss


@pytest.mark.parametrize("name", VIEWS)
def test_weights(name):
    params, weight, claimed = VIEWS[name]
    loss = network(weight)
    tagged = kfac.tag(loss, params, *batch())
    value, grads, statistics = jax.jit(tagged.value_and_grad)(params, *batch())
    close((value, grads), jax.value_and_grad(loss)(params, *batch()), 1e-12)
    owned = [path for layer in tagged.layers for path in layer.params]
    assert {path.split("'")[1] for path in owned} == set(params)
    layers = [layer for layer in tagged.layers if layer.kronecker]
    if claimed is not None:
        assert len(layers) == claimed
    plain = kfac.tag(network(lambda p: p["w"]), {"w": weight(params)}, *batch())
    wanted = plain.value_and_grad({"w": weight(params)}, *batch())[-1]["w"]
    for layer in layers:
        if layer.sizes == (IN, OUT):
            found = statistics[layer.name]
            for actual, expected in zip(found[:2], wanted[:2], strict=True):
                # Entries may be in the parameter's order: the spectrum is the same.
                close(np.linalg.eigvalsh(actual), np.linalg.eigvalsh(expected), 1e-9)


# ---------------------------------------------------------------- loops


def turn(h, w):
    return jnp.tanh(h @ w), None


def carried(p, x):
    def step(carry, _):
        return (jnp.tanh(carry[0] @ carry[1]), carry[1]), None

    return lax.scan(step, (x, p["w"]), None, 3)[0][0]


def carried_and_changed(p, x):
    def step(carry, _):
        return (jnp.tanh(carry[0] @ carry[1]), 0.9 * carry[1]), None

    return lax.scan(step, (x, p["w"]), None, 3)[0][0]


SQUARE, STACK = shapes(w=(IN, IN)), shapes(w=(3, IN, IN))
LOOPS = {
    "stack": (STACK, lambda p, x: lax.scan(turn, x, p["w"])[0]),
    "scaled_stack": (
        STACK | shapes(s=(3,)),
        lambda p, x: lax.scan(turn, x, p["w"] * p["s"][:, None, None])[0],
    ),
    "halved_stack": (STACK, lambda p, x: lax.scan(turn, x, p["w"] * 0.5)[0]),
    "broadcast": (
        SQUARE,
        lambda p, x: lax.scan(turn, x, jnp.broadcast_to(p["w"], (3, IN, IN)))[0],
    ),
    "constant": (
        SQUARE,
        lambda p, x: lax.scan(lambda h, _: turn(h, p["w"]), x, None, 3)[0],
    ),
    "scaled_constant": (
        SQUARE | shapes(s=(IN,)),
        lambda p, x: (lambda w: lax.scan(lambda h, _: turn(h, w), x, None, 3)[0])(
            p["w"] * p["s"]
        ),
    ),
    "carried": (SQUARE, carried),
    "carried_and_changed": (SQUARE, carried_and_changed),
    "branches": (
        SQUARE,
        lambda p, x: lax.cond(x[0, 0] > 0, turn, lambda h, w: (h @ w, None), x, p["w"])[
            0
        ],
    ),
}


# ---------------------------------------------------------------- uses that are odd


def convolution(left, right, **options):
    return lax.conv_general_dilated(
        left, right, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), **options
    )


ODD = {
    "denominator": (WEIGHT, lambda p, x: 1 / (3 + jnp.tanh(x @ p["w"]))),
    "taken_from": (shapes(w=(IN, OUT), b=(OUT,)), lambda p, x: p["b"] - x @ p["w"]),
    "cast": (
        shapes(w=(IN, OUT), s=(OUT,)),
        lambda p, x: (x @ p["w"]).astype(jnp.float32).astype(jnp.float64) * p["s"],
    ),
    "image": (
        shapes(w=(1, IN, 2)),
        lambda p, x: convolution(p["w"], x.T[:, None, :1] * jnp.ones((1, 2, 1))) * x,
    ),
    "batch_groups": (
        shapes(w=(2, 1, 4)),
        lambda p, x: convolution(x[:4, :, None], p["w"], batch_group_count=2).sum() * x,
    ),
    "lookup_of_a_product": (
        shapes(e=(6, OUT), s=(OUT,)),
        lambda p, x: jnp.take(p["e"] * p["s"], jnp.arange(B) % 6, axis=0),
    ),
    "lookup_of_a_slice": (
        shapes(e=(9, OUT)),
        lambda p, x: jnp.take(p["e"][2:8], jnp.arange(B) % 6, axis=0),
    ),
    "lookup_of_a_data_table": (
        WEIGHT,
        lambda p, x: jnp.take(x @ p["w"], jnp.arange(B), 0),
    ),
    "parameter_times_parameter": (
        shapes(w=(IN, 2), v=(2, OUT)),
        lambda p, x: x @ (p["w"] @ p["v"]),
    ),
    "flipped_data": (WEIGHT, lambda p, x: jnp.flip(jnp.tile(x, (1, 1)), 1) @ p["w"]),
    "two_biases": (
        shapes(w=(IN, OUT), b=(OUT,), c=(OUT,)),
        lambda p, x: x @ p["w"] + p["b"] + p["c"],
    ),
    "bias_of_a_sum": (
        shapes(w=(IN, OUT), b=(OUT,), c=(OUT,)),
        lambda p, x: x @ p["w"] + (p["b"] + p["c"]),
    ),
    "row_as_bias": (shapes(w=(IN + 1, OUT)), lambda p, x: x @ p["w"][:-1] + p["w"][-1]),
    "scalar_bias": (shapes(w=(IN, OUT), b=()), lambda p, x: x @ p["w"] + p["b"]),
}


@pytest.mark.parametrize("name", [*LOOPS, *ODD])
def test_networks(name):
    """Gradients, a home for every parameter, and a finite step."""
    params, forward = (LOOPS | ODD)[name]

    def loss(p, x):
        return jnp.mean(jnp.sum(jnp.sin(forward(p, x)) ** 2, -1))

    x = batch()[0]
    tagged = kfac.tag(loss, params, x)
    value, grads, statistics = jax.jit(tagged.value_and_grad)(params, x)
    close((value, grads), jax.value_and_grad(loss)(params, x), 1e-10)
    owned = [path for layer in tagged.layers for path in layer.params]
    assert {path.split("'")[1] for path in owned} == set(params)
    tx = kfac.scale_by_kfac(tagged.layers)
    updates, _ = tx.update(grads, tx.init(params), params, statistics=statistics)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
