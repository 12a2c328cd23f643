"""What fails in the leading peer on today's JAX, each a test that passes here.

Each case was seen with kfac-jax (head of its repository) on JAX 0.10.2: a layer that
falls back to a diagonal without a word, a factor that is wrong, or an exception.
"""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import close, kfac_state
from tests.models import BY_NAME

FOUND = {
    "transposed": "x @ w.T + b",
    "jitted": "a dense layer inside an inner jit",
    "remat": "a dense layer inside remat",
    "twice": "a layer used twice",
    "conv1d": "one-dimensional convolution",
    "conv3d": "three-dimensional convolution",
    "depthwise": "depthwise convolution",
    "rhs_dilation": "dilated convolution: wrong by 40-60 % there",
    "lhs_dilation": "transposed convolution: wrong by 180 % there",
}


@pytest.mark.parametrize("name", FOUND)
def test_layers_are_found_and_their_factors_right(name):
    """Coverage here; the factors of these models are checked in test_statistics."""
    model = BY_NAME[name]
    layers = model.tag(4).layers
    assert {t.name: t.kind for t in layers} == {
        name: spec.kind for name, spec in model.layers.items()
    }


def regression(apply, params, *args):
    """A loss of a network's output and its tagged form."""

    def loss(params, *args):
        z = kfac.normal(apply(params, *args).reshape(len(args[0]), -1))
        return 0.5 * (z**2).sum(-1).mean()

    return loss, kfac.tag(loss, params, *args)


def covered(tagged):
    """Whether no parameter fell back."""
    return all(t.kind != "diagonal" for t in tagged.layers)


def test_bfloat16():
    module = nn.Sequential([nn.Dense(4, dtype=jnp.bfloat16), nn.tanh, nn.Dense(2)])
    x = jnp.ones((5, 3), jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    for p in (params, half):
        _, tagged = regression(module.apply, p, x)
        assert covered(tagged)
        statistics = tagged.value_and_grad(p, x)[-1]
        assert {v.dtype for v in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}


def test_scaled_weight(rng):
    """``x @ (w * 0.1) + b``: the factor of ``w`` sees ``0.1 x``."""
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.zeros(2)}
    x = jnp.asarray(rng.normal(size=(4, 3)))
    _, tagged = regression(lambda p, x: x @ (p["w"] * 0.1) + p["b"], params, x)
    (layer,) = tagged.layers
    seen = tagged.value_and_grad(params, x)[-1][layer.name]
    rows = np.concatenate([0.1 * x, np.ones((4, 1))], 1)
    close(seen.a, rows.T @ rows / 4)


def test_embedding(rng):
    """Counts on the diagonal, never a square of the vocabulary."""
    params = {"table": jnp.asarray(rng.normal(size=(9, 2)))}
    ids = jnp.asarray([[1, 1, 3], [0, 3, 8]])
    apply = lambda p, ids: p["table"][ids].sum(1)  # noqa: E731
    _, tagged = regression(apply, params, ids)
    (layer,) = tagged.layers
    assert (layer.kind, layer.a_shape, layer.g_shape) == ("embedding", (9,), (2, 2))
    seen = tagged.value_and_grad(params, ids)[-1][layer.name].a
    close(seen, np.bincount(ids.ravel(), minlength=9) / 2)


def modules():
    """Modules that raise there."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = nn.scan(
                lambda module, x, _: (jnp.tanh(module(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return step(nn.Dense(4, name="layers"), x, None)[0]

    return {
        "attention": nn.MultiHeadDotProductAttention(2),
        "lstm": nn.RNN(nn.LSTMCell(3)),
        "scan": Deep(),
    }


@pytest.mark.parametrize("name", ["attention", "lstm", "scan"])
def test_modules(name, rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    module = modules()[name]
    params = module.init(jax.random.key(0), x)
    loss, tagged = regression(module.apply, params, x)
    assert covered(tagged)
    value, grads, _ = jax.jit(tagged.value_and_grad)(params, x)
    wanted = jax.value_and_grad(loss)(params, x)
    flat = [jax.flatten_util.ravel_pytree(v)[0] for v in ((value, grads), wanted)]
    close(*flat, 1e-6)


def training(axis_name=None, interval=1, examples=8, **options):
    """A step as users write it, parameters, state and a batch."""
    model = BY_NAME["mlp"]
    params, batch = model.params(), model.batch(8)
    tagged = model.tag(examples)
    if interval > 1:
        options["interval"] = kfac.intervals.every(interval)
    tx = kfac.kfac(tagged.layers, 0.05, axis_name=axis_name, **options)

    def step(params, state, *batch, devices=1):
        value, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state
        )
        grads = jax.tree.map(lambda g: g / devices, grads)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    return step, params, tx.init(params), batch


@pytest.mark.parametrize("interval", [1, 3])
def test_inside_the_users_jit_at_any_period(interval):
    step, params, state, batch = training(interval=interval)
    traces = []

    @jax.jit
    def run(*args):
        traces.append(args)
        return step(*args)

    for _ in range(4):
        params, state, value = run(params, state, *batch)
    assert len(traces) == 1
    assert np.isfinite(value)
    assert kfac_state(state).clock.refreshes.tolist() == [4 if interval == 1 else 2] * 2


def test_shard_map_with_checks():
    """Autodiff has summed the gradient of replicated parameters there."""
    devices = 4
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    step, params, state, batch = training("batch", 2, examples=8 // devices)
    split, same = PartitionSpec("batch"), PartitionSpec()

    def local(params, state, *batch):
        params, state, value = step(params, state, *batch, devices=devices)
        return params, state, jax.lax.pmean(value, "batch")

    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(same, same, split, split), out_specs=same,
            check_vma=True,
        )
    )  # fmt: skip
    single, wanted, wanted_state, _ = training(None, 2)
    for _ in range(3):
        params, state, value = run(params, state, *batch)
        wanted, wanted_state, loss = jax.jit(single)(wanted, wanted_state, *batch)
        close((params, value), (wanted, loss), 1e-9)
    factors = (kfac_state(s).factors for s in (state, wanted_state))
    close(*factors, 1e-9)


def test_state_is_optax_state_and_serialises():
    step, params, state, batch = training(interval=2)
    params, state, _ = jax.jit(step)(params, state, *batch)
    data = flax.serialization.to_bytes(state)
    again = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), data)
    following = functools.partial(jax.jit(step), params)
    close(following(state, *batch), following(again, *batch), 1e-15)
