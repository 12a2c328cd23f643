"""The contract every transformation keeps, whatever is inside."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests.helpers import (
    INVERSES,
    TRANSFORMS,
    batches_of,
    cases,
    close,
    first_pass,
    identical,
    kfac_state,
    leaves,
    train,
    train_step,
)
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]
CASES = [("kfac", inverse) for inverse in INVERSES] + [("scale_by_kfac", "cholesky")]


@pytest.fixture(params=CASES, ids="-".join)
def tx(request):
    """A transformation for the small network."""
    name, inverse = request.param
    return TRANSFORMS[name](
        first_pass("mlp")[0].layers,
        inverse=inverse,
        damping=0.01,
        interval=kfac.intervals.staleness(0.3),
        inverse_interval=2,
    )


def long(*fast):
    """All transformations, of which the fast suite runs some."""
    return pytest.mark.parametrize(
        "tx",
        cases([(case,) for case in CASES], [(CASES[i],) for i in fast]),
        ids="-".join,
        indirect=True,
    )


def short(tx, params=None, **options):
    """Three steps on three batches."""
    tagged = first_pass("mlp")[0]
    params = MODEL.params() if params is None else params
    return train(tagged, tx, params, batches_of(MODEL, 3), **options)


@long(5)
def test_jit_is_eager(tx):
    jitted = short(tx)
    with jax.disable_jit():
        close(jitted, short(tx, wrap=lambda step: step), 1e-8)


def test_no_second_compilation(tx):
    calls = collections.Counter()

    def counted(step):
        def run(*args):
            calls["traced"] += 1
            return step(*args)

        return jax.jit(run)

    short(tx, wrap=counted)
    assert calls["traced"] == 1


def test_state_keeps_structure_shapes_and_dtypes(tx):
    params = MODEL.params()
    before = tx.init(params)
    after = short(tx)[1]
    chex.assert_trees_all_equal_structs(before, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    weak = [leaf for leaf in jax.tree.leaves(before) if leaf.weak_type]
    assert not weak


def test_state_is_arrays_only(tx):
    for leaf in jax.tree.leaves(tx.init(MODEL.params())):
        assert isinstance(leaf, jax.Array)


def test_abstract_init(tx):
    params = MODEL.params()
    abstract = jax.eval_shape(tx.init, params)
    concrete = tx.init(params)
    chex.assert_trees_all_equal_structs(abstract, concrete)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)


@long(2, 5)
def test_foreign_extra_arguments_are_ignored(tx):
    tagged, params = first_pass("mlp")[0], MODEL.params()
    state = tx.init(params)
    run = jax.jit(tagged.value_and_grad)
    _, grads, statistics = run(params, *MODEL.batch(4), opt_state=state)
    foreign = {"value": 1.0, "value_fn": None, "other": "x"}

    def update(grads, state, statistics, **more):
        return tx.update(grads, state, params, statistics=statistics, **more)

    plain = jax.jit(update)(grads, state, statistics)
    more = jax.jit(functools.partial(update, **foreign))(grads, state, statistics)
    identical(plain, more)


@pytest.mark.parametrize("name", cases(TRANSFORMS, ["kfac"]))
@pytest.mark.parametrize("inverse", INVERSES)
def test_bfloat16(name, inverse):
    """Updates in the parameters' precision, factors and inverses in float32."""
    params = MODEL.params(jnp.bfloat16)
    tagged = MODEL.tag(4, jnp.bfloat16)
    tx = TRANSFORMS[name](tagged.layers, inverse=inverse)
    batches = batches_of(MODEL, 2, dtype=jnp.bfloat16)
    new, state, _ = train(tagged, tx, params, batches)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert all(np.isfinite(np.float32(v)).all() for v in jax.tree.leaves(new))
    held = kfac_state(state)
    for part in (held.factors, held.inverses, held.previous):
        assert {v.dtype for v in jax.tree.leaves(part)} <= {jnp.dtype("float32")}


def test_float32_stays_float32_with_strict_promotion():
    """No dtype is promoted behind the user's back, even with x64 on."""
    params = MODEL.params(jnp.float32)
    tagged = MODEL.tag(4, jnp.float32)
    tx = kfac.scale_by_kfac(tagged.layers, damping=0.01)
    batches = batches_of(MODEL, 2, dtype=jnp.float32)
    new, state, _ = train(tagged, tx, params, batches)
    for leaf in [*jax.tree.leaves(new), *jax.tree.leaves(state)]:
        assert leaf.dtype != jnp.float64


# ---------------------------------------------------------------- program transforms


@long(2, 5)
def test_scan_over_steps(tx):
    tagged, params = first_pass("mlp")[0], MODEL.params()
    step = train_step(tagged, tx)

    @jax.jit
    def run(params, state, batches):
        def body(carry, batch):
            params, state, loss = step(*carry, *batch)
            return (params, state), loss

        return jax.lax.scan(body, (params, state), batches)

    stacked = jax.tree.map(lambda *b: jnp.stack(b), *batches_of(MODEL, 3))
    (new, state), losses = run(params, tx.init(params), stacked)
    close((new, state, list(losses)), short(tx), 1e-8)


@pytest.mark.parametrize("inverse", cases(INVERSES, ["cholesky"]))
def test_vmap_over_damping_and_learning_rate(inverse):
    tagged, params = first_pass("mlp")[0], MODEL.params()
    batches = batches_of(MODEL, 2)

    def run(damping, rate):
        tx = kfac.kfac(tagged.layers, rate, damping=damping, inverse=inverse)
        step, state, p = train_step(tagged, tx), tx.init(params), params
        for batch in batches:
            p, state, loss = step(p, state, *batch)
        return p, loss

    grid = jnp.array([1e-3, 1e-1, 1.0]), jnp.array([0.1, 0.2, 0.3])
    together = jax.jit(jax.vmap(run))(*grid)
    for i, values in enumerate(zip(*grid, strict=True)):
        alone = jax.jit(run)(*values)
        close(jax.tree.map(lambda v, i=i: v[i], together), alone, 1e-7)


@long(2, 5)
def test_donated_buffers(tx):
    tagged, wanted = first_pass("mlp")[0], short(tx)
    step = jax.jit(train_step(tagged, tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, MODEL.params())
    state = tx.init(params)
    for batch in batches_of(MODEL, 3):
        params, state, _ = step(params, state, *batch)
    close((params, state), wanted[:2], 1e-10)


def test_init_makes_distinct_buffers(tx):
    """Donation needs every leaf to own its memory."""
    state = tx.init(MODEL.params())
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)
                if leaf.size]  # fmt: skip
    assert len(pointers) == len(set(pointers))


# ---------------------------------------------------------------- composition


@long(2, 5)
def test_chain(tx):
    chained = optax.chain(optax.identity(), tx, optax.identity())
    params, state, _ = short(chained)
    close(params, short(tx)[0], 1e-10)
    assert int(kfac_state(state).count) == 3


def test_inject_hyperparams():
    layers = first_pass("mlp")[0].layers
    make = optax.inject_hyperparams(kfac.kfac)
    tx = make(layers, learning_rate=0.05, damping=0.01)
    plain = kfac.kfac(layers, 0.05, damping=0.01)
    close(short(tx)[0], short(plain)[0], 1e-6)

    tagged, params, (batch,) = first_pass("mlp")[0], MODEL.params(), [MODEL.batch(4)]
    state = tx.init(params)
    state.hyperparams["damping"] = jnp.asarray(0.5)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    seen = train_step(tagged, tx)(params, state, *batch)[0]
    other = kfac.kfac(layers, 0.2, damping=0.5)
    close(seen, train(tagged, other, params, [batch])[0], 1e-6)


def test_inject_schedules():
    layers = first_pass("mlp")[0].layers
    schedule = optax.exponential_decay(0.1, 1, 0.5)
    tx = optax.inject_hyperparams(kfac.kfac)(layers, schedule, damping=0.01)
    plain = kfac.kfac(layers, schedule, damping=0.01, kl_clip=1e-3)
    close(short(tx)[0], short(plain)[0], 1e-6)


def test_multi_steps():
    """Two equal micro-batches are one step; no step is made in between."""
    tagged, params, batches = first_pass("mlp")[0], MODEL.params(), batches_of(MODEL, 3)
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.01)
    # optax accumulates in float32 unless told otherwise.
    multi = optax.MultiSteps(tx, 2, accumulator_dtype=jnp.float64)
    doubled = [batch for batch in batches for _ in range(2)]
    seen, state, _ = train(tagged, multi, params, doubled)
    wanted, plain_state, _ = train(tagged, tx, params, batches)
    close(seen, wanted, 1e-8)
    close(kfac_state(state).factors, kfac_state(plain_state).factors, 1e-8)
    assert int(kfac_state(state).count) == 3


def test_apply_if_finite():
    tagged = first_pass("mlp")[0]
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.01)
    close(short(optax.apply_if_finite(tx, 3))[0], short(tx)[0], 1e-10)


def label(params):
    """Labels: the first layer by K-FAC, the rest by another optimiser."""
    paths = leaves(params)
    flat = ["kfac" if "layer0" in path else "adam" for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def test_partition():
    """K-FAC on some parameters, Adam on the rest: each as if it were alone."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    make = {
        "kfac": kfac.scale_by_kfac(tagged.layers, damping=0.01),
        "adam": optax.scale_by_adam(),
    }
    tx = optax.partition(make, label)
    _, grads, statistics = tagged.value_and_grad(params, *MODEL.batch(4))
    update = jax.jit(lambda g, s: tx.update(g, tx.init(params), params, statistics=s))
    updates, state = update(grads, statistics)
    for name, inner in make.items():
        alone, _ = inner.update(
            grads, inner.init(params), params,
            **({"statistics": statistics} if name == "kfac" else {}),
        )  # fmt: skip
        layer = "layer0" if name == "kfac" else "layer1"
        close(updates[layer], alone[layer], 1e-10)
    assert int(kfac_state(state).count) == 1
    close(train(tagged, tx, params, [MODEL.batch(4)])[0]["layer1"],
          optax.apply_updates(params, updates)["layer1"], 1e-10)  # fmt: skip


def test_masked():
    """Gradients of masked parameters pass through."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    inner = kfac.scale_by_kfac(tagged.layers, damping=0.01)
    mask = jax.tree.map(lambda name: name == "kfac", label(params))
    tx = optax.masked(inner, mask)
    _, grads, statistics = tagged.value_and_grad(params, *MODEL.batch(4))
    updates, _ = tx.update(grads, tx.init(params), params, statistics=statistics)
    alone, _ = inner.update(grads, inner.init(params), params, statistics=statistics)
    close(updates["layer0"], alone["layer0"], 1e-10)
    close(updates["layer1"], grads["layer1"], 1e-12)


def test_state_is_found_inside_any_wrapper():
    """Due flags inside chain, partition and MultiSteps are read by the tagged loss."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    interval = kfac.intervals.every(100)
    tx = kfac.scale_by_kfac(tagged.layers, interval=interval)
    wrapped = optax.MultiSteps(
        optax.chain(optax.partition({"kfac": tx}, "kfac"), optax.scale(-0.1)), 1
    )
    batch = MODEL.batch(4)
    _, state, _ = train(tagged, wrapped, params, [batch])
    *_, statistics = jax.jit(tagged.value_and_grad)(params, *batch, opt_state=state)
    assert all(not np.asarray(v).any() for v in jax.tree.leaves(statistics))


def test_two_states_share_statistics():
    """A layer is due as soon as one of the states wants it."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    every = kfac.intervals.every
    first, second = (
        kfac.scale_by_kfac(tagged.layers, interval=every(n), damping=1.0)
        for n in (2, 3)
    )
    batches = batches_of(MODEL, 3)
    _, (held, _), _ = train(tagged, optax.chain(first, second), params, batches)
    assert int(held.clock.refreshes[0]) == 2  # at the first and at the third step
    both = optax.chain(first, second)
    state, history = both.init(params), []
    run, update = jax.jit(tagged.value_and_grad), jax.jit(both.update)
    for batch in batches:
        _, grads, statistics = run(params, *batch, opt_state=state)
        history.append(statistics)
        updates, state = update(grads, state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
    assert np.asarray(history[2]["layer0"].a).any()


def test_state_without_kfac_is_refused():
    tagged, params = first_pass("mlp")[0], MODEL.params()
    with pytest.raises(ValueError, match="KFACState"):
        tagged.value_and_grad(
            params, *MODEL.batch(4), opt_state=optax.adam(0.1).init(params)
        )
