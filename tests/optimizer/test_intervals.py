"""The interval rules against plain-Python transcriptions, in ``jit`` and ``scan``."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import first_pass, kfac_state, random_statistics
from tests.models import BY_NAME

STEPS = 24


@functools.cache
def driver(interval):
    """One compiled program: statistics in, due flags and intervals out.

    The statistics of step ``t`` are fixed matrices times the scalars given for that
    step, per layer and factor, so that the tests choose every difference.
    """
    model = BY_NAME["mlp"]
    tagged, _, grads, statistics = first_pass("mlp")
    params = model.params()
    base = random_statistics(np.random.default_rng(0), statistics)
    tx = kfac.scale_by_kfac(
        tagged.layers, interval=interval, damping=1.0, inverse_interval=1000
    )

    def step(state, scales):
        clock = kfac_state(state).clock
        scaled = {
            name: base[name]._replace(
                a=base[name].a * scales[i, 0], g=base[name].g * scales[i, 1]
            )
            for i, name in enumerate(sorted(base))
        }
        _, state = tx.update(grads, state, params, statistics=scaled)
        after = kfac_state(state).clock
        return state, (clock.due, after.interval, after.refreshes)

    run = jax.jit(lambda scales: jax.lax.scan(step, tx.init(params), scales))

    def call(scales):
        state, (due, intervals, refreshes) = run(jnp.asarray(scales))
        return state, np.asarray(due), np.asarray(intervals), np.asarray(refreshes)

    return call


def scalars(scales, layer):
    """The statistic of a layer at step ``t``, as one-by-one matrices."""
    return lambda t: [np.array([[s]]) for s in scales[t - 1, layer]]


def check(interval, transcription, scales):
    """Same refreshes and same intervals, layer by layer, step by step."""
    _, due, intervals, refreshes = driver(interval)(scales)
    for layer in range(2):
        steps, wanted = transcription(scalars(scales, layer), STEPS)
        assert (1 + np.flatnonzero(due[:, layer])).tolist() == steps
        assert intervals[:, layer].tolist() == wanted
        assert refreshes[:, layer].tolist() == np.cumsum(due[:, layer]).tolist()


ALWAYS = kfac.intervals.adaptive(0.1, max_interval=1)  # keeps what ``every`` need not


# Factors on a coarse grid: differences are either 0, or at least 9 per cent, so that no
# case hangs on the last bit of a comparison with a threshold of 5 or 30 per cent.
@st.composite
def sequences(draw):
    """Scales per step, layer and factor; runs of equal values and sudden jumps."""
    values = st.sampled_from([1.0, 1.0, 1.0, 1.1, 2.0])
    flat = draw(st.lists(values, min_size=STEPS * 4, max_size=STEPS * 4))
    scales = np.array(flat).reshape(STEPS, 2, 2)
    calm = draw(st.integers(0, STEPS))
    scales[calm:] = scales[-1]
    return scales


@pytest.mark.parametrize("rule", ["multiple", "elapsed"])
@pytest.mark.parametrize("threshold", [0.05, 0.3])
@hypothesis.given(sequences())
def test_algorithm_1(rule, threshold, scales):
    check(
        kfac.intervals.adaptive(threshold, rule=rule),
        functools.partial(oracles.algorithm_1, threshold=threshold, rule=rule),
        scales,
    )


@pytest.mark.parametrize("rule", ["multiple", "elapsed"])
@hypothesis.given(sequences())
def test_algorithm_1_with_a_longest_interval(rule, scales):
    check(
        kfac.intervals.adaptive(0.3, rule=rule, max_interval=3),
        functools.partial(
            oracles.algorithm_1, threshold=0.3, rule=rule, max_interval=3
        ),
        scales,
    )


@pytest.mark.parametrize("threshold", [0.05, 0.3])
@pytest.mark.parametrize("longest", [None, 4])
@hypothesis.given(sequences())
def test_staleness(threshold, longest, scales):
    check(
        kfac.intervals.staleness(threshold, max_interval=longest),
        functools.partial(oracles.staleness, threshold=threshold, max_interval=longest),
        scales,
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@hypothesis.given(sequences())
def test_layers_refreshed_together(share, scales):
    """The layers take part in one another's refreshes: a transcription of both."""
    rule = kfac.intervals.adaptive(0.3, rule="elapsed", together=share)
    _, due, intervals, _ = driver(rule)(scales)
    statistics = [scalars(scales, layer) for layer in range(2)]
    found = oracles.together(statistics, STEPS, 0.3, share)
    np.testing.assert_array_equal(due, found[0])
    np.testing.assert_array_equal(intervals, found[1])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every(n):
    _, due, _, _ = driver(kfac.intervals.every(n))(np.ones((STEPS, 2, 2)))
    assert (1 + np.flatnonzero(due[:, 0])).tolist() == list(range(1, STEPS + 1, n))


def test_defaults():
    assert kfac.intervals.adaptive(0.2) == kfac.intervals.adaptive(
        0.2, rule="multiple", max_interval=None
    )
    assert kfac.intervals.staleness() == kfac.intervals.staleness(
        threshold=0.1, max_interval=None
    )
    assert hash(kfac.intervals.every(3)) == hash(kfac.intervals.every(3))


def test_differences_are_between_fresh_statistics_not_averages():
    """A jump of 100 per cent shows as 1 however slow the moving average is."""
    scales = np.ones((STEPS, 2, 2))
    scales[-1, 0, 1] = 2.0
    state, *_ = driver(ALWAYS)(scales)
    clock = kfac_state(state).clock
    np.testing.assert_allclose(clock.diff, [1.0, 0.0], atol=1e-6)


def test_difference_is_the_largest_over_the_factors():
    scales = np.ones((STEPS, 2, 2))
    scales[-1] = [[1.25, 1.5], [1.75, 1.0]]
    state, *_ = driver(ALWAYS)(scales)
    np.testing.assert_allclose(kfac_state(state).clock.diff, [0.5, 0.75], atol=1e-6)


def test_statistics_of_a_layer_that_is_not_due_are_not_looked_at():
    """Broken numbers where nothing is due change nothing."""
    scales = np.ones((STEPS, 2, 2))
    broken = scales.copy()
    broken[1::2] = 1e30
    run = driver(kfac.intervals.every(2))
    clean, dirty = run(scales)[0], run(broken)[0]
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
