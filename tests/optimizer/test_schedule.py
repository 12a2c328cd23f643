"""Refreshes and inversions spread over steps: the queue, and the optimiser's turns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_jax_lite as kfac
from kfac_jax_lite.distributed.assignment import make_plan
from kfac_jax_lite.optimizer import schedule as stagger
from tests import models
from tests.helpers import kfac_state

EIGHT = models.mlp("eight", (6, 8, 7, 5, 8, 6, 7, 8, 4))


def queue(costs, intervals, groups, steps):
    """The queue in plain Python: which layers are served at steps 1 … ``steps``."""
    n = len(costs)
    last, times, history = [1] * n, [1] * n, [[True] * n]
    for step in range(2, steps + 1):
        late = []
        for i in range(n):
            wanted = intervals[i]
            if times[i] == 1:
                own = [j for j in range(n) if groups[j] == groups[i]]
                done = sum(costs[j] for j in own if j <= i)
                total = sum(costs[j] for j in own)
                share = done / total if total else 0
                wanted = max(1, int(np.ceil(share * intervals[i] - 1e-4)))
            late.append(step - last[i] - wanted)
        row = [False] * n
        for group in set(groups):
            own = [i for i in range(n) if groups[i] == group]
            budget = sum(costs[i] / intervals[i] for i in own)
            spent = 0.0
            for i in sorted(own, key=lambda i: (-late[i], i)):
                if late[i] >= 0:
                    row[i] = spent < budget * (1 - 1e-4) or spent == 0
                    spent += costs[i]
        for i in range(n):
            if row[i]:
                last[i], times[i] = step, times[i] + 1
        history.append(row)
    return np.array(history)


def simulated(costs, intervals, groups, steps):
    """The same through ``wait`` and ``served``."""
    costs, groups = np.array(costs, float), np.array(groups)
    every = jnp.array(intervals, jnp.int32)
    phase = stagger.phases(costs, groups)

    @jax.jit
    def step(number, last, times):
        late = number - last - stagger.wait(times, every, phase)
        row = stagger.served(late >= 0, late, every, costs, groups)
        return jnp.where(row, number, last), times + row, row

    last = times = jnp.ones(len(costs), jnp.int32)
    history = [np.ones(len(costs), bool)]
    for number in range(2, steps + 1):
        last, times, row = step(number, last, times)
        history.append(np.array(row))
    return np.array(history)


LAYER = st.tuples(
    st.sampled_from([0.0, 1.0, 1.0, 3.0, 8.0]),
    st.integers(1, 12),
    st.integers(0, 1),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=9))
def test_the_queue_is_the_plain_python_one(layers):
    costs, intervals, groups = zip(*layers, strict=True)
    got = simulated(costs, intervals, groups, 40)
    np.testing.assert_array_equal(got, queue(costs, intervals, groups, 40))


@settings(max_examples=15, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=9))
def test_no_step_is_a_long_one_and_nobody_starves(layers):
    costs, intervals, groups = (np.array(x) for x in zip(*layers, strict=True))
    history = queue(*(x.tolist() for x in (costs, intervals, groups)), 120)
    for group in set(groups.tolist()):
        own = groups == group
        average = (costs[own] / intervals[own]).sum()
        spent = history[1:, own] @ costs[own]
        assert spent.max(initial=0) < average + costs[own].max() + 1e-9
        # What has to be done on average is done: the queue does not grow.
        assert spent.sum() >= 0.9 * average * len(spent) - 2 * costs[own].sum()
    for i, interval in enumerate(intervals):
        turns = np.flatnonzero(history[:, i])
        assert np.diff(turns).max(initial=0) <= interval + len(layers)
        assert np.all(np.diff(turns)[1:] >= interval)


def test_layers_of_one_interval_take_turns():
    history = queue([1.0] * 5, [10] * 5, [0] * 5, 61)
    assert history[1:].sum(1).max() == 1
    for i in range(5):
        assert np.all(np.diff(np.flatnonzero(history[10:, i])) == 10)


def run(steps, inverse="cholesky", **options):
    """Trains; returns what was refreshed and inverted at every step, and the state."""
    params, tagged = EIGHT.params(), EIGHT.tag(16)
    tx = kfac.kfac(tagged.layers, 1e-2, damping=0.1, inverse=inverse, **options)

    @jax.jit
    def step(params, state, batch):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, statistics

    every = jax.jit(lambda *args: tagged.value_and_grad(*args)[2])
    state, seen = tx.init(params), []
    for number in range(steps):
        before = kfac_state(state).clock
        batch = EIGHT.batch(16, seed=number)
        fresh = every(params, *batch)
        params, state, _ = step(params, state, batch)
        after = kfac_state(state).clock
        seen.append(
            (
                np.array(after.refreshes > before.refreshes),
                np.array(after.inversions > before.inversions),
                fresh,
            )
        )
    return tagged.layers, params, state, seen


@pytest.mark.parametrize("inverse", ["cholesky", "low_rank"])
def test_turns_of_the_optimiser(inverse):
    interval = kfac.intervals.every(4)
    options = {"interval": interval, "inverse_interval": 16, "stagger": True}
    layers, _, state, seen = run(49, inverse, **options)
    refreshed = np.array([row[0] for row in seen])
    inverted = np.array([row[1] for row in seen])
    assert refreshed[0].all() and inverted[0].all()
    assert refreshed[1:].sum(1).max() <= 2 and inverted[1:].sum(1).max() <= 2
    # Every layer had its turns: one in four steps, one in sixteen.
    assert refreshed[1:].sum(0).min() >= 11 and inverted[1:].sum(0).min() >= 2
    # Inversions make way for refreshes only for a while.
    assert np.array(kfac_state(state).clock.failures).sum() == 0
    names = sorted(layer.name for layer in layers)
    for i, name in enumerate(names):
        mean, weight = 0.0, 0.0
        for row, _, fresh in seen:
            if row[i]:
                weight = 0.95 * weight + 0.05
                mean = mean + 0.05 / weight * (np.array(fresh[name].a) - mean)
        np.testing.assert_allclose(
            kfac_state(state).factors[name].a, mean, rtol=1e-9, atol=1e-12
        )


def test_nothing_to_spread_is_the_same():
    plain, spread = (run(5, stagger=flag) for flag in (False, True))
    pairs = zip(*(jax.tree.leaves(x[1:3]) for x in (plain, spread)), strict=True)
    for x, y in pairs:
        np.testing.assert_array_equal(np.array(x), np.array(y))


def test_owners_have_queues_of_their_own():
    layers = EIGHT.tag(16).layers
    reduction = kfac.Reduction(mode="owner", devices=4, bucket=0)
    plan = make_plan(layers, reduction, 4)
    groups = stagger.owners(layers, plan)
    assert set(groups.tolist()) == {0, 1, 2, 3}
    n = len(layers)
    gates = stagger.staggered_inversions(
        layers,
        plan,
        jnp.ones(n, bool),
        200,
        jnp.zeros(n, jnp.int32),
        jnp.full(n, 3),
        8,
        jnp.asarray(False),
    )
    turns = [int(np.array(gates)[groups == g].sum()) for g in range(4)]
    assert min(turns) >= 1
