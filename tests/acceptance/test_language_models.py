"""Language models: dense on an Explicit mesh, and a mixture of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.acceptance.clients import (
    check_factors,
    coverage,
    linear,
    make_linear,
    notes,
    train,
    unseen,
)

P = PartitionSpec
RNG = np.random.default_rng(0)
VOCAB, WIDTH, TIME = 7, 4, 5


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def tokens(batch):
    return jnp.asarray(RNG.integers(0, VOCAB, (batch, TIME)))


def mean_loss(z, ids):
    z = jax.nn.log_softmax(z[:, :-1])
    return -jnp.take_along_axis(z, ids[:, 1:, None], -1).mean()


def rms(x, scale):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * scale


# ------------------------------------------------------------------------------ dense

DENSE = {
    "tokens": normal(VOCAB, WIDTH),
    "positions": normal(TIME, WIDTH) / 2,
    "norm": 1 + normal(WIDTH) / 4,
    "qkv": make_linear(0, WIDTH, 3 * WIDTH),
    "mix": make_linear(1, WIDTH, WIDTH),
    "up": make_linear(2, WIDTH, 6),
    "down": make_linear(3, 6, WIDTH),
    "logits": make_linear(4, WIDTH, VOCAB),
}


def dense_model(p, ids, see=unseen, spec=None):
    """One block of a decoder; tables may be read under an output sharding."""
    h = p["tokens"].at[ids].get(out_sharding=spec) + p["positions"]
    q, k, v = jnp.split(linear(p, "qkv", rms(h, p["norm"]), see), 3, -1)
    scores = jnp.einsum("...ti,...si->...ts", q, k) / WIDTH**0.5
    scores = jnp.where(jnp.tril(jnp.ones((TIME, TIME), bool)), scores, -1e9)
    h = h + linear(p, "mix", jax.nn.softmax(scores) @ v, see)
    h = h + linear(p, "down", jax.nn.gelu(linear(p, "up", h, see)), see)
    return linear(p, "logits", h, see)


def explicit_loss(p, ids):
    z = kfac.categorical(dense_model(p, ids, spec=P("data"))[:, :-1])
    z = jax.nn.log_softmax(z)
    wanted = jax.nn.one_hot(ids[:, 1:], VOCAB)
    return -(z * wanted).sum(-1).mean()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.usefixtures("compiled_anew")
def test_dense_on_an_explicit_mesh():
    ids = tokens(4)
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2]
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(DENSE, NamedSharding(mesh, P()))
        args = (jax.device_put(ids, NamedSharding(mesh, P("data"))),)
        tagged = kfac.tag(explicit_loss, params, *args, fisher="exact")
        assert coverage(tagged) == 1, tagged
        assert notes(tagged) == {}
        tx = kfac.kfac(tagged.layers, 0.1, damping=kfac.damping.adaptive())
        statistics, losses = train(explicit_loss, params, args, tagged, tx)
        statistics = jax.tree.map(np.asarray, statistics)
    assert losses[-1] < losses[0]

    # An example has TIME - 1 terms; rows of the last position count at its layers, too.
    forward = lambda ids, see: dense_model(DENSE, ids, see)[:-1]  # noqa: E731
    part = 1 / (4 * (TIME - 1)), forward, ids, "categorical"
    for name in ("qkv", "mix", "up", "down", "logits"):
        check_factors(statistics, name, [part])


# -------------------------------------------------------------------------- experts

EXPERTS, TOP = 3, 2
MIXTURE = {
    "tokens": normal(VOCAB, WIDTH),
    "router": normal(WIDTH, EXPERTS),
    "up": normal(EXPERTS, WIDTH, 5) / 2,
    "down": normal(EXPERTS, 5, WIDTH) / 2,
    "logits": make_linear(4, WIDTH, VOCAB),
}


def route(p, h):
    """Gates and experts of every row, ``[R, TOP]``."""
    scores, chosen = jax.lax.top_k(h @ p["router"], TOP)
    return jax.nn.softmax(scores), chosen


def ragged_experts(p, h):
    """Rows go to the experts that the router names, sorted by expert."""
    gates, chosen = route(p, h)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS).astype(jnp.int32)
    rows = jnp.repeat(h, TOP, 0)[order]
    rows = jax.nn.gelu(jax.lax.ragged_dot(rows, p["up"], sizes))
    rows = jax.lax.ragged_dot(rows, p["down"], sizes)
    back = rows[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return (back * gates[..., None]).sum(1)


def dense_experts(p, h, see):
    """The same, expert by expert; where rows go is known in advance."""
    gates = jax.nn.softmax(
        jnp.take_along_axis(see("router", h, h @ p["router"]), CHOSEN, 1)
    )
    total = jnp.zeros_like(h)
    for e in range(EXPERTS):
        rows, place = np.nonzero(CHOSEN == e)
        z = see(f"up{e}", h[rows], h[rows] @ p["up"][e])
        z = jax.nn.gelu(z)
        z = see(f"down{e}", z, z @ p["down"][e])
        total = total.at[rows].add(z * gates[rows, place][:, None])
    return total


IDS = tokens(4)
CHOSEN = np.asarray(route(MIXTURE, MIXTURE["tokens"][IDS].reshape(-1, WIDTH))[1])


def test_mixture_of_experts():
    def model(p, ids, experts):
        h = p["tokens"][ids]
        flat = h.reshape(-1, WIDTH)
        return flat + experts(p, flat)

    def loss(p, ids):
        h = model(p, ids, ragged_experts).reshape(*ids.shape, WIDTH)
        z = kfac.categorical(linear(p, "logits", h)[:, :-1])
        wanted = jax.nn.one_hot(ids[:, 1:], VOCAB)
        return -(jax.nn.log_softmax(z) * wanted).sum(-1).mean()

    tagged = kfac.tag(loss, MIXTURE, IDS, fisher="exact")
    assert coverage(tagged) == 1, tagged
    assert notes(tagged) == {}
    statistics, losses = train(loss, MIXTURE, (IDS,), tagged)
    assert losses[-1] < losses[0]

    def forward(ids, see):
        h = model(MIXTURE, ids, lambda p, h: dense_experts(p, h, see))
        z = linear(MIXTURE, "logits", h.reshape(*ids.shape, WIDTH), see)
        return z[:, :-1].reshape(-1, VOCAB)

    part = 1 / (4 * (TIME - 1)), forward, IDS[None], "categorical"
    for name in ("router", "logits"):
        check_factors(statistics, name, [part])
    for name in ("up", "down"):
        for e in range(EXPERTS):
            own = jax.tree.map(lambda v, e=e: v[e], statistics[name])
            check_factors({name: own}, f"{name}{e}", [part], name)
