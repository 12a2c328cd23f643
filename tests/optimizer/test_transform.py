"""The optax transformation step by step: averages, trust region, bad batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import (
    INVERSES,
    batches_of,
    cases,
    close,
    first_pass,
    homogeneous,
    identical,
    kfac_state,
    random_like,
    random_statistics,
    train,
    train_step,
)
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]


def layers():
    """Layers of the small network."""
    return first_pass("mlp")[0].layers


def solve(grads, params, statistics, **options):
    """The preconditioned gradient from a fresh state."""
    tx = kfac.scale_by_kfac(layers(), **options)
    return tx.update(grads, tx.init(params), params, statistics=statistics)[0]


# ---------------------------------------------------------------- averages


@pytest.mark.parametrize("decay", cases([0.0, 0.5, 0.95], [0.95]))
def test_factors_are_bias_corrected_averages(rng, decay):
    template = first_pass("mlp")[-1]
    params = MODEL.params()
    tx = kfac.scale_by_kfac(layers(), factor_decay=decay)
    state, grads, history = tx.init(params), random_like(rng, params), []
    update = jax.jit(tx.update)
    for _ in range(4):
        history.append(random_statistics(rng, template))
        _, state = update(grads, state, params, statistics=history[-1])
        for name, held in kfac_state(state).factors.items():
            for field in ("a", "g"):
                values = [getattr(s[name], field) for s in history]
                close(getattr(held, field), oracles.average(values, decay), 1e-10)


def test_only_refreshed_statistics_enter_the_average(rng):
    template = first_pass("mlp")[-1]
    params = MODEL.params()
    interval = kfac.intervals.every(3)
    tx = kfac.scale_by_kfac(layers(), factor_decay=0.8, interval=interval)
    state, grads = tx.init(params), random_like(rng, params)
    history = [random_statistics(rng, template) for _ in range(7)]
    for statistics in history:
        _, state = tx.update(grads, state, params, statistics=statistics)
    for name, held in kfac_state(state).factors.items():
        values = [s[name].a for s in history[::3]]
        close(held.a, oracles.average(values, 0.8), 1e-10)


# ---------------------------------------------------------------- kfac.kfac


def reference_step(params, grads, preconditioned, momentum, options):
    """The alias written out: trust region, weight decay, momentum, learning rate."""
    lr, clip = options["learning_rate"], options["kl_clip"]
    inner = sum(
        float(jnp.vdot(v, g))
        for v, g in zip(
            jax.tree.leaves(preconditioned), jax.tree.leaves(grads), strict=True
        )
    )
    nu = 1.0 if clip is None else min(1.0, np.sqrt(clip / (lr**2 * inner)))
    new = jax.tree.map(
        lambda m, v, w: options["momentum"] * m + nu * v + options["weight_decay"] * w,
        momentum,
        preconditioned,
        params,
    )
    return jax.tree.map(lambda w, m: w - lr * m, params, new), new, nu


ALIASES = [(m, w, c) for m, w in ((0.9, 0.0), (0.5, 0.1)) for c in (1e-3, 1e-6, None)]
FAST = [(0.9, 0.0, 1e-3), (0.5, 0.1, 1e-6), (0.5, 0.1, None)]


@pytest.mark.parametrize(("momentum", "weight_decay", "kl_clip"), cases(ALIASES, FAST))
def test_alias_is_its_parts(momentum, weight_decay, kl_clip):
    options = {
        "learning_rate": 0.05,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "kl_clip": kl_clip,
    }
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(tagged.layers, damping=0.01, **options)
    plain = kfac.scale_by_kfac(tagged.layers, damping=0.01)
    state, plain_state = tx.init(params), plain.init(params)
    run, update, alone = map(jax.jit, (tagged.value_and_grad, tx.update, plain.update))
    mine, buffer, clipped = params, jax.tree.map(jnp.zeros_like, params), []
    for batch in batches_of(MODEL, 3):
        _, grads, statistics = run(params, *batch, opt_state=state)
        updates, state = update(grads, state, params, statistics=statistics)
        v, plain_state = alone(grads, plain_state, mine, statistics=statistics)
        mine, buffer, nu = reference_step(mine, grads, v, buffer, options)
        clipped.append(nu)
        params = optax.apply_updates(params, updates)
        close(params, mine, 1e-10)
    if kl_clip == 1e-6:
        assert max(clipped) < 1


def test_learning_rate_schedule():
    """Learning rates may be optax schedules, counted from zero."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    rate = lambda count: 0.1 / (1 + count)  # noqa: E731
    options = {"momentum": 0.0, "kl_clip": None, "damping": 0.01}
    state = (tx := kfac.kfac(tagged.layers, rate, **options)).init(params)
    plain = kfac.scale_by_kfac(tagged.layers, damping=0.01)
    plain_state = plain.init(params)
    for count, batch in enumerate(batches_of(MODEL, 3)):
        _, grads, statistics = tagged.value_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        v, plain_state = plain.update(grads, plain_state, params, statistics=statistics)
        close(updates, optax.tree.scale(-rate(count), v), 1e-10)


def test_damping_schedule(rng):
    params = MODEL.params()
    statistics = random_statistics(rng, first_pass("mlp")[-1])
    schedule = optax.exponential_decay(1.0, 1, 0.1)
    tx = kfac.scale_by_kfac(layers(), damping=schedule, inverse="eigh")
    state, grads = tx.init(params), random_like(rng, params)
    for damping in [float(schedule(jnp.asarray(t, jnp.int32))) for t in range(3)]:
        updates, state = tx.update(grads, state, params, statistics=statistics)
        for name in MODEL.layers:
            s, v = statistics[name], homogeneous(MODEL, name, grads)[0]
            wanted = oracles.solve_exact(s.a, s.g, v, damping)
            close(homogeneous(MODEL, name, updates)[0], wanted, 1e-8)
        close(kfac_state(state).damping, jnp.asarray(damping), 1e-6)


def test_linear_in_the_gradient(rng):
    """A preconditioner is linear, symmetric and positive definite."""
    params = MODEL.params()
    statistics = random_statistics(rng, first_pass("mlp")[-1])
    g, h = random_like(rng, params), random_like(rng, params)
    both = jax.tree.map(lambda a, b: 2 * a - 3 * b, g, h)
    u, v = (solve(x, params, statistics, damping=0.1) for x in (g, h))
    combined = jax.tree.map(lambda a, b: 2 * a - 3 * b, u, v)
    close(solve(both, params, statistics, damping=0.1), combined, 1e-9)
    close(optax.tree.vdot(u, h), optax.tree.vdot(g, v), 1e-9)
    assert optax.tree.vdot(u, g) > 0


# ---------------------------------------------------------------- bad batches


def poisoned(batch, value=jnp.nan):
    """A batch with one broken number."""
    return batch[0].at[0, 0].set(value), batch[1]


def without_skipped(opt_state):
    """The state with its counter of skipped batches at zero."""

    def reset(node):
        if type(node).__name__ == "KFACState":
            return node._replace(skipped=jnp.zeros_like(node.skipped))
        return node

    is_state = lambda node: type(node).__name__ == "KFACState"  # noqa: E731
    return jax.tree.map(reset, opt_state, is_leaf=is_state)


POISONED = [(name, value) for name in INVERSES for value in ("nan", "inf")]
FAST_POISONED = [("cholesky", "inf"), ("ekfac", "nan"), ("low_rank", "nan")]


@pytest.mark.parametrize(("inverse", "value"), cases(POISONED, FAST_POISONED))
def test_bad_batch_as_if_it_had_not_been_there(inverse, value):
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(
        tagged.layers, 0.05, weight_decay=0.1, damping=0.01, inverse=inverse,
        interval=kfac.intervals.adaptive(10.0), inverse_interval=2,
    )  # fmt: skip
    one, two, three = batches_of(MODEL, 3)
    bad = poisoned(two, float(value))
    seen = train(tagged, tx, params, [bad, one, bad, bad, two, three, bad])
    clean = train(tagged, tx, params, [one, two, three])
    identical(seen[0], clean[0])
    identical(without_skipped(seen[1]), clean[1])
    assert int(kfac_state(seen[1]).skipped) == 4
    assert int(kfac_state(clean[1]).skipped) == 0


def test_non_finite_gradient_of_a_layer_that_is_not_due():
    """Gradients are looked at even where no statistics are taken."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05, interval=kfac.intervals.every(100))
    one, two, three = batches_of(MODEL, 3)
    seen = train(tagged, tx, params, [one, poisoned(two), three])
    clean = train(tagged, tx, params, [one, three])
    identical(seen[0], clean[0])
    identical(without_skipped(seen[1]), clean[1])


def test_scale_by_kfac_returns_zeros_for_a_bad_batch():
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.scale_by_kfac(tagged.layers)
    _, state, _ = train(tagged, tx, params, batches_of(MODEL, 2))
    batch = poisoned(MODEL.batch(4))
    _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
    updates, after = tx.update(grads, state, params, statistics=statistics)
    identical(updates, jax.tree.map(jnp.zeros_like, params))
    identical(without_skipped(after), without_skipped(state))
    assert int(kfac_state(after).skipped) == 1


# ---------------------------------------------------------------- gating


def test_gated_statistics_give_the_same_training():
    """Statistics of layers that are not due are absent; nothing may depend on them."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    interval = kfac.intervals.adaptive(10.0, rule="elapsed")
    tx = kfac.kfac(tagged.layers, 0.05, interval=interval)
    batches = batches_of(MODEL, 6)
    gated = train(tagged, tx, params, batches)

    state, loose = tx.init(params), params
    run, update = jax.jit(tagged.value_and_grad), jax.jit(tx.update)
    for batch in batches:
        _, grads, statistics = run(loose, *batch)
        updates, state = update(grads, state, loose, statistics=statistics)
        loose = optax.apply_updates(loose, updates)
    close(gated[0], loose, 1e-10)
    assert kfac_state(state).clock.refreshes.max() < 6


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_training_with_other_fishers(fisher):
    tagged, params = MODEL.tag(4, fisher=fisher), MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05, interval=kfac.intervals.every(2))
    step, state, losses = jax.jit(train_step(tagged, tx)), tx.init(params), []
    batch = MODEL.batch(4)
    for seed in range(8):
        params, state, loss = step(params, state, *batch, key=jax.random.key(seed))
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert kfac_state(state).clock.refreshes.tolist() == [4, 4]


# ---------------------------------------------------------------- report

FIELDS = {"name", "interval", "next_due", "refreshes", "inversions", "failures", "diff"}
FIELDS |= {"elements", "elements_reduced", "bytes_reduced", "bytes_if_every_step"}
FIELDS |= {"damping", "steps", "skipped"}


def test_report():
    tagged, params = first_pass("mlp")[0], MODEL.params()
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.01, interval=kfac.intervals.every(3))
    batches = batches_of(MODEL, 4)
    batches.insert(1, poisoned(batches[0]))
    _, state, _ = train(tagged, tx, params, batches)
    records = {record["name"]: record for record in kfac.report(state)}
    assert set(records) == set(MODEL.layers)
    for name, record in records.items():
        assert set(record) >= FIELDS
        a, g = (getattr(first_pass("mlp")[-1][name], f) for f in ("a", "g"))
        packed = sum(len(m) * (len(m) + 1) // 2 for m in (a, g))
        assert record["elements"] in (packed, a.size + g.size)
        assert record["elements_reduced"] == 2 * record["elements"]
        assert record["bytes_if_every_step"] == 2 * record["bytes_reduced"]
        assert record["refreshes"] == 2
        assert record["steps"] == 4
        assert record["skipped"] == 1
        assert record["failures"] == 0
        assert not record["next_due"]
        assert record["damping"] == pytest.approx(0.01)
        assert isinstance(record["next_due"], bool)


def test_report_needs_a_kfac_state():
    with pytest.raises(ValueError, match="KFACState"):
        kfac.report(optax.adam(1e-3).init(MODEL.params()))


# ---------------------------------------------------------------- other models


def test_update_without_statistics_says_what_to_pass():
    params = MODEL.params()
    tx = kfac.scale_by_kfac(layers())
    with pytest.raises(ValueError, match="statistics"):
        tx.update(params, tx.init(params), params)


def test_statistics_of_another_model_are_refused():
    params, other = MODEL.params(), first_pass("transposed")[-1]
    tx = kfac.scale_by_kfac(layers())
    with pytest.raises(ValueError, match="layer"):
        tx.update(params, tx.init(params), params, statistics=other)


def test_statistics_of_another_width_name_layer_and_shapes(rng):
    params = MODEL.params()
    statistics = dict(first_pass("mlp")[-1])
    small = jnp.asarray(rng.normal(size=(2, 2)))
    statistics["layer1"] = statistics["layer1"]._replace(a=small)
    tx = kfac.scale_by_kfac(layers())
    with pytest.raises(ValueError, match="layer1") as error:
        tx.update(params, tx.init(params), params, statistics=statistics)
    assert "2" in str(error.value) and "6" in str(error.value)


def test_state_of_another_model_is_refused():
    """With the first path that differs."""
    tagged, params = first_pass("mlp")[0], MODEL.params()
    other = BY_NAME["heads_out"]
    tx = kfac.scale_by_kfac(tagged.layers)
    foreign = kfac.scale_by_kfac(first_pass("heads_out")[0].layers)
    state = foreign.init(other.params())
    statistics = first_pass("mlp")[-1]
    with pytest.raises(ValueError, match="layer"):
        tx.update(params, state, params, statistics=statistics)
    with pytest.raises(ValueError, match="layer"):
        tagged.value_and_grad(params, *MODEL.batch(4), opt_state=state)


def test_parameters_of_another_model_are_refused():
    tx = kfac.scale_by_kfac(layers())
    with pytest.raises(ValueError, match="layer"):
        tx.init(BY_NAME["heads_out"].params())
