"""Every rule of the update on every arrangement of devices, against one device.

Whatever is traced enters the update as an argument: what a rule closes over would keep
the type that it has outside ``shard_map``, or on an explicit mesh.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import cases, close

P = PartitionSpec
DEVICES, EXAMPLES, STEPS = 4, 8, 3
pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs four devices"),
]

# ------------------------------------------------------------------------- the rules

linear = optax.linear_schedule


def injected(layers, **options):
    """Every number of ``kfac.kfac`` as part of the state."""
    numbers = dict(
        learning_rate=0.05, damping=0.01, momentum=0.5, weight_decay=0.01,
        factor_decay=0.8, inverse_interval=2, kl_clip=0.01,
    )  # fmt: skip
    return optax.inject_hyperparams(kfac.kfac)(layers, **numbers, **options)


def rule(learning_rate=0.05, **chosen):
    """``kfac.kfac`` with these arguments."""
    return lambda layers, **options: kfac.kfac(
        layers, learning_rate, **chosen, **options
    )


RULES = {
    "fixed": rule(damping=0.01),
    "schedules": rule(
        linear(0.1, 0.01, 3), damping=linear(0.1, 0.01, 3),
        momentum=linear(0.5, 0.9, 3), kl_clip=linear(1e-2, 1e-4, 3),
    ),
    # So long steps that the second is taken back.
    "adaptive": rule(
        5.0, damping=kfac.damping.adaptive(0.1), kl_clip=None, weight_decay=0.01,
        mask={"w1": True, "b1": False, "w2": True},
    ),
    "levenberg_marquardt": rule(
        damping=kfac.damping.levenberg_marquardt(0.1, interval=1), weight_decay=0.01,
        mask=lambda params: {"w1": True, "b1": False, "w2": True},
    ),
    "auto": rule("auto", damping=kfac.damping.adaptive(0.1)),
    "inject": injected,
    "scale_by_kfac": lambda layers, **options: kfac.scale_by_kfac(
        layers, damping=kfac.damping.adaptive(0.1), inverse="eigh", **options
    ),
}  # fmt: skip
MODELS = ("levenberg_marquardt", "auto")

# ------------------------------------------------------------------------- the model


def data():
    """Parameters and a batch."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 8), "b1": (8,), "w2": (8, 4)}
    params = {k: jnp.asarray(0.5 * rng.normal(size=s)) for k, s in shapes.items()}
    x, y = rng.normal(size=(EXAMPLES, 6)), rng.normal(size=(EXAMPLES, 4))
    return params, jax.tree.map(jnp.asarray, (x, y))


def loss_of(explicit):
    """Least squares; on an explicit mesh it says how the second product is sharded."""

    def loss(p, x, y):
        hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, p["w1"]) + p["b1"])
        spec = P("data") if explicit else None
        z = jnp.einsum("bi,io->bo", hidden, p["w2"], out_sharding=spec)
        return 0.5 * jnp.square(kfac.normal(z) - y).sum(-1).mean()

    return loss


def step_of(tagged, tx, name, axis=None, summed=False):
    """A step of the whole program, or of one of several devices."""

    def step(params, state, x, y):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        if summed:
            grads = jax.tree.map(lambda g: g / jax.lax.axis_size(axis), grads)
        elif axis is not None:
            grads = jax.lax.pmean(grads, axis)
        more = {"statistics": statistics}
        if name in MODELS:
            more["model"] = kfac.quadratic_model(tagged, params, x, y)
        updates, state = tx.update(grads, state, params, **more)
        if name == "scale_by_kfac":
            updates = jax.tree.map(lambda u: -0.05 * u, updates)
        return optax.apply_updates(params, updates), state

    return step


# ------------------------------------------------------------------ the arrangements

SHARDED = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model")}
KIND = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MAPPED = ("pmap", "shard_map", "checked")
PLACES = [f"{k}{dims}{o}" for k in KIND for dims in (1, 2) for o in ("", "_owner")]
PLACES += [f"{k}{o}" for k in MAPPED for o in ("", "_owner")]


def on_mesh(name, place, jit):
    """Parameters and state after a few steps under ``jit`` or eagerly on a mesh."""
    kind, size = place.split("_")[0][:-1], place[len(place.split("_")[0]) - 1]
    shape, names = {"1": ((4,), ("data",)), "2": ((2, 2), ("data", "model"))}[size]
    mesh = jax.make_mesh(
        shape, names, axis_types=(KIND[kind],) * len(shape),
        devices=jax.devices()[:DEVICES],
    )  # fmt: skip
    params, batch = data()
    specs = SHARDED if size == "2" else jax.tree.map(lambda _: P(), params)

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    options = {}
    if "owner" in place:
        reduction = kfac.Reduction("owner", mesh=mesh, bucket=0)
        options = {"axis_name": "data", "reduction": reduction}
    with jax.set_mesh(mesh):
        params = jax.tree.map(put, params, specs)
        batch = jax.tree.map(lambda x: put(x, P("data")), batch)
        tagged = kfac.tag(loss_of(kind == "explicit"), params, *batch)
        tx = RULES[name](tagged.layers, **options)
        # Copies of the parameters where these are, slices of factors on their devices.
        state = jax.jit(tx.init)(jax.device_get(params))
        whole = jax.tree.map(put, state, kfac.state_specs(state, "data"))
        state = optax.tree.map_params(tx, put, whole, specs)
        step = step_of(tagged, tx, name)
        run, types = jax.jit(step) if jit else step, []
        for _ in range(STEPS):
            types.append(jax.tree.map(jax.typeof, (params, state)))
            params, state = run(params, state, *batch)
    types.append(jax.tree.map(jax.typeof, (params, state)))
    if kind == "explicit":
        assert all(kinds == types[0] for kinds in types[1:])
    return params, state


def mapped(name, place):
    """The same with an axis mapped over the devices."""
    kind = place.removesuffix("_owner")
    params, (x, y) = data()
    share = EXAMPLES // DEVICES
    tagged = kfac.tag(loss_of(False), params, x[:share], y[:share])
    options = {"axis_name": "data"}
    if "owner" in place:
        options["reduction"] = kfac.Reduction("owner", devices=DEVICES, bucket=0)
    tx = RULES[name](tagged.layers, **options)
    state = tx.init(params)
    step = step_of(tagged, tx, name, "data", kind == "checked")
    if kind == "pmap":
        axes = kfac.state_axes(state)
        x, y = (v.reshape(DEVICES, share, -1) for v in (x, y))
        run = jax.pmap(
            step, "data", in_axes=(None, axes, 0, 0), out_axes=(None, axes),
            devices=jax.devices()[:DEVICES],
        )  # fmt: skip
    else:
        specs, split = kfac.state_specs(state, "data"), P("data")
        mesh = jax.make_mesh(
            (DEVICES,), ("data",), axis_types=(AxisType.Auto,),
            devices=jax.devices()[:DEVICES],
        )  # fmt: skip
        run = jax.jit(jax.shard_map(
            step, mesh=mesh, check_vma=kind == "checked",
            in_specs=(P(), specs, split, split), out_specs=(P(), specs),
        ))  # fmt: skip
    for _ in range(STEPS):
        params, state = run(params, state, x, y)
    return params, state


@functools.cache
def alone(name):
    """The same on one device."""
    params, batch = data()
    tagged = kfac.tag(loss_of(False), params, *batch)
    tx = RULES[name](tagged.layers)
    run, state = jax.jit(step_of(tagged, tx, name)), tx.init(params)
    for _ in range(STEPS):
        params, state = run(params, state, *batch)
    return jax.device_get((params, state))


def numbers(state):
    """What the rules leave in the state: everything of one entry."""
    return [x for x in jax.tree.leaves(jax.device_get(state)) if np.ndim(x) == 0]


def same(result, name):
    """Parameters, and every number in the state, are those of one device."""
    params, state = jax.device_get(result)
    wanted, wanted_state = alone(name)
    close(params, wanted, 1e-6)
    for seen, expected in zip(numbers(state), numbers(wanted_state), strict=True):
        np.testing.assert_allclose(seen, expected, rtol=1e-5)


# The fast suite: every rule where parameters are sharded, every arrangement once.
MESHES = [p for p in PLACES if not p.startswith(MAPPED)]
FAST = [("explicit2", name) for name in RULES]
FAST += list(zip(PLACES, itertools.cycle(RULES), strict=False))
FAST_EAGER = [("explicit2", "adaptive"), ("explicit2", "auto"), ("explicit1", "inject")]


@pytest.mark.parametrize(
    ("place", "name"), cases(itertools.product(PLACES, RULES), FAST)
)
def test_jit(place, name):
    run = mapped if place.startswith(MAPPED) else functools.partial(on_mesh, jit=True)
    same(run(name, place), name)


@pytest.mark.parametrize(
    ("place", "name"), cases(itertools.product(MESHES, RULES), FAST_EAGER)
)
def test_eager(place, name):
    same(on_mesh(name, place, False), name)
