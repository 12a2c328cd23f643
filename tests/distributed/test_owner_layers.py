"""Owners and what is unusual: dtypes, wrappers, failures, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from kfac_jax_lite.kronecker.state import from_words, words
from tests.helpers import cases, close, identical
from tests.parallel import AXIS, DEVICES, EXAMPLES, OWNER, mesh_of, split_rows

P = PartitionSpec
SHARES = cases(["inverses", "gradients"], ["inverses"])

pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices"),
]


def params(first=np.float64, second=np.float64):
    """Two dense layers, which may differ in dtype."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    values = {k: 0.4 * rng.normal(size=s) for k, s in shapes.items()}
    dtypes = {"1": first, "2": second}
    return {k: jnp.asarray(v, dtypes[k[1]]) for k, v in values.items()}


def loss(p, x, y):
    """A classifier."""
    hidden = jnp.tanh(x.astype(p["w1"].dtype) @ p["w1"] + p["b1"])
    logits = hidden.astype(p["w2"].dtype) @ p["w2"] + p["b2"]
    logits = kfac.categorical(logits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def batch(seed=0, examples=EXAMPLES):
    """Inputs and labels."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(examples, 4)), rng.integers(0, 3, examples)
    return jnp.asarray(x), jnp.asarray(y)


def transformation(layers, **options):
    """Plain K-FAC."""
    return kfac.kfac(layers, 0.05, damping=0.01, momentum=None, **options)


def single(make, tree, steps, model=False):
    """Parameters, state and layers after some steps on one device."""
    tagged = kfac.tag(loss, tree, *batch())
    tx = make(tagged.layers)
    step, state = jax.jit(functools.partial(one_step, tagged, tx, model)), tx.init(tree)
    for seed in range(steps):
        tree, state = step(tree, state, *batch(seed))
    return tree, state, tagged.layers


def one_step(tagged, tx, model, tree, state, x, y, mapped=False):
    """A step, on one device or on one of several."""
    _, grads, statistics = tagged.value_and_grad(tree, x, y, opt_state=state)
    grads = jax.lax.pmean(grads, AXIS) if mapped else grads
    more = {"model": kfac.quadratic_model(tagged, tree, x, y)} if model else {}
    updates, state = tx.update(grads, state, tree, statistics=statistics, **more)
    return optax.apply_updates(tree, updates), state


def pmapped(make, tree, steps, reduction):
    """The same over eight devices."""
    tagged = kfac.tag(loss, tree, *batch(examples=EXAMPLES // DEVICES))
    tx = make(tagged.layers, axis_name=AXIS, reduction=reduction)
    state = tx.init(tree)
    axes, step = kfac.state_axes(state), functools.partial(one_step, mapped=True)
    run = jax.pmap(
        functools.partial(step, tagged, tx, False), AXIS,
        in_axes=(None, axes, 0, 0), out_axes=(None, axes),
    )  # fmt: skip
    for seed in range(steps):
        parts = jax.tree.map(split_rows(DEVICES), batch(seed))
        tree, state = run(tree, state, *parts)
    return jax.device_get(tree), state


@pytest.mark.parametrize("share", SHARES)
def test_layers_of_different_dtypes(share):
    """Parcels of all layers leave an owner in one array."""
    tree = params(np.float32, np.float64)
    wanted, state, layers = single(kfac_alone, tree, 3)
    seen, spread = pmapped(kfac_alone, tree, 3, OWNER(share=share))
    assert {k: v.dtype for k, v in seen.items()} == {
        k: v.dtype for k, v in tree.items()
    }
    close(seen, wanted, 1e-5)
    spread = kfac.relayout(spread, state, layers)
    close(spread.inverses, jax.device_get(state.inverses), 1e-5)


def kfac_alone(layers, **options):
    """Preconditioning only."""
    return kfac.scale_by_kfac(layers, damping=0.01, **options)


def sharded(make, tree, steps, reduction, model=False):
    """The same under ``jit`` with a sharded batch."""
    tagged = kfac.tag(loss, tree, *batch())
    tx = make(tagged.layers, axis_name=AXIS, reduction=reduction)
    state = tx.init(tree)
    state = placed(state, reduction.mesh)
    tree = jax.device_put(tree, NamedSharding(reduction.mesh, P()))
    step = jax.jit(functools.partial(one_step, tagged, tx, model))
    for seed in range(steps):
        rows = jax.device_put(batch(seed), NamedSharding(reduction.mesh, P(AXIS)))
        tree, state = step(tree, state, *rows)
    assert step._cache_size() == 1
    return jax.device_get(tree), state


def placed(state, mesh):
    """A state on its devices."""
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), kfac.state_specs(state, AXIS)
    )
    return jax.device_put(state, shardings)


def chosen_steps(layers, **options):
    """Learning rate, momentum and damping chosen by the quadratic model."""
    damping = kfac.damping.levenberg_marquardt(0.1)
    return kfac.kfac(layers, "auto", damping=damping, **options)


@pytest.mark.parametrize("mode", cases(["all", "owner"], ["owner"]))
def test_chosen_steps_under_jit(mode):
    """The names of ``Reduction.mesh`` are no mapped axes outside the inversions."""
    reduction = kfac.Reduction(mode, bucket=0, mesh=mesh_of(AxisType.Auto))
    wanted, state, _ = single(chosen_steps, params(), 3, model=True)
    seen, spread = sharded(chosen_steps, params(), 3, reduction, model=True)
    close(seen, wanted, 1e-8)
    close(spread.damping, state.damping, 1e-6)


@pytest.mark.parametrize("mode", ["all", "owner"])
def test_bytes_of_large_stacks(mode):
    """More than 32 bits can count; nothing is allocated but the counters."""
    shape = jax.ShapeDtypeStruct
    tree = {"w": shape((24, 6400, 6400), jnp.float32)}

    def stacked(p, x):
        rows, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        return rows.mean()

    tagged = kfac.tag(stacked, tree, shape((8, 6400), jnp.float32))
    reduction = kfac.Reduction(mode, devices=DEVICES)
    tx = kfac.scale_by_kfac(tagged.layers, axis_name=AXIS, reduction=reduction)
    assert jax.eval_shape(tx.init, tree).clock.bytes.shape == (2, 1)


def test_words():
    """Numbers of up to 61 bits, exactly."""
    numbers = [0, 7, 2**30 - 1, 2**30, 3_932_774_400, 2**61 - 1]
    assert from_words(words(numbers)) == numbers
    state = single(kfac_alone, params(), 1)[1]
    clock = state.clock._replace(bytes=words([3_932_774_400, 5]))
    first, second = kfac.report(state._replace(clock=clock))
    assert (first["bytes_reduced"], second["bytes_reduced"]) == (3_932_774_400, 5)


def halves(layers, **options):
    """Two optimisers; one layer's weight is in one, its bias in the other."""
    return optax.partition(
        {"z": kfac_alone(layers, **options), "a": kfac_alone(layers, **options)},
        {"w1": "z", "b1": "a", "w2": "a", "b2": "a"},
    )


@pytest.mark.parametrize("share", SHARES)
def test_masked_layers(share):
    """Parts of layers have factors, and layouts, of their own."""
    wanted, state, layers = single(halves, params(), 3)
    seen, spread = pmapped(halves, params(), 3, OWNER(share=share))
    close(seen, wanted, 1e-8)
    back = kfac.relayout(spread, state, layers)
    for name in "za":
        one, two = (s.inner_states[name].inner_state for s in (back, state))
        close(one.factors, jax.device_get(two.factors), 1e-8)
        close(one.inverses, jax.device_get(two.inverses), 1e-8)
    there = kfac.relayout(back, spread, layers)
    close(there, jax.device_get(spread), 1e-12)


def test_relayout_refuses_what_does_not_fit():
    """Other shapes, another method, another number of states."""
    tree = params()
    layers = kfac.tag(loss, tree, *batch()).layers
    wide = tree | {"w1": jnp.zeros((4, 9)), "b1": jnp.zeros(9), "w2": jnp.zeros((9, 3))}
    others = kfac.tag(loss, wide, *batch()).layers
    state = kfac_alone(layers).init(tree)
    with pytest.raises(ValueError, match=r"factors.*shape \(5, 5\), wanted \(9, 9\)"):
        kfac.relayout(state, kfac_alone(others).init(wide), layers)
    owner = {"axis_name": AXIS, "reduction": OWNER()}
    spread = kfac_alone(others, **owner).init(wide)
    with pytest.raises(ValueError, match="layer w1 has slices"):
        kfac.relayout(spread, state, layers)
    with pytest.raises(ValueError, match=r"only opt_state has .inverses"):
        kfac.relayout(state, kfac_alone(layers, inverse="eigh").init(tree), layers)
    with pytest.raises(ValueError, match="holds 1 KFACStates, like 2"):
        kfac.relayout(state, halves(layers).init(tree), layers)


def with_momentum(layers, **options):
    """Trust region and momentum: their numbers are wider than bfloat16."""
    return kfac.kfac(layers, 0.05, damping=0.01, **options)


@pytest.mark.slow
@pytest.mark.parametrize("second", [jnp.bfloat16, np.float32])
def test_narrow_parameters(second):
    """No step changes a dtype of the state, momentum's included."""
    tree = params(jnp.bfloat16, second)
    wanted, state, _ = single(with_momentum, tree, 2)
    seen, spread = pmapped(with_momentum, tree, 2, OWNER(share="gradients"))
    for result in (state, spread):
        momentum = jax.tree.map(lambda x: x.dtype, result.tail[1].trace)
        assert momentum == {k: x.dtype for k, x in tree.items()}
    close(seen, wanted, 2e-2)


KINDS = [None, AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("kind", cases(KINDS, [None]))
def test_a_step_without_statistics(kind):
    """Outside ``jit``, where it is known that nothing is due; alone and with owners."""
    tree, options = params(), {"interval": kfac.intervals.every(2)}
    tagged = kfac.tag(loss, tree, *batch())
    wanted = without_statistics(kfac_alone(tagged.layers, **options), tagged, tree)
    if kind is not None:
        reduction = kfac.Reduction("owner", bucket=0, mesh=mesh_of(kind))
        options |= {"axis_name": AXIS, "reduction": reduction}
        tx = kfac_alone(tagged.layers, **options)
        close(without_statistics(tx, tagged, tree, reduction.mesh), wanted, 1e-10)


def without_statistics(tx, tagged, tree, mesh=None):
    """The second update, at which nothing is due; as if it were given statistics."""
    state = tx.init(tree)
    grads, statistics = jax.jit(tagged.value_and_grad)(tree, *batch())[1:]
    if mesh:
        state = placed(state, mesh)
        whole = NamedSharding(mesh, P())
        grads, statistics = jax.device_put((grads, statistics), whole)
    with pytest.raises(ValueError, match="update needs statistics"):
        tx.update(grads, state)
    update = jax.jit(lambda g, s, x: tx.update(g, s, statistics=x))
    _, state = update(grads, state, statistics)
    seen = jax.device_get(tx.update(grads, state)[0])
    close(seen, jax.device_get(update(grads, state, statistics)[0]), 1e-10)
    return seen


def test_another_number_of_devices():
    """The state is made for as many devices as ``Reduction`` says."""
    tree, halved = params(), batch(examples=2)
    tx = kfac_alone(
        kfac.tag(loss, tree, *halved).layers, axis_name=AXIS, reduction=OWNER()
    )
    state = tx.init(tree)
    statistics, specs = tagged_statistics(tree, halved), kfac.state_specs(state, AXIS)
    update = jax.shard_map(
        lambda g, s, x: tx.update(g, s, statistics=x), mesh=mesh_of(AxisType.Auto, 4),
        in_specs=(P(), specs, P()), out_specs=(P(), specs),
    )  # fmt: skip
    with pytest.raises(ValueError, match="Reduction.devices must be the size"):
        update(tree, state, statistics)


def tagged_statistics(tree, rows):
    """Statistics of one batch."""
    return jax.jit(kfac.tag(loss, tree, *rows).value_and_grad)(tree, *rows)[2]


def test_a_bad_batch_and_a_failed_factorisation():
    """Both are seen by all devices, whichever device or owner met them."""
    tree = params()
    tagged = kfac.tag(loss, tree, *batch(examples=EXAMPLES // DEVICES))
    tx = kfac_alone(tagged.layers, axis_name=AXIS, reduction=OWNER(share="gradients"))
    state, mesh = tx.init(tree), mesh_of(AxisType.Auto)

    def step(state, x, y, case):
        _, grads, statistics = tagged.value_and_grad(tree, x, y, opt_state=state)
        grads = jax.tree.map(lambda g: g / DEVICES, grads)
        here = (case == 1) & (jax.lax.axis_index(AXIS) == 3)
        a = statistics["w1"].a
        a = jnp.where(case == 2, -100 * jnp.eye(5), jnp.where(here, jnp.nan, a))
        statistics = statistics | {"w1": statistics["w1"]._replace(a=a)}
        return tx.update(grads, state, statistics=statistics)

    specs = kfac.state_specs(state, AXIS)
    run = jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(specs, P(AXIS), P(AXIS), P()), out_specs=(P(), specs)
    ))  # fmt: skip
    _, before = run(placed(state, mesh), *batch(), 0)
    updates, after = run(before, *batch(1), 1)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    assert after.skipped == 1
    identical(after._replace(skipped=before.skipped), before)
    _, clean = run(after, *batch(1), 0)
    identical(clean._replace(skipped=before.skipped), run(before, *batch(1), 0)[1])
    _, failed = run(clean, *batch(2), 2)
    assert failed.clock.failures.tolist() == [1, 0]
    identical(failed.inverses["w1"], clean.inverses["w1"])
    assert jnp.any(failed.inverses["w2"].g != clean.inverses["w2"].g)


def odd(p, tokens, image):
    """Embedding, stacked, batched, grouped, bias-free and 1 × 1 layers."""
    hidden = p["table"][tokens] + p["shift"]
    body = lambda h, w: (jnp.tanh(h @ w["w"] + w["b"]), None)  # noqa: E731
    hidden, _ = jax.lax.scan(body, hidden, p["stack"])
    hidden = jnp.einsum("bei,eio->beo", hidden.reshape(-1, 2, 3), p["experts"])
    mixed = jax.lax.conv_general_dilated(
        image, p["conv"], (1,), "VALID", feature_group_count=2,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip
    return jnp.sin(hidden).mean() + jnp.sin(jnp.tanh(mixed) @ p["one"]).mean()


@pytest.mark.parametrize("limit", [3, pytest.param(8192, marks=pytest.mark.slow)])
def test_odd_layers(limit, rng):
    """Every form of factor and every leading axis, against one device."""
    shapes = {
        "table": (7, 6), "shift": (6,), "stack": {"w": (3, 6, 6), "b": (3, 6)},
        "experts": (2, 3, 3), "conv": (2, 1, 4), "one": (4, 1),
    }  # fmt: skip
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    tree = jax.tree.map(
        lambda s: jnp.asarray(0.4 * rng.normal(size=s)), shapes, is_leaf=is_shape
    )
    data = jnp.asarray(rng.integers(0, 7, 4)), jnp.asarray(rng.normal(size=(4, 3, 2)))
    tagged = kfac.tag(odd, tree, *data, num_examples=4, max_factor_dim=limit)
    grads, statistics = jax.jit(tagged.value_and_grad)(tree, *data)[1:]
    alone = kfac_alone(tagged.layers)
    update = jax.jit(lambda g, s, x: alone.update(g, s, statistics=x))
    wanted, state = update(grads, alone.init(tree), statistics)
    tx = kfac_alone(tagged.layers, axis_name=AXIS, reduction=OWNER(devices=3))
    spread = tx.init(tree)
    specs = kfac.state_specs(spread, AXIS)
    run = jax.shard_map(
        lambda g, s, x: tx.update(g, s, statistics=x), mesh=mesh_of(AxisType.Auto, 3),
        in_specs=(P(), specs, P()), out_specs=(P(), specs),
    )  # fmt: skip
    seen, spread = jax.jit(run)(grads, spread, statistics)
    close(jax.device_get(seen), jax.device_get(wanted), 1e-8)
    back = kfac.relayout(spread, state, tagged.layers)
    close(back.factors, jax.device_get(state.factors), 1e-12)
