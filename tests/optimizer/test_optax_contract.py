"""What optax's own tests ask of an optimiser, asked of ours with a network behind it.

Optax's and flax's tests themselves run with K-FAC in `tests/peers`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import (
    INVERSES,
    batches_of,
    cases,
    close,
    first_pass,
    identical,
    kfac_state,
    train,
    train_step,
)
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]
every = pytest.mark.parametrize("inverse", cases(INVERSES, ["ekfac"]))


def layers():
    return first_pass("mlp")[0].layers


# ---------------------------------------------------------------- mapping the state

WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@every
def test_map_params_changes_copies_of_the_parameters_only(inverse, wrapper):
    """Here the momentum: statistics are no parameters."""
    tx = WRAPPERS[wrapper](kfac.kfac(layers(), 0.05, inverse=inverse))
    state = tx.init(MODEL.params())
    seen = []

    def mark(leaf):
        seen.append(leaf.shape)
        return leaf + 1

    mapped = optax.tree.map_params(tx, mark, state)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(MODEL.params()))
    copies = len(seen) // len(shapes)
    assert sorted(seen) == sorted(shapes * copies) and copies == 1 + (
        wrapper == "multi_steps"
    )
    identical(kfac_state(mapped), kfac_state(state))
    trace = optax.tree.get(mapped, "trace")
    identical(trace, jax.tree.map(jnp.ones_like, MODEL.params()))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: kfac.scale_by_kfac(t, packed=True),
        lambda t: kfac.kfac(t, 0.1, damping=kfac.damping.adaptive()),
        lambda t: kfac.kfac(t, "auto", damping=kfac.damping.levenberg_marquardt(0.1)),
        lambda t: optax.inject_hyperparams(kfac.kfac)(t, learning_rate=0.1),
    ],
    ids=["packed", "adaptive", "auto", "inject"],
)
def test_map_params_makes_specs(make):
    """One spec per parameter, another for whatever is none: the use in optax's docs."""
    tx, params = make(layers()), MODEL.params()
    state, sharded, whole = tx.init(params), PartitionSpec("x"), PartitionSpec()
    specs = optax.tree.map_params(
        tx,
        lambda leaf, spec: spec,
        state,
        jax.tree.map(lambda _: sharded, params),
        transform_non_params=lambda _: whole,
    )
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(state)
    held = kfac_state(specs)
    assert {s for s in jax.tree.leaves(held, is_leaf=is_spec)} == {whole}


def test_parameters_that_are_no_placeholder_are_still_refused():
    tx = kfac.scale_by_kfac(layers())
    for tree in ({}, (), None, {"layer0": {}}):
        with pytest.raises(ValueError, match="layer0"):
            tx.init(tree)


# ---------------------------------------------------------------- shapes and dtypes


@every
def test_init_takes_shapes(inverse):
    """``init`` of ``ShapeDtypeStruct``s, without ``eval_shape``."""
    tx = kfac.scale_by_kfac(layers(), inverse=inverse)
    abstract = jax.eval_shape(MODEL.params)
    identical(tx.init(abstract), tx.init(MODEL.params()))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("inverse", cases(INVERSES, ["cholesky"]))
def test_a_step_may_be_left_out(inverse, dtype):
    """Both branches of a conditional have one type: updated, and as it was."""
    params, tagged = MODEL.params(dtype), MODEL.tag(4, dtype)
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.01, inverse=inverse)
    step, state = train_step(tagged, tx), tx.init(params)
    batch = MODEL.batch(4, dtype)

    @jax.jit
    def perhaps(flag, params, state):
        take = lambda p, s: step(p, s, *batch)[:2]  # noqa: E731
        return jax.lax.cond(flag, take, lambda p, s: (p, s), params, state)

    left = perhaps(jnp.asarray(False), params, state)
    identical(left, (params, state))
    new, after = perhaps(jnp.asarray(True), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (new, after))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight host devices")
@pytest.mark.parametrize("inverse", cases(INVERSES, ["cholesky"]))
def test_types_with_explicit_sharding(inverse):
    """On an explicit mesh ``init`` and ``update``, jitted or not, agree in type."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05, inverse=inverse)
    statistics = first_pass("mlp")[-1]
    if inverse == "ekfac":
        statistics = first_pass("mlp", inverse="ekfac")[-1]

    def types(tree):
        return jax.tree.map(jax.typeof, tree)

    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec())
        params, statistics = jax.device_put((params, statistics), whole)
        state = tx.init(params)
        assert types(state) == types(jax.jit(tx.init)(params))
        update = jax.jit(tx.update)
        updates, after = update(params, state, params, statistics=statistics)
        assert types(after) == types(state) and types(updates) == types(params)


# ---------------------------------------------------------------- hyper-parameters

INJECTED = {
    "learning_rate": 0.1,
    "damping": 0.05,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "factor_decay": 0.8,
    "inverse_interval": 2,
}


@every
def test_everything_numeric_may_be_injected(inverse):
    """Updates and states are those of the same numbers given at once."""
    tagged, params, batches = first_pass("mlp")[0], MODEL.params(), batches_of(MODEL, 3)
    plain = kfac.kfac(tagged.layers, inverse=inverse, kl_clip=None, **INJECTED)
    tx = optax.inject_hyperparams(kfac.kfac)(
        tagged.layers, inverse=inverse, kl_clip=None, **INJECTED
    )
    wanted = train(tagged, plain, params, batches)
    seen = train(tagged, tx, params, batches)
    assert set(INJECTED) <= set(seen[1].hyperparams)
    close(seen[0], wanted[0], 1e-5)
    close(seen[1].inner_state.tail, wanted[1].tail, 1e-4)
    inner, given = kfac_state(seen[1]), kfac_state(wanted[1])
    close(inner.factors, given.factors, 1e-5)
    assert inner.clock.inversions.tolist() == given.clock.inversions.tolist()


def test_a_constant_schedule_is_its_number():
    tagged, params, batches = first_pass("mlp")[0], MODEL.params(), batches_of(MODEL, 3)
    number = kfac.kfac(tagged.layers, 0.05, damping=0.1, momentum=0.9, kl_clip=1e-3)
    constant = optax.constant_schedule
    schedule = kfac.kfac(
        tagged.layers,
        constant(0.05),
        damping=constant(0.1),
        momentum=constant(0.9),
        kl_clip=constant(1e-3),
    )
    runs = [train(tagged, tx, params, batches)[0] for tx in (number, schedule)]
    close(*runs, 1e-6)


# ---------------------------------------------------------------- what it comes to


@pytest.mark.parametrize("inverse", cases(INVERSES, ["eigh", "newton_schulz"]))
def test_large_damping_is_gradient_descent(inverse):
    """``η λ (F + λ I)⁻¹ g → η g``: with the rate ``η λ``, SGD with momentum."""
    tagged, params, batches = first_pass("mlp")[0], MODEL.params(), batches_of(MODEL, 3)
    limit = 1e12
    tx = kfac.kfac(
        tagged.layers, 0.1 * limit, damping=limit, kl_clip=None, inverse=inverse
    )
    sgd = optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    step, state, wanted = jax.jit(jax.grad(tagged.loss_fn)), sgd.init(params), params
    for batch in batches:
        updates, state = sgd.update(step(wanted, *batch), state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    close(train(tagged, tx, params, batches)[0], wanted, 1e-4)


@pytest.mark.parametrize("inverse", cases(INVERSES, ["cholesky"]))
def test_least_squares_in_one_step(inverse, rng):
    """A linear model with normal outputs: the Fisher is exact, a step is Newton's."""
    x, w = rng.normal(size=(32, 5)), rng.normal(size=(5, 3))
    y = x @ w + 0.1 * rng.normal(size=(32, 3))

    def loss(w, x, y):
        mean = kfac.normal(x @ w)
        return 0.5 * jnp.square(mean - y).sum(-1).mean()

    start = jnp.asarray(rng.normal(size=(5, 3)))
    tagged = kfac.tag(loss, start, x, y, fisher="exact")
    tx = kfac.kfac(
        tagged.layers, 1.0, damping=1e-10, momentum=None, kl_clip=None, inverse=inverse
    )
    seen = train(tagged, tx, start, [(jnp.asarray(x), jnp.asarray(y))])[0]
    close(seen, np.linalg.lstsq(x, y, rcond=None)[0], 1e-4)


# ---------------------------------------------------------------- wrappers


def test_multi_steps_waits():
    """Between two updates of ``MultiSteps``: zeros in the gradient's dtype."""
    params, tagged = MODEL.params(jnp.bfloat16), MODEL.tag(4, jnp.bfloat16)
    tx = optax.MultiSteps(kfac.kfac(tagged.layers, 0.05), 4)
    batch = MODEL.batch(4, jnp.bfloat16)
    state = tx.init(params)
    _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
    updates, state = tx.update(grads, state, params, statistics=statistics)
    identical(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(kfac_state(state).count) == 0 and int(state.mini_step) == 1


def test_reduce_on_plateau():
    """``value`` and ``statistics`` each reach who wants them."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    inner = kfac.kfac(tagged.layers, 0.05, damping=0.01)
    tx = optax.chain(inner, plateau)
    state = tx.init(params)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, *MODEL.batch(4))
    for _ in range(2):
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=jnp.float64(1.0)
        )
    alone, held = None, inner.init(params)
    for _ in range(2):
        alone, held = inner.update(grads, held, params, statistics=statistics)
    close(updates, optax.tree.scale(0.5, alone), 1e-6)


def test_partition_may_leave_nothing_to_kfac():
    tagged, params = first_pass("mlp")[0], MODEL.params()
    make = {"kfac": kfac.kfac(tagged.layers, 0.05), "sgd": optax.sgd(0.1)}
    tx = optax.partition(make, jax.tree.map(lambda _: "sgd", params))
    state = tx.init(params)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, *MODEL.batch(4))
    updates, state = tx.update(grads, state, params, statistics=statistics)
    close(updates, optax.tree.scale(-0.1, grads), 1e-12)


# ---------------------------------------------------------------- gradients too large


@pytest.mark.parametrize("inverse", cases(INVERSES, ["cholesky", "ekfac"]))
@pytest.mark.parametrize("size", [3e38, 1e25])
def test_gradient_whose_norm_overflows_is_refused(inverse, size):
    """Its product with an inverse would be infinite, and stay in the momentum."""
    params, tagged = MODEL.params(jnp.float32), MODEL.tag(4, jnp.float32)
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.01, inverse=inverse)
    _, state, _ = train(tagged, tx, params, batches_of(MODEL, 2, dtype=jnp.float32))
    batch = MODEL.batch(4, jnp.float32)
    run = jax.jit(tagged.value_and_grad)
    _, grads, statistics = run(params, *batch, opt_state=state)
    grads["layer0"]["kernel"] = grads["layer0"]["kernel"].at[0, 0].set(size)
    updates, after = tx.update(grads, state, params, statistics=statistics)
    identical(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(kfac_state(after).skipped) == 1
    identical(kfac_state(after)._replace(skipped=kfac_state(state).skipped),
              kfac_state(state))  # fmt: skip
    identical(after.tail, state.tail)
