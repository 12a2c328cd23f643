"""A physics-informed loss on several devices: the numbers of one.

Two terms of other rows, their weights measured; the second derivative's unit tangents
and constant cotangent are uses before the examples appear.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac

KEY = jax.random.key
DEVICES = 2
PARAMS = {
    "a": jax.random.normal(KEY(0), (2, 4)),
    "b": jnp.ones(4) / 3,
    "c": jax.random.normal(KEY(1), (4, 1)),
}
INNER = jax.random.normal(KEY(2), (8, 2))
EDGE = jax.random.normal(KEY(3), (4, 2))


def net(p, z):
    return (jnp.tanh(z @ p["a"] + p["b"]) @ p["c"])[0]


def loss(p, inner, edge):
    laplacian = lambda z: jnp.trace(jax.hessian(net, 1)(p, z))  # noqa: E731
    residual = kfac.normal(jax.vmap(laplacian)(inner))
    value = kfac.normal(jax.vmap(lambda z: net(p, z))(edge))
    return 0.5 * (residual**2).mean() + 5.0 * (value**2).mean()


def steps(one, params, state, *args):
    for _ in range(2):
        params, state = one(params, state, *args)
    return params, state


def optimiser(tagged, axis_name=None):
    return kfac.kfac(tagged.layers, 0.05, damping=0.1, axis_name=axis_name)


def alone():
    tagged = kfac.tag(loss, PARAMS, INNER, EDGE, fisher="exact")
    assert not [t.note for t in tagged.layers if "batch" in t.note]
    tx = optimiser(tagged)

    @jax.jit
    def one(p, s, *args):
        _, grads, seen = tagged.value_and_grad(p, *args, opt_state=s)
        updates, s = tx.update(grads, s, p, statistics=seen)
        return jax.tree.map(jnp.add, p, updates), s

    return one, tx, tagged


def mesh_of(kind):
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("i",), axis_types=(kind,), devices=devices)


def on_devices(mode):
    """The same under ``jit`` of sharded batches, or mapped over devices."""
    rows, whole = PartitionSpec("i"), PartitionSpec()
    one, tx, _ = alone()
    if mode in ("auto", "explicit"):
        mesh = mesh_of(AxisType.Auto if mode == "auto" else AxisType.Explicit)
        with jax.set_mesh(mesh):
            args = jax.device_put((INNER, EDGE), NamedSharding(mesh, rows))
            start = jax.device_put(
                (PARAMS, tx.init(PARAMS)), NamedSharding(mesh, whole)
            )
            return steps(one, *start, *args)
    tagged = kfac.tag(loss, PARAMS, INNER[:4], EDGE[:2], fisher="exact")
    tx = optimiser(tagged, "i")

    def mapped(p, s, *args):
        _, grads, seen = tagged.value_and_grad(p, *args, opt_state=s)
        if mode == "checked":
            grads = jax.tree.map(lambda g: g / DEVICES, grads)
        else:
            grads = jax.lax.pmean(grads, "i")
        updates, s = tx.update(grads, s, p, statistics=seen)
        return jax.tree.map(jnp.add, p, updates), s

    state = tx.init(PARAMS)
    if mode == "pmap":
        halves = [x.reshape(DEVICES, -1, 2) for x in (INNER, EDGE)]
        run = jax.pmap(
            mapped,
            "i",
            in_axes=(None, None, 0, 0),
            out_axes=None,
            devices=jax.devices()[:DEVICES],
        )
        return steps(run, PARAMS, state, *halves)
    run = jax.shard_map(
        mapped,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(whole, whole, rows, rows),
        out_specs=whole,
        check_vma=mode == "checked",
    )
    return steps(jax.jit(run), PARAMS, state, INNER, EDGE)


@pytest.mark.parametrize("mode", ["auto", "explicit", "pmap", "shard_map", "checked"])
def test_the_numbers_of_one(mode):
    one, tx, _ = alone()
    wanted = steps(one, PARAMS, tx.init(PARAMS), INNER, EDGE)
    seen = on_devices(mode)
    for a, b in zip(jax.tree.leaves(seen[0]), jax.tree.leaves(wanted[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    pairs = (seen[1].kfac.factors, wanted[1].kfac.factors)
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
