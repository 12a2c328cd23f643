"""Statistics of a part of the rows: their mean over all offsets is the full one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import cases, close
from tests.statistics.test_conv_factor import conv_loss, loop_patches
from tests.statistics.test_masks import MASK, masked_loss
from tests.tagging.test_tied import tagged_loss

HALF = kfac.Subsample(examples=2, positions=2)
# Two offsets of examples and two along each of three axes at most.
CYCLE = 16
DENSE = ["mlp", "language", "heads_out", "twice", "recurrent", "remat", "cond"]
CONV = ["conv1d", "conv3d", "strides", "all_dilations", "groups", "nchw", "chwn"]


def rotated(state, phase):
    """The state after that many refreshes of every layer."""
    refreshes = jnp.full_like(state.clock.refreshes, phase)
    return state._replace(clock=state.clock._replace(refreshes=refreshes))


def statistics_by_phase(tagged, state, args, phases=CYCLE, **options):
    """Statistics for every number of refreshes."""
    run = jax.jit(tagged.value_and_grad)
    states = [rotated(state, phase) for phase in range(phases)]
    return [run(*args, opt_state=one, **options)[2] for one in states]


def check_mean(tagged, args, inverse="cholesky", **options):
    """The mean over all offsets is the full statistic, and no offset alone is."""
    state = kfac.scale_by_kfac(tagged.layers, inverse=inverse).init(args[0])
    seen = statistics_by_phase(tagged, state, args, **options)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *seen)
    full = dataclasses.replace(tagged, subsample=kfac.Subsample())
    wanted = jax.jit(full.value_and_grad)(*args, opt_state=state, **options)[2]
    close(mean, wanted, 1e-10)
    for layer in tagged.layers:
        if layer.kronecker:
            g = [np.asarray(one[layer.name].g) for one in seen]
            assert np.abs(g[0] - g[1]).max() > 1e-6 * np.abs(g[0]).max()


FAST = ["language", "heads_out", "recurrent", "conv1d", "strides", "groups", "chwn"]


@pytest.mark.parametrize("name", cases(DENSE + CONV, FAST))
def test_mean_over_offsets_is_the_full_statistic(name):
    model = models.BY_NAME[name]
    tagged = model.tag(4, subsample=HALF)
    check_mean(tagged, (model.params(), *model.batch(4)))


@pytest.mark.parametrize(
    "name",
    cases(["heads_out", "uneven_padding", "depthwise"], ["heads_out", "depthwise"]),
)
def test_moments_take_the_same_rows_on_both_sides(name):
    model = models.BY_NAME[name]
    tagged = model.tag(4, subsample=HALF)
    args = (model.params(), *model.batch(4))
    check_mean(tagged, args, "ekfac")


@pytest.mark.parametrize("name", cases(["conv2d", "heads_out", "mlp"], ["heads_out"]))
def test_reduced_rows(name):
    model = models.BY_NAME[name]
    some = kfac.Subsample(examples=2)
    tagged = model.tag(4, weight_sharing="reduce", subsample=some)
    check_mean(tagged, (model.params(), *model.batch(4)))


def test_masked_rows(rng):
    sizes = {"w": (3, 4), "b": (4,), "s": (4,), "v": (4, 5)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in sizes.items()}
    args = (params, rng.normal(size=(4, 3, 3)), rng.integers(0, 5, (4, 3)), MASK)
    tagged = kfac.tag(masked_loss, *args, subsample=kfac.Subsample(examples=2))
    check_mean(tagged, args)


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_tied_embedding(inverse, rng):
    def lookup(p, ids):
        return jnp.tanh(p["table"][ids] * 1.5) @ p["table"].T + p["bias"]

    params = {"table": rng.normal(size=(5, 3)), "bias": rng.normal(size=5)}
    args = (jax.tree.map(jnp.asarray, params), jnp.asarray([[0, 1], [4, 1], [2, 3]]))
    tagged = tagged_loss(lookup, *args, subsample=HALF)
    assert any(layer.tied for layer in tagged.layers)
    check_mean(tagged, args, inverse)


def test_monte_carlo_labels(rng):
    model = models.BY_NAME["conv2d"]
    tagged = model.tag(4, subsample=HALF, fisher="mc")
    args = (model.params(), *model.batch(4))
    check_mean(tagged, args, key=jax.random.key(3))


@pytest.mark.parametrize("phase", [0, 5, 11])
def test_rows_of_one_offset(phase, rng):
    """Digits of the phase: examples, then the spatial axes; 3 do not divide 7."""
    x, y = rng.normal(size=(4, 8, 7, 2)), rng.integers(0, 5, 4)
    params = {"kernel": rng.normal(size=(3, 3, 2, 5)), "bias": rng.normal(size=5)}
    padding, ones = ((1, 1), (1, 1)), (1, 1)
    loss = conv_loss(ones, padding, ones)
    some = kfac.Subsample(examples=2, positions=3)
    tagged = kfac.tag(loss, params, x, y, subsample=some)
    state = kfac.scale_by_kfac(tagged.layers).init(params)
    (layer,) = tagged.layers
    seen = statistics_by_phase(tagged, state, (params, x, y), phase + 1)[-1]
    rows, _ = loop_patches(x, (3, 3), padding, ones, ones)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1).reshape(4, 8, 7, -1)
    rows = rows[phase % 2 :: 2, phase // 2 % 3 :: 3, phase // 6 % 3 :: 3]
    rows = rows.reshape(-1, 19)
    close(seen[layer.name].a, 18 * rows.T @ rows / 4, 1e-12)


def test_without_a_state_the_offset_is_zero(rng):
    model = models.BY_NAME["mlp"]
    tagged = model.tag(4, subsample=kfac.Subsample(examples=4))
    args = (model.params(), *model.batch(4))
    seen = tagged.value_and_grad(*args)[2]["layer0"].a
    row = np.append(np.asarray(args[1])[0], 1)
    close(seen, 4 * np.outer(row, row) / 4, 1e-12)


@pytest.mark.parametrize(
    "kind", cases([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit])
)
def test_sharded_examples_stay_where_they_are(kind):
    """No example moves between devices: the program gathers nothing."""
    model, examples = models.BY_NAME["conv2d"], 4 * jax.device_count()
    some = kfac.Subsample(examples=2)
    tagged = model.tag(examples, subsample=some)
    x, y = model.batch(examples)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (kind,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.device_put((model.params(), x, y), (whole, place, place))
    run = jax.jit(tagged.value_and_grad)
    close(run(*args)[2], run(model.params(), x, y)[2], 1e-10)
    text = run.lower(*args).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("check", [True, False])
def test_mapped_over_devices(check):
    """Every device takes a part of its own examples."""
    model, devices = models.BY_NAME["conv2d"], jax.device_count()
    tagged = model.tag(4, subsample=HALF)
    x, y = model.batch(4)
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
    spec = PartitionSpec("data")

    def mean(params, x, y):
        found = tagged.value_and_grad(params, x, y)[2]
        return jax.lax.pmean(found, "data")

    run = jax.shard_map(
        mean, mesh=mesh, in_specs=(PartitionSpec(), spec, spec),
        out_specs=PartitionSpec(), check_vma=check,
    )  # fmt: skip
    tiled = [jnp.tile(v, (devices,) + (1,) * (v.ndim - 1)) for v in (x, y)]
    alone = jax.jit(tagged.value_and_grad)(model.params(), x, y)[2]
    close(jax.jit(run)(model.params(), *tiled)["layer"].a, alone["layer"].a, 1e-10)


@pytest.mark.parametrize(
    ("name", "some", "sharing", "words"),
    [
        ("mlp", {"examples": 3}, "expand", "layer0: subsample takes one of 3 .*got 4"),
        ("heads_out", {"positions": 2}, "reduce", "subsample of positions needs"),
        ("twice", {"examples": 2}, "reduce", "layer layer: subsample needs weight_sh"),
    ],
)
def test_what_cannot_be_sampled_is_refused(name, some, sharing, words):
    some = kfac.Subsample(**some)
    with pytest.raises(ValueError, match=words):
        models.BY_NAME[name].tag(4, subsample=some, weight_sharing=sharing)


@pytest.mark.parametrize("value", [0, -1, True])
def test_whole_numbers_only(value):
    with pytest.raises(ValueError, match=r"positions must be a whole number >= 1"):
        kfac.Subsample(positions=value)
