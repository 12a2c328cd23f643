"""``doctor`` on marks and losses that do not belong together, and on those that do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.diagnostics.doctor.doctor import (
    doctor,
    labels,
    marks,
    seen_outputs,
)
from tests.patients import kinds

ROWS, CLASSES = 12, 5
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(4, CLASSES)))
X = jnp.asarray(RNG.normal(size=(ROWS, 4)))
Y = jnp.asarray(RNG.integers(0, CLASSES, ROWS))
TARGETS = jnp.asarray(RNG.normal(size=(ROWS, CLASSES)))
BITS = jnp.asarray(RNG.integers(0, 2, (ROWS, CLASSES)), jnp.float64)
ADVANTAGES = jnp.asarray(RNG.normal(size=ROWS))
CLASS_WEIGHTS = jnp.linspace(0.5, 2.0, CLASSES)


def cross_entropy(z, y=Y):
    return optax.softmax_cross_entropy_with_integer_labels(z, y)


def squares(z):
    return 0.5 * jnp.sum((z - TARGETS) ** 2, -1)


def bits(z):
    return jnp.sum(optax.sigmoid_binary_cross_entropy(z, BITS), -1)


def log_of(p):
    return -jnp.log(p[jnp.arange(ROWS), Y])


def log_of_bits(p):
    return -jnp.sum(BITS * jnp.log(p) + (1 - BITS) * jnp.log1p(-p), -1)


def smoothed(z):
    labels = optax.smooth_labels(jax.nn.one_hot(Y, CLASSES), 0.1)
    return optax.softmax_cross_entropy(z, labels)


def penalised(z):
    """The z-loss of language models."""
    return cross_entropy(z) + 1e-4 * jax.nn.logsumexp(z, -1) ** 2


def clipped(z):
    """A clipped policy ratio, as in proximal policy optimisation."""
    ratio = jnp.exp(-cross_entropy(z) + jax.lax.stop_gradient(cross_entropy(z)) + 0.1)
    return -jnp.minimum(ratio * ADVANTAGES, jnp.clip(ratio, 0.8, 1.2) * ADVANTAGES)


def found(mark, rows, reduce=jnp.mean):
    """Findings about a loss's marks, without any optimiser."""

    def loss(w, x):
        return reduce(rows(mark(x @ w)))

    tagged = kfac.tag(loss, W, X)
    seen = seen_outputs(tagged, tagged.trace(W, (X,), False), W, (X,))
    return list(marks(seen))


RIGHT = {
    "categorical": (kfac.categorical, cross_entropy),
    "bernoulli": (kfac.bernoulli, bits),
    "normal": (kfac.normal, squares),
    "variance": (
        lambda z: kfac.normal(z, 4.0), lambda z: squares(z) / 4.0,
    ),
    "soft labels": (kfac.categorical, smoothed),
    "penalty": (kfac.categorical, penalised),
    "logarithms": (
        lambda z: kfac.categorical(jax.nn.log_softmax(z)),
        lambda z: -z[jnp.arange(ROWS), Y],
    ),
    "policy": (kfac.categorical, lambda z: ADVANTAGES * cross_entropy(z)),
    "without a half": (kfac.normal, lambda z: 2 * squares(z)),
    "weight": (
        lambda z: kfac.categorical(z, weight=7.0), lambda z: 7 * cross_entropy(z),
    ),
    "weights": (
        lambda z: kfac.categorical(z, weight=CLASS_WEIGHTS[Y]),
        lambda z: CLASS_WEIGHTS[Y] * cross_entropy(z),
    ),
}  # fmt: skip

WRONG = {
    "probabilities": (lambda z: kfac.categorical(jax.nn.softmax(z)), log_of, None),
    "sigmoid": (lambda z: kfac.bernoulli(jax.nn.sigmoid(z)), log_of_bits, None),
    "mean sigmoid": (
        lambda z: kfac.bernoulli(jax.nn.sigmoid(z)),
        lambda p: log_of_bits(p) / CLASSES, None,
    ),
    "normal of classes": (kfac.normal, cross_entropy, "categorical"),
    "normal of bits": (kfac.normal, bits, "bernoulli"),
    "classes of squares": (kfac.categorical, squares, "normal"),
    "classes of bits": (kfac.categorical, bits, "bernoulli"),
    "bits of classes": (kfac.bernoulli, cross_entropy, "categorical"),
    "no softmax": (kfac.categorical, lambda z: jnp.sum(jnp.cosh(z), -1), None),
}  # fmt: skip

UNUSUAL = {
    "class weights": (kfac.categorical, lambda z: CLASS_WEIGHTS[Y] * cross_entropy(z)),
    "huber": (kfac.normal, lambda z: optax.huber_loss(z, TARGETS).sum(-1)),
    "clipped policy": (kfac.categorical, clipped),
    "temperature": (kfac.categorical, lambda z: cross_entropy(z / 3)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_marks_that_fit(name):
    assert found(*RIGHT[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_marks_that_do_not_fit(name):
    mark, rows, likelihood = WRONG[name]
    (finding,) = found(mark, rows)
    assert (finding.kind, finding.severity) == ("wrong_mark", "error")
    assert finding.numbers.get("likelihood") == likelihood
    if likelihood is not None:
        assert finding.numbers["weight"] == pytest.approx(1, rel=1e-3)
        assert f"kfac.{likelihood}" in finding.advice
    assert ("logits" in finding.advice) == (likelihood is None)


@pytest.mark.parametrize("name", UNUSUAL)
def test_losses_that_are_meant_so_are_no_errors(name):
    assert {(f.kind, f.severity) for f in found(*UNUSUAL[name])} <= {
        ("wrong_mark", "notice")
    }


@pytest.mark.parametrize("name", ["categorical", "normal"])
def test_sums_by_their_scale(name):
    """``n · mean`` with a constant, which a batch that is doubled does not show."""
    mark, rows = RIGHT[name]
    for half in (1, 2) if name == "normal" else (1,):
        (finding,) = found(mark, rows, lambda x, k=half: k * ROWS * jnp.mean(x))
        assert (finding.kind, finding.severity) == ("loss_is_a_sum", "error")
        assert finding.numbers["weight"] == pytest.approx(half * ROWS)


@pytest.mark.parametrize("weight", [100.0, 0.01])
def test_losses_that_are_scaled(weight):
    (finding,) = found(*RIGHT["categorical"], lambda x: weight * jnp.mean(x))
    assert (finding.kind, finding.severity) == ("loss_is_scaled", "warning")
    assert finding.numbers["weight"] == pytest.approx(weight)
    assert f"weight={weight:.3g}" in finding.advice
    said = lambda z: kfac.categorical(z, weight=weight)  # noqa: E731
    assert found(said, cross_entropy, lambda x: weight * jnp.mean(x)) == []
    (finding,) = found(said, cross_entropy)
    assert finding.numbers["weight"] == pytest.approx(1 / weight)
    assert "weight=1 " in finding.advice


def test_rows_that_do_not_count():
    """Under a mask, and of the mean over those that count."""
    mask = jnp.arange(ROWS) < 7
    mean = lambda x: jnp.sum(jnp.where(mask, x, 0)) / 7  # noqa: E731
    mark = lambda z: kfac.categorical(z, mask=mask)  # noqa: E731
    assert found(mark, cross_entropy, mean) == []
    (finding,) = found(mark, cross_entropy, lambda x: 7 * mean(x))
    assert finding.kind == "loss_is_a_sum"


def test_several_marks():
    """Weights of several terms are measured; a wrong one of them is named."""

    def loss(w, x, right):
        z = kfac.categorical(x @ w)
        out = (kfac.normal if right else kfac.bernoulli)(x @ w[:, :2])
        error = 0.5 * jnp.sum((out - TARGETS[:, :2]) ** 2, -1)
        return jnp.mean(cross_entropy(z)) + 50 * jnp.mean(error)

    for right in (True, False):
        tagged = kfac.tag(lambda w, x, right=right: loss(w, x, right), W, X)
        traced = tagged.trace(W, (X,), False)
        said = list(marks(seen_outputs(tagged, traced, W, (X,))))
        assert [f.numbers["output"] for f in said] == ([] if right else [1])


def test_a_loss_without_forward_mode():
    """The gradient alone tells: of a normal mark nothing, of probabilities all."""

    @jax.custom_vjp
    def mean(x):
        return jnp.mean(x)

    mean.defvjp(lambda x: (jnp.mean(x), x), lambda x, g: (g * jnp.ones_like(x) / ROWS,))
    assert found(kfac.categorical, cross_entropy, mean) == []
    mark, rows, _ = WRONG["probabilities"]
    (finding,) = found(mark, rows, mean)
    assert finding.severity == "error"


def of_labels(w, x, y):
    return jnp.mean(cross_entropy(kfac.categorical(x @ w), y))


def trained(batch):
    """The tagged loss and a state after one step on a batch."""
    tagged = kfac.tag(of_labels, W, X, Y)
    tx = kfac.kfac(tagged.layers, 0.1)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(W, *batch)
    return tagged, tx.update(grads, tx.init(W), W, statistics=statistics)[1]


def labelled(loss, y):
    """What is found in labels, if the loss is NaN."""
    tagged = kfac.tag(loss, W, X, Y)
    seen = seen_outputs(tagged, tagged.trace(W, (X, y), False), W, (X, y))
    return list(labels(seen, (X, y), float("nan")))


def test_labels_out_of_range():
    """Labels from 1 to 5, and −1 for padding: NaN from the first step on."""
    batch = X, Y + 1
    tagged, state = trained(batch)
    said = {f.kind: f for f in doctor(tagged, state, batch, W)}
    assert set(said) == {"loss_not_finite", "labels_out_of_range"}
    finding = said["labels_out_of_range"]
    assert finding.severity == "error"
    assert finding.numbers == {
        "argument": "args[1]", "least": int(Y.min()) + 1, "largest": CLASSES,
        "count": CLASSES,
    }  # fmt: skip
    (finding,) = labelled(of_labels, Y.at[0].set(-1))
    assert finding.numbers["least"] == -1
    assert labelled(of_labels, Y) == []


def test_every_batch_skipped():
    """A NaN in the inputs from the first batch on; one bad batch of two is not all."""
    tagged, state = trained((X.at[0].set(jnp.nan), Y))
    (finding,) = doctor(tagged, state)
    assert (finding.kind, finding.severity) == ("every_batch_skipped", "error")
    assert finding.numbers == {"skipped": 1, "steps": 0}
    tx = kfac.kfac(tagged.layers, 0.1)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(W, X, Y)
    _, state = tx.update(grads, state, W, statistics=statistics)
    assert "skipped_batches" in kinds(doctor(tagged, state))
    assert "every_batch_skipped" not in kinds(doctor(tagged, state))


def test_labels_under_a_mask_may_be_anything():
    mask = jnp.arange(ROWS) > 0

    def loss(w, x, y):
        return jnp.mean(cross_entropy(kfac.categorical(x @ w, mask=mask), y))

    bad = Y.at[0].set(-100)
    assert labelled(loss, bad) == []
    (finding,) = labelled(loss, bad.at[1].set(9))
    assert finding.numbers["largest"] == 9


def test_unbatched_uses():
    """A weight that meets single vectors beside its layer; and one that does not."""

    def loss(p, x, probe):
        norm = jnp.sum((probe @ p["w"]) ** 2) if probe is not None else 0.0
        return 0.5 * jnp.mean(jnp.sum(kfac.normal(x @ p["w"]) ** 2, -1)) + norm

    for probe, wanted in ((jnp.ones((1, 4)), {"unbatched_use"}), (None, set())):
        tagged = kfac.tag(loss, {"w": W}, X, probe)
        state = kfac.kfac(tagged.layers, 0.1).init({"w": W})
        said = doctor(tagged, state)
        assert kinds(said) - {"no_steps"} == wanted
        assert all(f.layer == "w" for f in said if f.kind in wanted)
