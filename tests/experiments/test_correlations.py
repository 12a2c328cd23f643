"""Rank correlations against pairs counted one by one."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from experiments.survey import correlations
from experiments.survey.correlations import granulated, interval, kendall, partial


def sign(number):
    """-1, 0 or 1."""
    return int(number > 0) - int(number < 0)


def tau_b(x, y):
    """Kendall's tau-b, pair by pair."""
    alike = unlike = only_x = only_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        one, other = sign(x[i] - x[j]), sign(y[i] - y[j])
        alike += one * other == 1
        unlike += one * other == -1
        only_x += one == 0 and other != 0
        only_y += one != 0 and other == 0
    ordered = alike + unlike
    square = (ordered + only_x) * (ordered + only_y)
    return (alike - unlike) / math.sqrt(square) if square else math.nan


def psi(x, y, settings, name):
    """One hyper-parameter's coefficient: settings of the others, then pairs."""
    others = [values for other, values in settings.items() if other != name]
    moved, taus = settings[name], []
    for fixed in set(zip(*others, strict=True)) if others else {()}:
        total = count = 0
        for i in range(len(x)):
            for j in range(len(x)):
                here = tuple(values[i] for values in others)
                there = tuple(values[j] for values in others)
                if here == there == fixed and moved[i] != moved[j]:
                    total += sign(x[i] - x[j]) * sign(y[i] - y[j])
                    count += 1
        if count:
            taus.append(total / count)
    return sum(taus) / len(taus) if taus else math.nan


def remainders(x, y, z):
    """Cosine of what is left of all pairs' signs of x and y after a fit by z's."""
    left, right = np.triu_indices(len(x), 1)
    columns = [np.sign(c[left] - c[right]) for c in (x, y, *z.T)]
    ends, fit = np.stack(columns[:2], 1), np.stack(columns[2:], 1)
    rest = ends - fit @ np.linalg.lstsq(fit, ends, rcond=None)[0]
    a, b = rest.T
    return a @ b / math.sqrt((a @ a) * (b @ b))


@st.composite
def rows(draw, columns, most=12):
    """Columns of equal length; few different values: many ties."""
    size = draw(st.integers(2, most))
    values = draw(st.sampled_from([st.integers(0, 3), st.integers(-(2**40), 2**40)]))
    column = st.lists(values, min_size=size, max_size=size)
    return [np.array(draw(column), np.float64) for _ in range(columns)]


def same(found, wanted):
    """Equal to rounding, or both without a value."""
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),
        ([5, 7], [1, 0], -1.0),
        # alike: 4 pairs; tied in x: 1; tied in y: 1
        ([1, 1, 2, 3], [1, 2, 2, 3], 4 / 5),
        # tied in both: (0, 1), which does not count
        ([1, 1, 2], [1, 1, 0], -1.0),
        ([1, 1, 1], [1, 2, 3], math.nan),
        ([1, 2], [3, 3], math.nan),
    ],
)
def test_kendall_by_hand(x, y, wanted):
    same(kendall(x, y), wanted)
    same(kendall(y, x), wanted)


@hypothesis.given(rows(2))
@hypothesis.settings(max_examples=100)
def test_kendall_counts_pairs(columns):
    x, y = columns
    same(kendall(x, y), tau_b(x, y))
    same(kendall(-x, y), -tau_b(x, y))


def test_kendall_of_many_rows(rng):
    """Where SciPy no longer enumerates, and of numbers whose difference overflows."""
    x = rng.integers(20, size=120).astype(float)
    y = x + rng.integers(20, size=120)
    same(kendall(x, y), tau_b(x, y))
    assert kendall(np.exp(x), y**3) == kendall(x, y)
    assert kendall([-1e308, 1e308, 0], [0, 2, 1]) == 1.0


GRID = {"rate": [0, 0, 1, 1], "width": ["thin", "wide", "thin", "wide"]}


def test_granulated_by_hand():
    # rate: +1 where thin, -1 where wide; width: +1 at 0, and a tie in y at 1
    found = granulated([1, 2, 3, 4], [1, 3, 2, 2], GRID)
    assert found.settings == {"rate": 0.0, "width": 0.5}
    assert found.value == 0.25


def test_granulated_sees_through_a_confounder():
    """The width moves both; at any one width they disagree."""
    width = np.repeat([0.0, 10.0, 20.0], 3)
    rate = np.tile([1.0, 2.0, 3.0], 3)
    x, y = width + rate, width - rate
    assert kendall(x, y) == 0.5
    found = granulated(x, y, {"rate": rate, "width": width})
    assert found.settings == {"rate": -1.0, "width": 1.0}
    assert found.value == 0.0


def test_granulated_counts_ties_as_zero():
    """A measure on which a hyper-parameter has no influence gets 0, not NaN."""
    found = granulated([1, 2, 1, 2], [1, 2, 3, 4], GRID)
    assert found.settings == {"rate": 0.0, "width": 1.0}
    assert granulated([1, 1, 2], [1, 2, 3], {"rate": [1, 2, 3]}).value == 2 / 3


@hypothesis.given(rows(5, most=14), st.integers(1, 3))
@hypothesis.settings(max_examples=60)
def test_granulated_loops(columns, count):
    x, y, *others = columns
    settings = {f"h{i}": values % 3 for i, values in enumerate(others[:count])}
    found = granulated(x, y, settings)
    wanted = {name: psi(x, y, settings, name) for name in settings}
    assert list(found.settings) == list(wanted)
    same(list(found.settings.values()), list(wanted.values()))
    known = [value for value in wanted.values() if not math.isnan(value)]
    same(found.value, sum(known) / len(known) if known else math.nan)


def test_granulated_leaves_out_what_does_not_vary():
    x, y = [1, 2, 3, 9], [1, 2, 3, 0]
    # the last run has no neighbour: no group of its own
    settings = {"rate": [1, 2, 3, 3], "seed": [0, 0, 0, 1], "depth": [2, 2, 2, 2]}
    found = granulated(x, y, settings)
    same(list(found.settings.values()), [1.0, -1.0, math.nan])
    assert found.value == 0.0
    assert math.isnan(granulated(x, y, {"depth": [2] * 4}).value)


def test_granulated_takes_repeated_runs(rng):
    """Every run twice: the same figures. Runs of one setting are not compared."""
    x, y = rng.normal(size=(2, 12))
    settings = {"a": np.arange(12) % 3, "b": np.arange(12) // 3}
    twice = {name: np.tile(values, 2) for name, values in settings.items()}
    once, repeated = granulated(x, y, settings), granulated([*x, *x], [*y, *y], twice)
    same(repeated.value, once.value)
    same(list(repeated.settings.values()), list(once.settings.values()))
    # two runs at rate 1 disagree with each other, but with rate 0 they agree
    assert granulated([0, 1, 2], [0, 2, 1], {"rate": [0, 1, 1]}).value == 1.0


def test_settings_of_any_kind(rng):
    x, y = rng.normal(size=(2, 8))
    plain = {"a": [0, 0, 0, 0, 1, 1, 1, 1], "b": [0, 1, 2, 3, 0, 1, 2, 3]}
    wanted = granulated(x, y, plain)
    odd = {"a": [None] * 4 + ["cosine"] * 4, "b": np.tile([0.1, 0.2, 0.3, 0.4], 2)}
    assert granulated(x, y, odd) == wanted
    record = np.rec.fromarrays(list(map(np.array, odd.values())), names=list(odd))
    assert granulated(x, y, record) == wanted


@hypothesis.given(rows(3))
@hypothesis.settings(max_examples=80)
def test_partial_is_the_formula(columns):
    x, y, z = columns
    xy, xz, yz = tau_b(x, y), tau_b(x, z), tau_b(y, z)
    square = (1 - xz**2) * (1 - yz**2)
    if math.isnan(xy + xz + yz) or square < 1e-9:
        assert math.isnan(partial(x, y, z))
    else:
        same(partial(x, y, z), (xy - xz * yz) / math.sqrt(square))
        same(partial(y, x, z[:, None]), partial(x, y, z))


def test_partial_by_hand():
    # tau: xy 4/6, xz 4/6, yz 2/6
    x, y, z = [1, 2, 3, 4], [1, 3, 2, 4], [2, 1, 3, 4]
    wanted = (2 / 3 - 2 / 9) / math.sqrt((1 - 4 / 9) * (1 - 1 / 9))
    same(partial(x, y, z), wanted)
    assert math.isnan(partial(x, y, [5, 6, 7, 8]))
    assert math.isnan(partial(x, y, [1, 1, 1, 1]))


@pytest.mark.parametrize("count", [2, 3])
def test_partial_of_several(count, rng):
    """Columns of z that nearly agree among themselves, and with x and y."""
    z = rng.integers(9, size=(40, 1)) + rng.integers(2, size=(40, count))
    x, y = z[:, -1] - 0.5 * z[:, 0] + rng.integers(3, size=(2, 40))
    columns = [x, y, *z.T]
    taus = [[tau_b(a, b) for b in columns] for a in columns]
    inverse = np.linalg.inv(taus)
    wanted = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    same(partial(x, y, z), wanted)
    same(partial(x, y, z), remainders(x, y, z))
    assert abs(wanted - kendall(x, y)) > 0.1


def test_partial_of_columns_that_repeat(rng):
    x, y, z = rng.normal(size=(3, 20))
    same(partial(x, y, np.stack([z, 2 * z, -z], 1)), partial(x, y, z))
    same(partial(x, y, np.zeros((20, 0))), kendall(x, y))


def test_interval_of_a_mean_is_scipys(rng):
    x = rng.exponential(size=30)
    found = interval(np.mean, x, confidence=0.9, num_resamples=4000)
    wanted = scipy.stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=4000,
        confidence_level=0.9,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert found.value == x.mean()
    error = x.std() / math.sqrt(30)
    np.testing.assert_allclose(found[1:], wanted, atol=0.2 * error)


def covered(statistic, draw, true, repeats, rng):
    """How many of the intervals hold the truth: 92 to 97 of 100, up to chance."""
    count = 0
    for seed in range(repeats):
        _, low, high = interval(statistic, *draw(rng), num_resamples=200, seed=seed)
        count += low < true < high
    least, most = scipy.stats.binom.ppf([1e-3, 1 - 1e-3], repeats, [0.92, 0.97])
    assert least <= count <= most


def test_interval_covers(rng):
    covered(np.mean, lambda rng: [rng.normal(3, 2, size=40)], 3, 200, rng)


@pytest.mark.slow
def test_interval_covers_tau(rng):
    """The true tau of a normal pair is 2/π arcsin ρ."""

    def draw(rng):
        x, noise = rng.normal(size=(2, 60))
        return x, 0.6 * x + 0.8 * noise

    covered(kendall, draw, 2 / math.pi * math.asin(0.6), 150, rng)


def test_groups_are_drawn_whole(rng):
    """Rows written down four times are no more than rows written down once."""
    x, noise = rng.normal(size=(2, 25))
    y = x + noise
    once = interval(kendall, x, y, num_resamples=200)
    names = np.array([f"run {i:02d}" for i in range(25)])
    copies = [np.tile(column, 4) for column in (x, y)]
    whole = interval(kendall, *copies, groups=np.tile(names, 4), num_resamples=200)
    np.testing.assert_allclose(whole, once, rtol=1e-12)
    apart = interval(kendall, *copies, num_resamples=200)
    assert apart.value == pytest.approx(once.value)
    assert 1.6 < (whole.high - whole.low) / (apart.high - apart.low) < 2.6


def test_unequal_groups():
    """Groups keep their sizes: the statistic sees them whole or not at all."""
    seen = []

    def statistic(rows):
        seen.append(np.bincount(rows, minlength=6))
        return float(rows.mean())

    labels = ["b", "a", "b", "c", "b", "a"]
    interval(statistic, np.arange(6), groups=labels, num_resamples=200)
    for counts in seen[1:]:
        assert counts[0] == counts[2] == counts[4] and counts[1] == counts[5]
        assert counts[0] + counts[1] + counts[3] == 3
    assert len({tuple(counts) for counts in seen}) == 10  # all there are


def test_interval_depends_on_seed_and_confidence(rng):
    x, y = rng.normal(size=(2, 20))
    one = interval(kendall, x, y, num_resamples=100)
    assert one == interval(kendall, x, y, num_resamples=100, seed=0)
    assert one[1:] != interval(kendall, x, y, num_resamples=100, seed=1)[1:]
    half = interval(kendall, x, y, num_resamples=100, confidence=0.5)
    assert one.low < half.low < half.value < half.high < one.high


@pytest.mark.parametrize(("every", "known"), [(20, True), (5, False)])
def test_resamples_without_a_value(every, known):
    values = []

    def statistic(x):
        values.append(math.nan if len(values) % every == 1 else x.mean())
        return values[-1]

    found = interval(statistic, np.arange(9.0), num_resamples=100, confidence=0.8)
    assert found.value == 4.0
    ends = np.nanquantile(values[1:], [0.1, 0.9]) if known else [math.nan] * 2
    np.testing.assert_allclose(found[1:], ends)


def test_interval_of_the_granulated_coefficient(rng):
    x, noise = rng.normal(size=(2, 27))
    settings = {name: np.arange(27) // 3**i % 3 for i, name in enumerate("abc")}
    record = np.rec.fromarrays(list(settings.values()), names="a,b,c")
    found = interval(
        lambda x, y, s: granulated(x, y, s).value,
        x,
        x + noise,
        record,
        num_resamples=100,
    )
    assert found.value == granulated(x, x + noise, settings).value
    assert found.low < found.value < found.high


X = [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kendall(X, X[:2]), "y has 2 rows and x has 3, wanted equal"),
        (lambda: kendall([1], [1]), "x is of length 1, wanted two rows"),
        (lambda: kendall(X, [1, math.inf, 3]), "y has inf in row 1, wanted finite"),
        (lambda: kendall([X, X], X), r"x has shape \(2, 3\), wanted one number"),
        (lambda: partial(X, X, X[:2]), "z has 2 rows"),
        (lambda: partial(X, X, [[1], [2], [math.nan]]), r"z\[:, 0\] has nan in row 2"),
        (lambda: partial(X, X, np.ones((3, 1, 1))), "z has shape"),
        (lambda: granulated(X, X, {}), "settings has no hyper-parameter"),
        (lambda: granulated(X, X, np.ones(3)), "settings has no hyper-parameter"),
        (lambda: granulated(X, X, {"a": [1]}), r"settings\['a'\] has 1 rows"),
        (lambda: granulated(X, X, {"a": [1, 2, math.nan]}), r"settings\['a'\] has nan"),
        (
            lambda: granulated(X, X, {"a": np.array(3)}),
            r"settings\['a'\] is a single value",
        ),
        (lambda: interval(np.mean), "no array given"),
        (lambda: interval(kendall, X, X[:2]), r"arrays\[1\] has 2 rows"),
        (lambda: interval(kendall, X, [1, math.nan, 2]), r"arrays\[1\] has nan"),
        (lambda: interval(np.mean, X, groups=[1, 2]), "groups has 2 rows"),
        (lambda: interval(np.mean, X, groups=[1, 1, 1]), "groups has 1 group, want"),
        (lambda: interval(np.mean, X, groups=np.ones((3, 2))), "groups has shape"),
        (lambda: interval(np.mean, X, confidence=95.0), "confidence is 95"),
        (lambda: interval(np.mean, X, num_resamples=0), "num_resamples is 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inputs_stay_as_they_are(rng):
    x, y = rng.normal(size=(2, 10))
    kept = x.copy(), y.copy()
    for figure in (kendall, lambda x, y: partial(x, y, x + y)):
        correlations.interval(figure, x, y, num_resamples=10)
    np.testing.assert_array_equal((x, y), kept)
