"""Bytes: the model, the counter and the compiled program agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kfac_jax_lite as kfac
from kfac_jax_lite.distributed import collectives as lib
from tests import models
from tests.collectives import collectives, totals
from tests.helpers import batches_of
from tests.parallel import (
    AXIS,
    DEVICES,
    EXAMPLES,
    REDUCTIONS,
    mesh_of,
    prepare,
    under_jit,
)

MODELS = ["mlp", "conv2d", "layer_norm", "recurrent", "grouped_nchw"]
BARE = {
    name: dataclasses.replace(reduction, bucket=0, devices=DEVICES)
    for name, reduction in REDUCTIONS.items()
    if name != "all"
}

pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices"),
]


def over(devices, function, x, out=None):
    """``function`` under ``shard_map`` on the rows of ``x``."""
    spec = PartitionSpec(AXIS)
    mapped = jax.shard_map(
        function,
        mesh=mesh_of(AxisType.Auto, devices),
        in_specs=spec,
        out_specs=spec if out is None else out,
    )
    return np.asarray(jax.jit(mapped)(x))


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 8])
def test_trees_carry_every_row(devices, rng):
    """To any root and back, also where the devices are no power of two."""
    x = rng.normal(size=(devices, 4))
    for root in range(devices):

        def bring(part, root=root):
            return lib.to_root(part[0], AXIS, devices, root)[None]

        def deal(rows, root=root):
            return lib.from_root(rows[0], AXIS, devices, root)[None]

        np.testing.assert_array_equal(over(devices, bring, x)[root], x)
        table = rng.normal(size=(devices, devices, 4))
        np.testing.assert_array_equal(over(devices, deal, table), table[root])


@pytest.mark.parametrize("wire", [None, jnp.bfloat16])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_means(devices, wire, rng):
    """Means of vectors of any length, in float32 sums whatever is on the wire."""
    x = rng.normal(size=(devices, 13))
    sent = np.asarray(jnp.asarray(x).astype(wire or x.dtype), np.float64)
    wanted = np.asarray(jnp.asarray(sent.mean(0)).astype(wire or x.dtype), np.float64)
    mean = over(devices, lambda v: lib.mean(v[0], AXIS, wire), x, PartitionSpec())
    np.testing.assert_allclose(mean, wanted, rtol=1e-14)

    def scattered(v):
        parts = lib.split_in(v[0], devices)
        return lib.scattered_mean(parts, AXIS, wire)[None]

    slices = over(devices, scattered, x).ravel()[:13]
    np.testing.assert_allclose(slices, sent.mean(0), rtol=1e-14)


def update_text(model, reduction, devices=DEVICES):
    """The compiled ``update`` of one device, and the layers."""
    tagged = model.tag(EXAMPLES // devices)
    tx = kfac.scale_by_kfac(
        tagged.layers, axis_name=AXIS, reduction=reduction, inverse_interval=2,
        interval=kfac.intervals.staleness(0.5),
    )  # fmt: skip
    params = model.params()
    state, whole = tx.init(params), PartitionSpec()
    args = (params, *model.batch(EXAMPLES // devices))
    statistics = jax.eval_shape(lambda *a: tagged.value_and_grad(*a)[2], *args)
    specs = kfac.state_specs(state, AXIS)

    def update(grads, state, statistics):
        return tx.update(grads, state, statistics=statistics)

    mapped = jax.shard_map(
        update, mesh=mesh_of(AxisType.Auto, devices), in_specs=(whole, specs, whole),
        out_specs=(whole, specs), check_vma=False,
    )  # fmt: skip
    lowered = jax.jit(mapped).lower(params, state, statistics)
    return tagged.layers, lowered.compile().as_text()


def modelled(layers, reduction, event=None, agreements=True):
    """What the model says, by kind and number of devices."""
    found = kfac.traffic(
        layers, reduction, DEVICES, inverse_interval=2, itemsize=8, memory=2
    )
    found = [c for c in found if c.layer or agreements]
    return totals(c for c in found if event in (None, c.event))


def bytes_cases():
    """Every reduction on every model; in the fast suite one of each kind of layer."""
    for model in MODELS:
        for name in BARE:
            kinds = ("mlp", "layer_norm", "grouped_nchw")
            fast = name == "gradients" and model in kinds
            fast |= (model, name) == ("mlp", "alone")
            marks = [] if fast else pytest.mark.slow
            yield pytest.param(model, name, marks=marks)


@pytest.mark.parametrize(("name", "reduction"), list(bytes_cases()))
def test_the_program_moves_what_the_model_says(name, reduction):
    """Every collective of the program is the model's, and only its step's are bare."""
    layers, text = update_text(models.BY_NAME[name], BARE[reduction])
    found = collectives(text)
    assert totals(found) == modelled(layers, BARE[reduction])
    bare = [c for c in found if c.computation == "ENTRY"]
    assert totals(bare) == modelled(layers, BARE[reduction], "step")
    kinds = {c.kind for c in found}
    if BARE[reduction].mode != "all" and BARE[reduction].dtype is None:
        assert "reduce_scatter" in kinds


@pytest.mark.parametrize("wire", [None, jnp.bfloat16])
def test_a_bucket_is_one_collective_of_the_same_bytes(wire):
    reduction = kfac.Reduction(dtype=wire, devices=DEVICES)
    layers, text = update_text(models.BY_NAME["mlp"], reduction)
    alone = dataclasses.replace(reduction, bucket=0)
    step = modelled(layers, alone, "step")
    once = modelled(layers, alone, "refresh", agreements=False)
    by_place = {}
    for c in collectives(text):
        by_place.setdefault(c.computation, []).append(c)
    bucket = [c for place, c in by_place.items() if totals(c) == once]
    assert len(bucket) == 1
    assert len(bucket[0]) == len(once)
    both = {k: step.get(k, 0) + 2 * once.get(k, 0) for k in step | once}
    both["all_reduce", DEVICES] += 4  # whether all statistics are finite
    assert totals(collectives(text)) == both


@pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=[] if m == "mlp" else pytest.mark.slow) for m in MODELS],
)
def test_what_xla_reduces_under_jit(name):
    """With a sharded batch the statistics' all-reduces are in the conditionals."""
    model = models.BY_NAME[name]
    tagged = model.tag(EXAMPLES)
    step, state, place, _ = under_jit(
        model, "auto", kfac.Reduction(), "cholesky", DEVICES
    )
    found = compiled_collectives(step, model, state, place)
    gated = [c for c in found if c.gated]
    assert not any(c.computation == "ENTRY" for c in gated)
    wanted = kfac.traffic(
        tagged.layers, kfac.Reduction(), DEVICES, mapped=False, itemsize=8
    )
    expected = totals(wanted)
    if name == "conv2d":  # 3 × 3, 2 channels, 5 × 5 pixels, a bias: A is [19, 19]
        # XLA sums what it is made of: 3 shifted products of 6 × 6, 4 more for the
        # first and for the last columns, and the images.
        expected["all_reduce", DEVICES] += 8 * ((3 + 2 * 4) * 36 + 50 - 19**2)
    assert totals(gated) == expected


def compiled_collectives(step, model, state, place):
    """Collectives of a mode's whole training step."""
    batch = place(batches_of(model, 1, EXAMPLES)[0])
    return collectives(step.text(model.params(), state, *batch))


@pytest.mark.parametrize(
    "name",
    [
        "gradients",
        pytest.param("all", marks=pytest.mark.slow),
        pytest.param("inverses", marks=pytest.mark.slow),
    ],
)
def test_the_counter_counts_what_ran(name):
    """Bytes of the report: those of the events that the clock let through."""
    model, reduction = models.BY_NAME["conv2d"], REDUCTIONS[name]
    step, state, place, _ = prepare(model, "pmap", reduction)
    layers = sorted(model.tag(EXAMPLES).layers, key=lambda layer: layer.name)
    params, ran = model.params(), {layer.name: [0, 0, 0] for layer in layers}
    before = np.zeros(len(layers), int)
    for batch in batches_of(model, 12, EXAMPLES):
        due = np.asarray(state.kfac.clock.due)
        params, state, _ = step(params, state, *place(batch))
        after = np.asarray(state.kfac.clock.inversions)
        for i, layer in enumerate(layers):
            ran[layer.name][0] += bool(due[i])
            ran[layer.name][1] += int(after[i] - before[i])
            ran[layer.name][2] += 1
        before = after
    memory = {"mapped": True, "itemsize": 8, "memory": 1}
    found = kfac.traffic(layers, reduction, DEVICES, inverse_interval=2, **memory)
    events = ("refresh", "inversion", "step")
    keys = ("bytes_reduced", "bytes_inverses", "bytes_updates")
    for record in kfac.report(state):
        for event, key, times in zip(events, keys, ran[record["name"]], strict=True):
            one = [c for c in found if (c.layer, c.event) == (record["name"], event)]
            assert record[key] == times * sum(c.payload for c in one)
    refreshes = [record["refreshes"] for record in kfac.report(state)]
    assert min(refreshes) < 12, "no layer ever skipped a step"


def test_what_a_device_sends():
    """Rings and pairs, as in Thakur, Rabenseifner & Gropp (2005)."""

    def one(kind, count=1):
        return kfac.Collective("l", "refresh", kind, 100, 4, 8, count)

    assert one("all_reduce").sent == 2 * 400 * 7 / 8
    for kind in ("reduce_scatter", "all_gather", "all_to_all"):
        assert one(kind).sent == 400 * 7 / 8
    assert one("permute", count=4).sent == 400 * 4 / 8
    assert one("permute", count=4).payload == 1600
