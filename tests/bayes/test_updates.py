"""Steps of noisy K-FAC, VOGN and IVON against plain numpy, on one device and several.

The network, its gradients, its factors and its squares are written down by hand; so are
the algorithms, from the equations in the docstrings. Prior, temperature and damping are
powers of two, which float32 holds exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import kfac_jax_lite as kfac
from kfac_jax_lite.core.types import SquareStatistics
from tests.helpers import batches_of, cases, close, identical, leaves
from tests.parallel import AXIS, SPLIT, WHOLE, mesh_of
from tests.variational import (
    DATA,
    EXAMPLES,
    MODEL,
    OPTIONS,
    RATE,
    STEPS,
    ivon_steps,
    matrices,
    mean,
    noisy_steps,
    vogn_steps,
)

# ---------------------------------------------------------------- the library's


@functools.cache
def made(name, examples=EXAMPLES, axis_name=None):
    """Tagged loss and optimiser of a method."""
    statistics = "squares" if name == "vogn" else "factors"
    tagged, more = MODEL.tag(examples, statistics=statistics), dict(OPTIONS)
    more["axis_name"] = axis_name
    if name == "vogn":
        more |= {"damping": 2.0**-6, "momentum": 0.9, "decay": 0.8}
        return tagged, kfac.bayes.vogn(tagged.layers, DATA, RATE, **more)
    if name == "ivon":
        more |= {"initial": 0.5, "momentum": 0.9, "decay": 0.95}
        return tagged, kfac.bayes.ivon(DATA, RATE, **more)
    more |= {"damping": 2.0**-6, "momentum": 0.75, "kl_clip": 2.0**-6}
    more |= {"factor_decay": 0.5, "inverse": name}
    return tagged, kfac.bayes.noisy_kfac(tagged.layers, DATA, RATE, **more)


def step_of(tagged, tx, **options):
    """One step of a method."""

    def step(params, state, key, *batch):
        _, grads, statistics = kfac.bayes.value_and_grad(
            tagged, params, *batch, opt_state=state, key=key, **options
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(name, num_samples=1):
    """A compiled step of a method."""
    return jax.jit(step_of(*made(name), num_samples=num_samples))


def library_steps(name, num_samples, batches, keys):
    """Parameters after some steps."""
    (_, tx), step, params = made(name), compiled(name, num_samples), MODEL.params()
    state = tx.init(params)
    for batch, key in zip(batches, keys, strict=True):
        params, state = step(params, state, key, *batch)
    return params


ALGORITHMS = {
    "cholesky": functools.partial(noisy_steps, method="cholesky"),
    "eigh": functools.partial(noisy_steps, method="eigh"),
    "vogn": vogn_steps,
    "ivon": ivon_steps,
}
# K-FAC keeps the weights of its averages in float32.
TOLERANCE = {"cholesky": 1e-6, "eigh": 1e-6, "vogn": 1e-9, "ivon": 1e-9}
EVERY = [(name, n) for name in ALGORITHMS for n in (1, 3)]


@pytest.mark.parametrize(
    ("name", "num_samples"), cases(EVERY, [("cholesky", 1), ("vogn", 1), ("ivon", 1)])
)
def test_steps_are_those_of_the_paper(name, num_samples):
    batches = batches_of(MODEL, STEPS, EXAMPLES)
    keys = jax.random.split(jax.random.key(5), STEPS)
    params = library_steps(name, num_samples, batches, keys)
    plain = [(np.asarray(x), np.asarray(y)) for x, y in batches]
    wanted = ALGORITHMS[name](MODEL.params(), plain, keys, num_samples)
    close(matrices(params), wanted, TOLERANCE[name])
    # The noise matters: the mean alone goes elsewhere.
    other = library_steps(name, num_samples, batches, keys[::-1])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), other, params)
    assert min(jax.tree.leaves(moved)) > 1e-5


# ---------------------------------------------------------------- several samples


def odd_loss(p, x, y):
    """A network with a parameter that no rule covers."""
    return MODEL.loss(p["net"], x * (1 + jnp.sin(p["odd"]).sum()), y)


@pytest.mark.parametrize("fisher", cases(["empirical", "mc"], ["mc"]))
def test_samples_are_averaged_and_examples_of_diagonals_add_up(fisher):
    params = {"net": MODEL.params(), "odd": jnp.asarray([0.3, 0.1])}
    first, batch = batches_of(MODEL, 2, EXAMPLES)
    tagged = kfac.tag(odd_loss, params, *batch, fisher=fisher)
    tx = kfac.bayes.noisy_kfac(tagged.layers, DATA, RATE, **OPTIONS)
    key = jax.random.key(1)
    _, state = jax.jit(step_of(tagged, tx))(params, tx.init(params), key, *first)

    @jax.jit
    def together(params, state, key):
        run = functools.partial(kfac.bayes.value_and_grad, tagged, params, *batch)
        return run(opt_state=state, key=key, num_samples=3)

    @jax.jit
    def alone(params, state, key):
        of_weights, of_labels = jax.random.split(key)
        weights = kfac.bayes.sample(state, params, of_weights)
        found = tagged.value_and_grad(weights, *batch, opt_state=state, key=of_labels)
        return weights, found

    value, grads, statistics = together(params, state, key)
    weights, found = zip(
        *(alone(params, state, k) for k in jax.random.split(key, 3)), strict=True
    )
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(weights[left]["odd"] - weights[right]["odd"]).min() > 1e-4
    values, singles, parts = zip(*found, strict=True)
    close(value, mean(values))
    close(grads, mean(singles))
    wanted = mean(parts)
    wanted["odd"] = wanted["odd"]._replace(num_examples=jnp.float32(3 * EXAMPLES))
    close(statistics, wanted)


def test_aux_and_losses_that_are_not_tagged():
    """Aux is that of the last draw; ``ivon`` wants no layers, the others do."""

    def loss(p, x):
        return jnp.square(x @ p).mean(), {"weights": p}

    params, x, key = jnp.ones(3), jnp.ones((2, 3)), jax.random.key(0)
    state = kfac.bayes.ivon(10, 0.1).init(params)
    run = functools.partial(
        kfac.bayes.value_and_grad, loss, params, x, opt_state=state, key=key
    )
    (value, aux), grads, _ = run(num_samples=2, has_aux=True)
    last = kfac.bayes.sample(
        state, params, jax.random.split(jax.random.split(key, 2)[1])[0]
    )
    close(aux["weights"], last)
    assert value.shape == () and grads.shape == (3,)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        run(num_samples=0)
    tagged, tx = made("cholesky")
    with pytest.raises(TypeError, match="NoisyKFACState wants statistics of layers"):
        kfac.bayes.value_and_grad(
            MODEL.loss, MODEL.params(), *MODEL.batch(EXAMPLES),
            opt_state=tx.init(MODEL.params()), key=key,
        )  # fmt: skip


# ---------------------------------------------------------------- bad batches


@pytest.mark.parametrize(
    "name", cases(["cholesky", "ekfac", "vogn", "ivon"], ["cholesky", "vogn", "ivon"])
)
def test_a_batch_with_nan_changes_nothing(name):
    _, tx = made(name)
    step, params = compiled(name), MODEL.params()
    first, bad, last = batches_of(MODEL, 3, EXAMPLES)
    keys = jax.random.split(jax.random.key(2), 3)
    before = step(params, tx.init(params), keys[0], *first)
    after = step(*before, keys[1], bad[0].at[0, 0].set(jnp.nan), bad[1])
    identical(after[0], before[0])
    kept = [{k: v for k, v in leaves(s[1]).items() if "skipped" not in k}
            for s in (before, after)]  # fmt: skip
    identical(*kept)
    whole = step(*after, keys[2], *last)
    close(whole[0], step(*before, keys[2], *last)[0], 1e-12)


def seen_by(name, params):
    """Gradients, and statistics of the same size."""
    if name == "ivon":
        return params, kfac.bayes.ReparameterisedStatistics(params)
    blocks = {k: jnp.asarray(v) for k, v in matrices(params).items()}
    return params, {k: SquareStatistics(jnp.square(v)) for k, v in blocks.items()}


@pytest.mark.parametrize("name", ["vogn", "ivon"])
@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e200), ("float32", 1e30)])
@pytest.mark.parametrize("which", ["gradients", "statistics"])
def test_a_batch_whose_squared_norm_overflows_changes_nothing(name, dtype, size, which):
    """Each entry is finite, and so is the sum of all."""
    (_, tx), params = made(name), MODEL.params(jnp.dtype(dtype))
    good = seen_by(name, params)
    _, state = tx.update(good[0], tx.init(params), params, statistics=good[1])
    assert int(state.count) == 1
    place, bad = ("gradients", "statistics").index(which), list(good)
    bad[place] = jax.tree.map(lambda x: jnp.full_like(x, size), good[place])
    updates, after = tx.update(bad[0], state, params, statistics=bad[1])
    identical(optax.apply_updates(params, updates), params)
    identical(after, state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, after)))


def test_a_curvature_that_overflows_changes_nothing():
    """Of a batch that does not itself: ``½ (ĥ/2)² / h`` is 1e39, beyond float32."""
    params = {"w": jnp.ones(3, jnp.float32)}
    tx = kfac.bayes.ivon(DATA, RATE, initial=1e-4, decay=0.5, prior_precision=1e-6)
    state = tx.init(params)
    for size, count in ((1e18, 0), (1.0, 1)):
        new = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), params)
        statistics = kfac.bayes.ReparameterisedStatistics(new)
        _, after = tx.update(params, state, params, statistics=statistics)
        assert int(after.count) == count
        assert np.isfinite(after.hessian["w"]).all()


# ---------------------------------------------------------------- several devices

DEVICES = 2


def device_step(name, tagged, tx, shared, summed):
    """A step of one of several devices; draws its own weights unless ``shared``."""

    def step(params, state, key, *batch):
        _, grads, statistics = kfac.bayes.value_and_grad(
            tagged, params, *batch, opt_state=state, key=key,
            axis_name=None if shared else AXIS,
        )  # fmt: skip
        if summed and shared:  # replicated weights: autodiff has added them up
            grads = jax.tree.map(lambda g: g / jax.lax.axis_size(AXIS), grads)
        else:
            grads = jax.lax.pmean(grads, AXIS)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


def mapped(name, mode, shared):
    """The step of a mode, and how a batch is split; devices come back one by one."""
    tagged, tx = made(name, EXAMPLES // DEVICES, AXIS)
    step = device_step(name, tagged, tx, shared, mode == "checked")
    rows = functools.partial(
        jax.tree.map, lambda x: x.reshape(DEVICES, -1, *x.shape[1:])
    )
    if mode == "pmap":
        step = jax.pmap(
            step, AXIS, in_axes=(None, None, None, 0, 0),
            devices=jax.devices()[:DEVICES],
        )  # fmt: skip
        return step, tx, rows

    def run(*args):
        found = step(*args)
        return found if mode == "checked" else jax.tree.map(lambda x: x[None], found)

    run = jax.shard_map(
        run,
        mesh=mesh_of(AxisType.Auto, DEVICES),
        check_vma=mode == "checked",
        in_specs=(WHOLE, WHOLE, WHOLE, SPLIT, SPLIT),
        out_specs=WHOLE if mode == "checked" else SPLIT,
    )
    return jax.jit(run), tx, lambda batch: batch


def alone(name, batches, keys, shared):
    """The same by one device after the other."""
    tagged, tx = made(name, EXAMPLES // DEVICES)
    params = MODEL.params()
    state = tx.init(params)

    @jax.jit
    def one(params, state, key, *batch):
        run = functools.partial(kfac.bayes.value_and_grad, tagged, params, *batch)
        return run(opt_state=state, key=key)[1:]

    @jax.jit
    def update(params, state, grads, statistics):
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    for batch, key in zip(batches, keys, strict=True):
        halves = [
            one(
                params, state, key if shared else jax.random.fold_in(key, i),
                *(np.split(v, DEVICES)[i] for v in batch),
            )
            for i in range(DEVICES)
        ]  # fmt: skip
        params, state = update(params, state, *mean(halves))
    return params, state


METHODS = ("cholesky", "vogn", "ivon")
MODES = [(n, m, s) for n in METHODS for m in ("pmap", "shard_map", "checked")
         for s in (False, True)]  # fmt: skip
FAST_MODES = [("vogn", "shard_map", False), ("ivon", "checked", True)]


@pytest.mark.parametrize(("name", "mode", "shared"), cases(MODES, FAST_MODES))
def test_devices_are_the_mean_of_single_ones(name, mode, shared):
    """Noise of their own or the same: states stay equal, and are those of the mean."""
    step, tx, place = mapped(name, mode, shared)
    params = MODEL.params()
    state, batches = tx.init(params), batches_of(MODEL, 3, EXAMPLES)
    keys = jax.random.split(jax.random.key(3), 3)
    for batch, key in zip(batches, keys, strict=True):
        found = step(params, state, key, *place(batch))
        if mode != "checked":  # there the types say so
            first, second = (jax.tree.map(lambda x, i=i: x[i], found) for i in (0, 1))
            identical(jax.device_get(first), jax.device_get(second))
            found = first
        params, state = found
    wanted, wanted_state = alone(name, batches, keys, shared)
    close(jax.device_get(params), jax.device_get(wanted), 1e-7)
    ours, theirs = (posterior(name, s) for s in (state, wanted_state))
    close(jax.device_get(ours), jax.device_get(theirs), 1e-7)


def posterior(name, state):
    """The curvature in a state."""
    if name == "vogn":
        return state.squares
    return state.hessian if name == "ivon" else (state.kfac.factors, state.roots)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_jit_with_a_sharded_batch_is_one_device(name, kind):
    """Compiled for a mesh there is one program, one key, one draw."""
    tagged, tx = made(name)
    step, mesh = jax.jit(step_of(tagged, tx)), mesh_of(kind, DEVICES)
    params = MODEL.params()
    batches = batches_of(MODEL, 3, EXAMPLES)
    keys = jax.random.split(jax.random.key(3), 3)
    wanted = library_steps(name, 1, batches, keys)
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))  # noqa: E731
    state, params = put(tx.init(params), WHOLE), put(params, WHOLE)
    for batch, key in zip(batches, keys, strict=True):
        params, state = step(params, state, put(key, WHOLE), *put(batch, SPLIT))
    close(jax.device_get(params), jax.device_get(wanted), 1e-8)


def test_diagonals_on_several_devices():
    """The mean gradient of all draws, also of a square matrix; all examples count."""
    params = {"net": MODEL.params(), "odd": jnp.asarray([[0.3, 0.1], [0.2, -0.4]])}
    batch, n = MODEL.batch(EXAMPLES), EXAMPLES // DEVICES
    part = [v[:n] for v in batch]
    tagged = kfac.tag(odd_loss, params, *part)
    tx = kfac.bayes.noisy_kfac(tagged.layers, DATA, RATE, axis_name=AXIS, **OPTIONS)
    plain = kfac.bayes.noisy_kfac(tagged.layers, DATA, RATE, **OPTIONS)
    state, key = plain.init(params), jax.random.key(0)
    state = jax.jit(step_of(tagged, plain))(params, state, key, *part)[1]
    step = jax.shard_map(
        device_step("cholesky", tagged, tx, False, True),
        mesh=mesh_of(AxisType.Auto, DEVICES),
        in_specs=(WHOLE, WHOLE, WHOLE, SPLIT, SPLIT), out_specs=WHOLE,
    )  # fmt: skip
    _, after = jax.jit(step)(params, state, key, *batch)

    @jax.jit
    def one(key, *batch):
        weights = kfac.bayes.sample(state, params, jax.random.split(key)[0])
        return jax.grad(odd_loss)(weights, *batch)["odd"]

    keys = [jax.random.split(jax.random.fold_in(key, i), 1)[0] for i in range(DEVICES)]
    halves = [[v[i * n : (i + 1) * n] for v in batch] for i in range(DEVICES)]
    grads = [np.asarray(one(k, *h)) for k, h in zip(keys, halves, strict=True)]
    before = np.asarray(state.kfac.factors["odd"].gradient)
    weight = 0.05 / (0.95 * 0.05 + 0.05)
    fresh = EXAMPLES * np.square(sum(grads) / DEVICES)
    close(after.kfac.factors["odd"].gradient, before + weight * (fresh - before), 1e-6)
