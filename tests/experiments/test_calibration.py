"""Metrics of probabilities against sums written out, scipy's ranks, known cases."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.special
import scipy.stats

from experiments.studies.bayes import calibration

SHAPES = st.sampled_from([(1, 1), (1, 3), (7, 2), (40, 6)])
SEEDS = st.integers(0, 2**31)
BINS = st.sampled_from([1, 2, 15])
SCORES = st.sampled_from([1, 4, 20, 41]).flatmap(
    lambda n: st.lists(st.integers(-5, 5), min_size=n, max_size=n)
)
OF_LABELS = ("accuracy", "nll", "brier", "reliability", "calibration_error")
# Four examples: confidences 0.9, 0.6, 0.8, 0.5; the first three are right.
P = np.array([[0.9, 0.1, 0.0], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]])
Y = np.array([0, 1, 2, 1])


def drawn(shape, seed):
    """Probabilities and labels."""
    n, classes = shape
    rng = np.random.default_rng(seed)
    p = scipy.special.softmax(2 * rng.normal(size=(n, classes)), -1)
    return p, rng.integers(classes, size=n)


def bins_by_hand(p, y, size, adaptive):
    """Lists of (confidence, right) by bin."""
    pairs = [
        (max(row), int(np.argmax(row)) == label)
        for row, label in zip(p, y, strict=True)
    ]
    found = [[] for _ in range(size)]
    if adaptive:
        for i, pair in enumerate(sorted(pairs, key=lambda pair: pair[0])):
            found[i * size // len(pairs)].append(pair)
        return found
    for confidence, right in pairs:
        (place,) = [b for b in range(size) if b / size < confidence <= (b + 1) / size]
        found[place].append((confidence, right))
    return found


def test_hand_made_numbers():
    assert calibration.accuracy(P, Y) == 0.75
    wanted = -np.log(0.9 * 0.6 * 0.8 * 0.3) / 4
    np.testing.assert_allclose(calibration.nll(P, Y), wanted)
    squares = [0.01 + 0.01, 0.04 + 0.16 + 0.04, 0.01 + 0.01 + 0.04, 0.25 + 0.49 + 0.04]
    np.testing.assert_allclose(calibration.brier(P, Y), np.mean(squares))
    # Two bins: 0.5 (wrong) falls in the lower one, whose upper edge it is.
    found = calibration.reliability(P, Y, num_bins=2)
    np.testing.assert_allclose(found.confidence, [0.5, 2.3 / 3])
    np.testing.assert_allclose(found.accuracy, [0, 1])
    np.testing.assert_array_equal(found.size, [1, 3])
    np.testing.assert_allclose(calibration.calibration_error(P, Y, 2), (0.5 + 0.7) / 4)
    found = calibration.reliability(P, Y, num_bins=2, adaptive=True)
    np.testing.assert_allclose(found.confidence, [0.55, 0.85])
    np.testing.assert_allclose(found.accuracy, [0.5, 1])
    error = calibration.calibration_error(P, Y, 2, adaptive=True)
    np.testing.assert_allclose(error, (0.05 + 0.15) / 2)


@hypothesis.given(SHAPES, SEEDS, BINS, st.booleans())
def test_sums_written_out(shape, seed, bins, adaptive):
    p, y = drawn(shape, seed)
    rows = np.arange(len(y))
    np.testing.assert_allclose(calibration.accuracy(p, y), np.mean(p.argmax(1) == y))
    np.testing.assert_allclose(calibration.nll(p, y), -np.log(p[rows, y]).mean())
    hot = np.eye(p.shape[1])[y]
    wanted = ((p - hot) ** 2).sum(1).mean()
    np.testing.assert_allclose(calibration.brier(p, y), wanted, atol=1e-15)
    hand = bins_by_hand(p, y, bins, adaptive)
    found = calibration.reliability(p, y, bins, adaptive)
    np.testing.assert_array_equal(found.size, [len(b) for b in hand])
    error = 0.0
    for i, pairs in enumerate(hand):
        means = np.mean(pairs, 0) if pairs else (0, 0)
        np.testing.assert_allclose(found.confidence[i], means[0], atol=1e-12)
        np.testing.assert_allclose(found.accuracy[i], means[1], atol=1e-12)
        error += len(pairs) / len(y) * abs(means[1] - means[0])
    seen = calibration.calibration_error(p, y, bins, adaptive)
    np.testing.assert_allclose(seen, error, atol=1e-12)


def test_certain_and_uniform():
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert calibration.calibration_error(sure, np.array([0, 1, 2, 0])) == 0
    assert calibration.calibration_error(sure, np.array([1, 2, 0, 1])) == 1
    assert calibration.brier(sure, np.array([1, 2, 0, 1])) == 2
    assert calibration.nll(sure, np.array([0, 1, 2, 0])) == 0
    np.testing.assert_allclose(
        calibration.nll(np.full((5, 4), 0.25), Y.repeat(2)[:5]), np.log(4)
    )


def test_floor_of_the_likelihood():
    """A wrong and certain example costs much, but no infinity."""
    found = calibration.nll(np.eye(2, dtype=np.float32), np.array([1, 1]))
    np.testing.assert_allclose(found, -np.log(np.finfo(np.float32).tiny) / 2, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class(label):
    with pytest.raises(ValueError, match="labels 0 to 2 wanted"):
        calibration.nll(P, np.array([0, 1, 2, label]))


@hypothesis.given(SCORES, SCORES)
def test_auroc_counts_pairs(inside, outside):
    pairs = np.subtract.outer(inside, outside)
    wanted = np.mean((pairs > 0) + (pairs == 0) / 2)
    found = calibration.auroc(np.array(inside, float), np.array(outside, float))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@hypothesis.given(SCORES, SCORES)
def test_fpr95_tries_all_thresholds(inside, outside):
    passed = {t: sum(s >= t for s in inside) for t in inside}
    threshold = max(t for t, count in passed.items() if 100 * count >= 95 * len(inside))
    wanted = np.mean([s >= threshold for s in outside])
    found = calibration.fpr95(np.array(inside, float), np.array(outside, float))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_separated_equal_and_undefined_scores():
    high, low = np.arange(20.0) + 100, np.arange(7.0)
    assert calibration.auroc(high, low) == 1 and calibration.auroc(low, high) == 0
    assert calibration.fpr95(high, low) == 0 and calibration.fpr95(low, high) == 1
    assert calibration.auroc(np.zeros(3), np.zeros(5)) == 0.5
    # One of twenty may fail: the threshold is the second lowest.
    assert calibration.fpr95(high, np.array([100.5, 101.0])) == 0.5
    assert np.isnan(calibration.auroc(high, np.array([1, np.nan])))
    assert calibration.auroc(np.array([np.inf, 1]), np.array([-np.inf])) == 1


@hypothesis.given(st.sampled_from([1, 5]), SHAPES, SEEDS)
def test_scores_against_scipy(count, shape, seed):
    n, classes = shape
    rng = np.random.default_rng(seed)
    samples = rng.dirichlet(np.full(classes, 0.5), (count, n))
    mean = samples.mean(0)
    np.testing.assert_allclose(calibration.confidence(mean), mean.max(1))
    whole = scipy.stats.entropy(mean, axis=-1)
    np.testing.assert_allclose(calibration.entropy(mean), whole, atol=1e-12)
    # The mean Kullback-Leibler divergence to the mixture: another formula.
    terms = scipy.special.rel_entr(samples, mean).sum(-1).mean(0)
    found = calibration.mutual_information(samples)
    np.testing.assert_allclose(found, terms, atol=1e-12)
    assert (np.asarray(found) >= 0).all()


def test_mutual_information_of_agreement_and_contradiction():
    same = np.tile([[0.5, 0.5]], (4, 1, 1))
    np.testing.assert_allclose(calibration.mutual_information(same), [0], atol=1e-15)
    split = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    np.testing.assert_allclose(calibration.mutual_information(split), [np.log(2)])


def test_half_precision_is_added_up_in_float64():
    p = np.full((5000, 2), 0.5, np.float16)
    found = calibration.nll(p, np.zeros(5000, int))
    np.testing.assert_allclose(found, np.log(2), rtol=1e-12)


@pytest.mark.parametrize("name", OF_LABELS)
@pytest.mark.parametrize(
    ("p", "y"),
    [
        (np.ones(3), np.zeros(3, int)),
        (P, Y[:3]),
        (P, Y[:, None]),
        (np.ones((0, 2)), np.zeros(0, int)),
        (np.ones((2, 2, 2)), np.zeros(2, int)),
    ],
    ids=["vector", "fewer", "matrix", "empty", "cube"],
)
def test_wrong_shapes_are_told(name, p, y):
    with pytest.raises(ValueError, match=r"probabilities \[n, classes\]"):
        getattr(calibration, name)(p, y)


def test_labels_that_are_no_integers():
    with pytest.raises(ValueError, match="wanted, got float64"):
        calibration.nll(P, Y.astype(float))
