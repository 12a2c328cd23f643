"""Meshes of two axes: sharded parameters, tensor-parallel layers, other layouts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import batches_of, cases, close, identical, kfac_state
from tests.parallel import (
    DEVICES,
    EXAMPLES,
    OWNER,
    prepare,
    run,
    same,
    transformation,
    whole,
)

P = PartitionSpec
PLACES = {
    "replicated": {"w1": P(), "b1": P(), "w2": P(), "b2": P()},
    "fsdp": {"w1": P("data"), "b1": P("data"), "w2": P("data"), "b2": P("data")},
    "tensor": {"w1": P(None, "model"), "b1": P("model"), "w2": P("model"), "b2": P()},
}
# Axes over which layers are dealt out, share.
SPREAD = {
    "all": None,
    "owner": ("data", "auto"),
    "both_axes": (("data", "model"), "gradients"),
    "rows": ("data", "gradients"),
}

pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices"),
]


def loss_of(place, explicit):
    """A classifier; on explicit meshes it says how products are sharded."""

    def product(x, w):
        spec = P("data") if explicit else None
        return jnp.einsum("bi,io->bo", x, w, out_sharding=spec)

    def loss(p, x, y):
        if explicit and place == "fsdp":
            p = reshard(p, P())
        hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, p["w1"]) + p["b1"])
        logits = kfac.categorical(product(hidden, p["w2"]) + p["b2"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def data():
    """Parameters and batches."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 16), "b1": (16,), "w2": (16, 4), "b2": (4,)}
    params = {k: jnp.asarray(0.3 * rng.normal(size=s)) for k, s in shapes.items()}
    batches = [(rng.normal(size=(16, 8)), rng.integers(0, 4, 16)) for _ in range(5)]
    return params, jax.tree.map(jnp.asarray, batches)


def optimiser(layers, **options):
    """Adaptive K-FAC without momentum, whose state would be one more thing to place."""
    return kfac.kfac(
        layers, 0.05, damping=0.01, momentum=None, inverse_interval=2,
        interval=kfac.intervals.staleness(0.5), **options,
    )  # fmt: skip


def train(loss, params, batches, put, options):
    """A few steps; ``put`` places an array."""
    tagged = kfac.tag(loss, params, *batches[0])
    tx = optimiser(tagged.layers, **options)
    state = tx.init(jax.device_get(params))
    names = options.get("axis_name")
    state = jax.tree.map(put, state, kfac.state_specs(state, names))

    @jax.jit
    def step(params, state, x, y):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, *batch)
    return tagged.layers, params, state


KINDS = (AxisType.Auto, AxisType.Explicit)
# Tensor parallelism and divided parameters; owners and divided rows.
FAST = [
    (AxisType.Auto, "tensor", "both_axes"),
    (AxisType.Explicit, "fsdp", "rows"),
]


@pytest.mark.parametrize(
    ("kind", "place", "spread"), cases(itertools.product(KINDS, PLACES, SPREAD), FAST)
)
def test_a_mesh_of_data_and_model(kind, place, spread):
    """Parameters keep their sharding; everything else is as on one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    params, batches = data()
    plain = loss_of(place, False)
    layers, wanted, state = train(plain, params, batches, lambda x, s: x, {})
    wanted_state = kfac_state(state)
    options = {}
    if SPREAD[spread]:
        names, share = SPREAD[spread]
        reduction = kfac.Reduction("owner", mesh=mesh, bucket=0, share=share)
        options = {"axis_name": names, "reduction": reduction}

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    placed = jax.tree.map(put, params, PLACES[place])
    split = jax.tree.map(lambda x: put(x, P("data")), batches)
    with jax.set_mesh(mesh):
        loss = loss_of(place, kind == AxisType.Explicit)
        _, new, state = train(loss, placed, split, put, options)
    for name, x in new.items():
        assert x.sharding.is_equivalent_to(placed[name].sharding, x.ndim), name
    close(jax.device_get(new), jax.device_get(wanted), 1e-8)
    state = kfac.relayout(state, optimiser(layers).init(params), layers)
    close(kfac_state(state).factors, wanted_state.factors, 1e-8)
    close(kfac_state(state).inverses, wanted_state.inverses, 1e-8)


# ---------------------------------------------------------------- layouts

NET = models.mlp("layouts", (4, 5, 3))


@pytest.mark.parametrize("devices", cases((1, 2, 4), [4]))
def test_a_state_of_eight_devices_goes_on_on_fewer(devices):
    """Six steps on eight devices, then six on fewer: twelve on one."""
    batches = batches_of(NET, 12, EXAMPLES)
    step, state, place, _ = prepare(NET, "pmap", OWNER(share="gradients"))
    params = NET.params()
    for batch in batches[:6]:
        params, state, _ = step(params, state, *place(batch))
    reduction = OWNER(devices=devices, share="gradients")
    step, like, place, _ = prepare(NET, "pmap", reduction, devices=devices)
    state = kfac.relayout(state, like, NET.tag(EXAMPLES).layers)
    params = jax.device_get(params)
    for batch in batches[6:]:
        params, state, _ = step(params, state, *place(batch))
    same(NET, (params, state), 12)


def test_relayout_there_and_back():
    """Through the layout of one device and back: the same bits."""
    reduction = OWNER(share="gradients")
    _, state = run(NET, "pmap", reduction, 3)
    layers = NET.tag(EXAMPLES).layers
    alone = transformation(layers).init(NET.params())
    there = kfac.relayout(state, alone, layers)
    assert kfac_state(there).factors["layer0"].a.shape == (5, 5)
    back = kfac.relayout(there, state, layers)
    # Off-diagonals are divided and multiplied by the root of two.
    close(kfac_state(back).factors, jax.device_get(kfac_state(state).factors), 1e-15)
    identical(kfac_state(back).inverses, jax.device_get(kfac_state(state).inverses))
    identical(kfac_state(back).clock, jax.device_get(kfac_state(state).clock))
    again = whole(NET, back)
    close(again.inverses, kfac_state(there).inverses, 1e-15)


def test_relayout_refuses_another_model():
    other = models.mlp("other", (4, 5, 5, 3))
    layers = NET.tag(EXAMPLES).layers
    state = optimiser(layers).init(NET.params())
    like = optimiser(other.tag(EXAMPLES).layers).init(other.params())
    with pytest.raises(ValueError, match="different models: they differ in layer2"):
        kfac.relayout(state, like, layers)


def test_a_state_that_is_not_divided_is_refused():
    """``pmap`` with a replicated state: the error says what to pass."""
    tagged = NET.tag(EXAMPLES // DEVICES)
    tx = optimiser(tagged.layers, axis_name="batch", reduction=OWNER())
    params = NET.params()
    state = tx.init(params)

    def step(params, state, x, y):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)[0]

    x, y = NET.batch(EXAMPLES)
    batch = [v.reshape(DEVICES, -1, *v.shape[1:]) for v in (x, y)]
    with pytest.raises(ValueError, match="layer layer0: .*=kfac.state_axes"):
        jax.pmap(step, "batch", in_axes=(None, None, 0, 0))(params, state, *batch)
