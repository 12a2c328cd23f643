"""Layers that no gradient reaches for a while: nothing is averaged, nothing forgotten.

Statistics are made up here, so that every kind of layer can be idle at any step; what
the averages have to be is written down in plain Python.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kfac_jax_lite as kfac
from kfac_jax_lite.distributed.layout import unpacked, whole_statistics
from kfac_jax_lite.kronecker.inverses import method_named
from kfac_jax_lite.kronecker.state import Slices
from kfac_jax_lite.optimizer.options import Options
from kfac_jax_lite.optimizer.schedule import refreshes_due
from tests.helpers import leaves
from tests.parallel import AXIS, mesh_of

DECAY = 0.9
SIZES = {"busy": (4, 3), "head": (4, 3), "experts": (2, 4, 3)}
METHODS = ["cholesky", "newton_schulz", "eigh", "ekfac", "low_rank"]


def loss(p, x):
    members = jnp.einsum("bi,eio->beo", x, p["experts"]).mean(1)
    scaled = x @ p["busy"] * p["scale"] + p["shift"]
    out = scaled + x @ p["head"] + members + jnp.sin(p["odd"]).sum()
    return 0.5 * jnp.mean(jnp.sum(kfac.normal(out) ** 2, -1))


@functools.cache
def tagged():
    params = {name: jnp.ones(size) for name, size in SIZES.items()}
    params |= {"scale": jnp.ones(3), "shift": jnp.zeros(3), "odd": jnp.ones(2)}
    return kfac.tag(loss, params, jnp.ones((8, 4))), params


def fresh(seed, idle=(), moments=False):
    """Statistics of every layer; those of idle ones, or of an idle expert, are zero."""
    rng, found = np.random.default_rng(seed), {}

    def square(shape, zero):
        root = rng.normal(size=(*shape, shape[-1]))
        whole = root @ np.swapaxes(root, -1, -2)
        whole = whole[..., 0] if len(shape) == 0 else whole
        return jnp.asarray(0 * whole if zero else whole)

    for layer in tagged()[0].layers:
        name, zero = layer.name, layer.name in idle
        if layer.kronecker:
            a = square(layer.a_shape[:-1], False)
            g = square(layer.g_shape[:-1], zero)
            s = jnp.asarray(rng.random((*layer.blocks, *layer.sizes)) + 0.1)
            s = (0 * s if zero else s) if moments else None
            if "expert" in idle and layer.blocks:
                g, s = g.at[1].set(0), None if s is None else s.at[1].set(0)
            found[name] = kfac.KroneckerStatistics(a, g, s)
        elif layer.kind == "scale_shift":
            blocks = square(layer.a_shape[:-1], zero)
            found[name] = kfac.ScaleShiftStatistics(blocks)
        else:
            gradient = jnp.asarray(rng.normal(size=layer.a_shape))
            gradient = 0 * gradient if zero else gradient
            found[name] = kfac.DiagonalStatistics(gradient, jnp.asarray(8.0))
    return found


@functools.cache
def updater(method, packed=False, period=1):
    """``update(state, statistics, inverse_interval)``, of one compiled program."""

    def make(inverse_interval):
        return kfac.scale_by_kfac(
            tagged()[0].layers, damping=0.1, factor_decay=DECAY,
            interval=kfac.intervals.every(period), inverse=method,
            inverse_interval=inverse_interval, packed=packed,
        )  # fmt: skip

    @jax.jit
    def update(state, statistics, inverse_interval):
        tx, grads = make(inverse_interval), jax.tree.map(jnp.ones_like, tagged()[1])
        return tx.update(grads, state, None, statistics=statistics)

    return make(1).init(tagged()[1]), update


def played(method, steps, inverse_interval=1, **options):
    """Updates and state after steps, each a seed and the names of idle layers."""
    state, update = updater(method, **options)
    for seed, idle in steps:
        statistics = fresh(seed, idle, method == "ekfac")
        updates, state = update(state, statistics, jnp.asarray(inverse_interval))
    return updates, state


def names(kinds=("head", "scale", "odd")):
    """Names of the layers that hold these parameters."""
    layers = tagged()[0].layers
    return tuple(t.name for t in layers if any(k in p for p in t.params for k in kinds))


def averaged(values):
    """The bias-corrected average, as a sum with weights."""
    weights = [(1 - DECAY) * DECAY ** (len(values) - 1 - i) for i in range(len(values))]
    total = sum(w * np.asarray(v) for w, v in zip(weights, values, strict=True))
    return total / sum(weights)


def test_every_kind_is_here():
    kinds = {
        t.name: (t.kind, t.blocks if t.kronecker else ()) for t in tagged()[0].layers
    }
    assert sorted(kinds.values()) == [
        ("dense", ()), ("dense", ()), ("dense", (2,)), ("diagonal", ()),
        ("scale_shift", ()),
    ]  # fmt: skip
    assert len(names()) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_the_averages_are_those_without_the_idle_steps(packed):
    """Of a plain transcription: zeros of an idle layer are not averaged."""
    steps = [(0, ()), (1, names()), (2, names()), (3, ()), (4, names()), (5, ())]
    _, state = played("cholesky", steps, packed=packed)
    for layer in tagged()[0].layers:
        seen = [
            fresh(seed, idle)[layer.name]
            for seed, idle in steps
            if layer.name not in idle
        ]
        if layer.kind == "diagonal":
            wanted = [averaged([8.0 * np.square(s.gradient) for s in seen])]
        else:
            pairs = zip(*(jax.tree.leaves(s) for s in seen), strict=True)
            wanted = [averaged(values) for values in pairs]
        found = state.factors[layer.name]
        found = unpacked(layer, found) if layer.kronecker else found
        for x, y in zip(jax.tree.leaves(found), wanted, strict=False):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    counted = [3 if t.name in names() else 6 for t in tagged()[0].layers]
    np.testing.assert_array_equal(state.clock.refreshes, counted)
    weights = [1 - DECAY**n for n in counted]
    np.testing.assert_allclose(state.clock.weight, weights, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_wakes_up_is_where_it_was(method):
    """Averages and inverses after idle steps, and the step, as if there were none."""
    idle = [(seed, names()) for seed in (7, 8, 9)]
    updates, woken = played(method, [(0, ()), *idle, (1, ())])
    wanted, state = played(method, [(0, ()), (1, ())])
    for name in names():
        pairs = (woken.factors, state.factors), (woken.inverses, state.inverses)
        for mine, theirs in pairs:
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
                mine[name], theirs[name],
            )  # fmt: skip
    for path, leaf in leaves(wanted).items():
        if any(k in path for k in ("head", "scale", "shift", "odd")):
            np.testing.assert_allclose(
                leaves(updates)[path], leaf, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("method", METHODS)
def test_the_first_gradient_makes_a_fresh_state(method):
    """Idle from the start: inverted at once, whatever the inverse interval."""
    idle = [(7, names()), (8, names())]
    updates, _ = played(method, [*idle, (1, ())], 50)
    wanted, _ = played(method, [(1, ())], 50)
    for path, leaf in leaves(wanted).items():
        if any(k in path for k in ("head", "scale", "shift", "odd")):
            np.testing.assert_allclose(
                leaves(updates)[path], leaf, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("packed", [False, True])
def test_an_expert_without_rows_keeps_its_average(packed):
    """One block of two is idle: the other goes on, and its own begins when it wakes."""
    (name,) = names(("experts",))
    (layer,) = [t for t in tagged()[0].layers if t.name == name]
    steps = [(0, ()), (1, ("expert",)), (2, ())]
    _, state = played("cholesky", steps, packed=packed)
    found = unpacked(layer, state.factors[name])
    for field in ("a", "g"):
        values = [getattr(fresh(s, i)[name], field) for s, i in steps]
        np.testing.assert_allclose(
            getattr(found, field)[0], averaged([v[0] for v in values]), rtol=1e-5
        )
        old, new = values[0][1], values[2][1]
        rate = (1 - DECAY) / (1 - DECAY**3)
        np.testing.assert_allclose(
            getattr(found, field)[1], old + rate * (new - old), rtol=1e-5
        )
    _, state = played("cholesky", [(0, ("expert",)), (2, ())], packed=packed)
    found = unpacked(layer, state.factors[name])
    np.testing.assert_allclose(found.g[1], fresh(2)[name].g[1], rtol=1e-5)


def test_idle_layers_stay_due():
    """Until a gradient reaches them; the others keep to their interval of ten steps."""
    layers = tagged()[0].layers
    idle = np.array([t.name in names() for t in layers])
    _, state = played("cholesky", [(0, names()), (1, names())], period=10)
    np.testing.assert_array_equal(state.clock.due, idle)
    np.testing.assert_array_equal(state.clock.refreshes, 1 - idle)
    _, state = played("cholesky", [(0, names()), (1, names()), (2, ())], period=10)
    assert not np.any(state.clock.due)
    np.testing.assert_array_equal(state.clock.last_refresh, np.where(idle, 3, 1))


def due_at(options, clock, step):
    """Which layers are due at ``step``, as the step before decides it."""
    context = options.context(options.layers, jnp.asarray(0.1), jnp.asarray(step - 1))
    return refreshes_due(context, clock)


def test_idle_layers_do_not_bring_others_forward():
    """``together`` and turns count layers that are served, not those that wait."""
    rule = kfac.intervals.adaptive(0.3, "elapsed", together=0.5)
    options = Options(
        tagged()[0].layers, 0.1, DECAY, rule, method_named("cholesky"), 1, None,
        kfac.Reduction(),
    )  # fmt: skip
    idle = np.array([t.name in names() for t in options.layers])
    clock = updater("cholesky")[0].clock
    clock = clock._replace(
        due=jnp.asarray(idle), interval=jnp.full(len(idle), 10),
        last_refresh=jnp.where(idle, 0, 1), refreshes=jnp.where(idle, 0, 1),
    )  # fmt: skip
    for stagger in (False, True):
        now = dataclasses.replace(options, stagger=stagger)
        for step in (5, 8):
            due = due_at(now, clock, step)
            np.testing.assert_array_equal(np.asarray(due)[idle], True)
            assert not np.any(np.asarray(due)[~idle]) or stagger
    due = due_at(options, clock, 11)
    assert np.all(due)


def test_slices_of_an_idle_layer_on_two_devices():
    """Devices agree: a layer is idle where the slices of all of them are zero."""
    layers, params = tagged()[0].layers, tagged()[1]
    tx = kfac.scale_by_kfac(
        layers, damping=0.1, factor_decay=DECAY, axis_name=AXIS,
        reduction=kfac.Reduction("owner", devices=2, bucket=0),
    )  # fmt: skip
    state = tx.init(params)
    specs, whole = kfac.state_specs(state, AXIS), PartitionSpec()
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(
        jax.shard_map(
            lambda s, f: tx.update(grads, s, None, statistics=f)[1],
            mesh=mesh_of(AxisType.Auto, 2), in_specs=(specs, whole), out_specs=specs,
            check_vma=False,
        )
    )  # fmt: skip
    steps = [(0, names()), (1, ()), (2, names()), (3, ())]
    for seed, idle in steps:
        state = update(state, fresh(seed, idle))
    _, alone = played("cholesky", steps)
    np.testing.assert_array_equal(state.clock.refreshes, alone.clock.refreshes)
    owned = [t for t in layers if isinstance(state.factors[t.name][0], Slices)]
    assert {t.name for t in owned} & set(names())
    for layer in owned:
        found = whole_statistics(layer, state.factors[layer.name])
        for x, y in zip(found[:2], alone.factors[layer.name][:2], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
