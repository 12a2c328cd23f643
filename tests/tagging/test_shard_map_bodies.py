"""Losses with ``jax.shard_map`` inside: the same statistics as without it.

What one device computes is part of a sum over all; ``N`` and ``R`` are those of the
whole batch. (The programs without ``shard_map`` have oracles of their own.)
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import close, train

N, T, D, H, C, V = 8, 3, 4, 5, 3, 6
P = PartitionSpec
AXES = {"x": 4, "y": 2}


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def mapped(body, p, *data, along=("x",), checked=True, out=None, **options):
    """``body`` on every device: parameters whole, data by its first axis."""
    spec = P(along)
    return jax.shard_map(
        body,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), *(spec for _ in data)),
        out_specs=spec if out is None else out,
        check_vma=checked,
        **options,
    )(p, *data)


def mlp(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return h @ p["v"]


def normalised(p, x):
    """A norm over positions and widths, of whole sequences."""
    h = x @ p["w"]
    h = h - h.mean(-1, keepdims=True)
    return jnp.tanh(h * p["s"] + p["b"]).sum(1) @ p["v"]


def stacked(p, x):
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["w"], p["u"])[0]
    return jnp.tanh(h + p["b"]) @ p["v"]


def convolved(p, x):
    dims = ("NHC", "HIO", "NHC")
    h = lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=dims)
    return jnp.tanh(h + p["b"]).mean(1) @ p["v"]


def looked_up(p, x):
    tokens = jnp.abs(10 * x[..., 0]).astype(int) % V
    return jnp.tanh(p["e"][tokens] + p["b"]).sum(1) @ p["v"]


def twice(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.tanh(jnp.sin(x) @ p["w"] + p["b"] + h) @ p["v"]


def in_calls(p, x):
    layer = jax.checkpoint(jax.jit(lambda w, b, x: jnp.tanh(x @ w + b)))
    return layer(p["w"], p["b"], x) @ p["v"]


SHAPES = {
    mlp: {"w": (D, H), "b": (H,), "v": (H, C)},
    normalised: {"w": (D, H), "s": (H,), "b": (H,), "v": (H, C)},
    stacked: {"w": (D, H), "u": (2, H, H), "b": (H,), "v": (H, C)},
    convolved: {"k": (2, D, H), "b": (H,), "v": (H, C)},
    looked_up: {"e": (V, H), "b": (H,), "v": (H, C)},
    twice: {"w": (D, H), "b": (H,), "v": (H, C)},
    in_calls: {"w": (D, H), "b": (H,), "v": (H, C)},
}
SEQUENCES = (normalised, convolved, looked_up)


def data(rng, network):
    p = {k: jnp.asarray(rng.normal(size=s)) for k, s in SHAPES[network].items()}
    x = rng.normal(size=(N, T, D) if network in SEQUENCES else (N, D))
    return p, jnp.asarray(x), jnp.asarray(rng.normal(size=(N, C)))


def loss_of(network):
    def loss(p, x, y):
        z = kfac.normal(network(p, x))
        return 0.5 * jnp.sum((z - y) ** 2, -1).mean()

    return loss


def compare(one, other, args, **options):
    """Kinds, values, gradients and statistics of two losses."""
    tagged = [kfac.tag(loss, *args, **options) for loss in (one, other)]
    assert tagged[0].fingerprint() == tagged[1].fingerprint()
    assert not any(t.kind == "diagonal" for t in tagged[0].layers), str(tagged[0])
    found = [jax.jit(t.value_and_grad)(*args) for t in tagged]
    close(found[0], found[1], 1e-9)
    return tagged[0]


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("network", SHAPES, ids=lambda f: f.__name__)
def test_bodies(rng, network, checked):
    args = data(rng, network)
    along = ("x",) if network is not mlp else ("x", "y")
    other = lambda p, x: mapped(network, p, x, along=along, checked=checked)  # noqa: E731
    compare(loss_of(other), loss_of(network), args)


@pytest.mark.parametrize("checked", [True, False])
def test_some_axes_by_hand(rng, checked):
    """Along the other one XLA shards by itself."""
    args = data(rng, mlp)
    options = {"axis_names": {"x"}, "checked": checked}
    compare(loss_of(lambda p, x: mapped(mlp, p, x, **options)), loss_of(mlp), args)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("options", [
    {"fisher": "exact"}, {"weight_sharing": "reduce"}, {"statistics": "squares"},
    {"subsample": kfac.Subsample(positions=2)},
], ids=str)  # fmt: skip
def test_other_statistics(rng, options, checked):
    network = convolved
    args = data(rng, network)
    other = lambda p, x: mapped(network, p, x, checked=checked)  # noqa: E731
    compare(loss_of(other), loss_of(network), args, **options)


@pytest.mark.parametrize("checked", [True, False])
def test_the_whole_loss_inside(rng, checked):
    """Marked and averaged on the devices."""
    args = data(rng, mlp)

    def body(p, x, y):
        return lax.pmean(loss_of(mlp)(p, x, y), ("x",))

    def loss(p, x, y):
        return mapped(body, p, x, y, checked=checked, out=P())

    tagged = compare(loss, loss_of(mlp), args)
    with pytest.raises(ValueError, match="shard_map"):
        kfac.tag(loss, *args, fisher="exact")
    assert tagged.layers


def test_training_is_the_same(rng):
    """Layers that are not due, eigenbases, and an outer mesh."""
    args = data(rng, mlp)
    runs = []
    for network in (mlp, lambda p, x: mapped(mlp, p, x)):
        tagged = kfac.tag(loss_of(network), *args)
        interval = kfac.intervals.every(2)
        tx = kfac.kfac(tagged.layers, 0.1, inverse="ekfac", interval=interval)
        runs.append(train(tagged, tx, args[0], [args[1:]] * 4)[::2])
    close(runs[0], runs[1], 1e-5)


def test_explicit_mesh(rng):
    args = data(rng, mlp)

    def network(p, x):
        return jax.shard_map(mlp, in_specs=(P(), P("x")), out_specs=P("x"))(p, x)

    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        p, x, y = (jax.device_put(v, P()) for v in args)
        x, y = (jax.device_put(v, P("x")) for v in (x, y))
        tagged = kfac.tag(loss_of(network), p, x, y)
        found = jax.jit(tagged.value_and_grad)(p, x, y)
    plain = kfac.tag(loss_of(mlp), *args)
    wanted = jax.jit(plain.value_and_grad)(*args)
    close(jax.device_get(found), jax.device_get(wanted), 1e-9)


def test_sharded_parameters_fall_back(rng):
    """A weight of which every device has a part."""
    args = data(rng, mlp)

    def whole(p, x):
        run = jax.shard_map(
            lambda w, x: lax.psum(x @ w, "y"),
            mesh=mesh_of(AxisType.Auto),
            in_specs=(P("y"), P("x", "y")),
            out_specs=P("x"),
        )
        return jnp.tanh(run(p["w"], x) + p["b"]) @ p["v"]

    tagged = kfac.tag(loss_of(whole), *args)
    (layer,) = [t for t in tagged.layers if "w" in t.name]
    assert layer.kind == "diagonal" and "shard_map" in layer.note
    found = jax.jit(tagged.value_and_grad)(*args)
    close(found[:2], jax.value_and_grad(loss_of(mlp))(*args), 1e-9)
