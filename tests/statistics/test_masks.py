"""Padding does not count: a mask leaves the statistics of the rows that do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import cases, close

MASK = jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)


def masked_loss(p, x, y, mask):
    """Mean over the tokens that count, of a network that sees each token alone."""
    z = jnp.tanh(x @ p["w"] + p["b"]) * p["s"] @ p["v"]
    z = kfac.categorical(z, mask=mask)
    terms = jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]
    return -jnp.where(mask, terms, 0).sum() / mask.sum()


def data(rng):
    params = {
        "w": rng.normal(size=(3, 4)), "b": rng.normal(size=4),
        "s": rng.normal(size=4), "v": rng.normal(size=(4, 5)),
    }  # fmt: skip
    x, y = rng.normal(size=(4, 3, 3)), rng.integers(0, 5, (4, 3))
    return jax.tree.map(jnp.asarray, (params, x, y))


EVERY = itertools.product(["empirical", "exact"], ["expand", "reduce"])
FAST = [("empirical", "reduce"), ("exact", "expand")]


@pytest.mark.parametrize(("fisher", "sharing"), cases(EVERY, FAST))
def test_padded_tokens_are_not_there(rng, fisher, sharing):
    params, x, y = data(rng)
    options = {"fisher": fisher, "weight_sharing": sharing}
    tagged = kfac.tag(masked_loss, params, x, y, MASK, **options)
    seen = jax.jit(tagged.value_and_grad)(params, x, y, MASK)
    left = (x[MASK], y[MASK], jnp.ones(int(MASK.sum()), bool))
    plain = kfac.tag(masked_loss, params, *left, **options)
    wanted = jax.jit(plain.value_and_grad)(params, *left)
    assert {t.kind for t in tagged.layers} == {"dense", "scale_shift"}
    close(seen, wanted, 1e-9)
    unmasked = jax.jit(jax.value_and_grad(masked_loss))(params, x, y, MASK)
    close(seen[:2], unmasked, 1e-10)


def test_skipped_layers_cost_nothing_and_return_zeros(rng):
    params, x, y = data(rng)
    tagged = kfac.tag(masked_loss, params, x, y, MASK)
    tx = kfac.scale_by_kfac(tagged.layers, interval=kfac.intervals.every(2))
    state, run = tx.init(params), jax.jit(tagged.value_and_grad)
    _, grads, first = run(params, x, y, MASK, opt_state=state)
    _, state = tx.update(grads, state, params, statistics=first)
    later = run(params, x, y, MASK, opt_state=state)[-1]
    assert all(np.any(v) for v in jax.tree.leaves(first))
    assert not any(np.any(v) for v in jax.tree.leaves(later))


def test_mc_samples_only_rows_that_count(rng):
    """With every row masked but one, G is the second moment of one row's cotangent."""
    params, x, y = data(rng)
    mask = jnp.zeros_like(MASK).at[2, 1].set(True)
    tagged = kfac.tag(masked_loss, params, x, y, mask, fisher="mc")
    key = jax.random.key(3)
    found = jax.jit(tagged.value_and_grad)(params, x, y, mask, key=key)[-1]
    hidden = np.tanh(x[2, 1] @ params["w"] + params["b"]) * params["s"]
    close(found["v"].a, np.outer(hidden, hidden), 1e-10)
    assert np.linalg.matrix_rank(found["v"].g, 1e-9) == 1


def test_positions_of_a_classifier_are_averaged_over_what_counts(rng):
    """Padding inside the network: a mask of ones for the terms switches it on."""
    params = {
        "w": jnp.asarray(rng.normal(size=(3, 4))),
        "v": jnp.asarray(rng.normal(size=(4, 2))),
    }
    x, y = jnp.asarray(rng.normal(size=(4, 3, 3))), jnp.asarray([0, 1, 1, 0])
    length = jnp.maximum(MASK.sum(1), 1)
    mask = MASK.at[3, 0].set(True)

    def loss(p, x, y, mask):
        h = jnp.where(mask[..., None], jnp.tanh(x @ p["w"]), 0).sum(1)
        z = kfac.categorical(h / length[:, None] @ p["v"], mask=jnp.ones(4, bool))
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

    for sharing in ("expand", "reduce"):
        tagged = kfac.tag(loss, params, x, y, mask, weight_sharing=sharing)
        found = jax.jit(tagged.value_and_grad)(params, x, y, mask)[-1]["w"].a
        rows = np.asarray(x[mask])
        if sharing == "reduce":
            rows = np.where(mask[..., None], x, 0).sum(1) / length[:, None]
        close(found, rows.T @ rows / 4, 1e-10)


def tied_loss(first):
    """A classifier: the mean over what counts of an example, then the same weight."""

    def loss(p, x, y, mask, shift=(0.0, 0.0)):
        inside, terms = mask[..., None], mask.any(1)
        h = jnp.where(inside, jnp.tanh(first(p, x) + shift[0]), 0).sum(1)
        z = h / jnp.maximum(inside.sum(1), 1) @ p["w"].T + shift[1]
        z = kfac.categorical(z, mask=terms)
        found = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1)[:, 0]
        return -jnp.where(terms, found, 0).sum() / terms.sum()

    return loss


FIRST = {
    "dense": lambda p, x: x @ p["w"],
    "table": lambda p, x: p["w"][jnp.argmax(x, -1)],
}


@pytest.mark.parametrize("kind", FIRST)
def test_a_tied_weight_reduces_what_counts(rng, kind):
    """Each use by itself: means of inputs and sums of cotangents over what counts."""
    loss, x = tied_loss(FIRST[kind]), jnp.asarray(rng.normal(size=(4, 3, 3)))
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)))}
    args = (x, jnp.asarray([0, 1, 2, 0]), MASK)
    tagged = kfac.tag(loss, params, *args, weight_sharing="reduce")
    found = jax.jit(tagged.value_and_grad)(params, *args)[-1]["w"]
    zeros = (jnp.zeros((4, 3, 4)), jnp.zeros((4, 3)))
    inner, outer = jax.grad(lambda s: loss(params, *args, s))(zeros)
    length, terms = np.maximum(MASK.sum(1), 1)[:, None], 3
    rows = x if kind == "dense" else np.eye(3)[np.argmax(x, -1)]
    mean = np.where(MASK[..., None], rows, 0).sum(1) / length
    h = np.tanh(FIRST[kind](params, x))
    a, a_out = mean, np.where(MASK[..., None], h, 0).sum(1) / length
    g, g_out = inner.sum(1), outer
    wanted = [a.T @ a / terms, g.T @ g * terms, a_out.T @ a_out / terms]
    wanted.append(g_out.T @ g_out * terms)
    if kind == "table":  # its inputs' side is kept as a diagonal
        wanted[0], wanted[3] = np.diag(wanted[0]), np.diag(wanted[3])
    close([found.a, found.g, found.a_out, found.g_out], wanted, 1e-10)


def test_quadratic_model_counts_the_same_terms(rng):
    params, x, y = data(rng)
    vector = jax.tree.map(jnp.ones_like, params)
    gram = []
    for args in ((x, y, MASK), (x[MASK], y[MASK], jnp.ones(6, bool))):
        model = kfac.quadratic_model(
            kfac.tag(masked_loss, params, *args), params, *args
        )
        gram.append(model.products([vector])[-1])
    close(*gram, 1e-10)


def test_the_mask_must_fit():
    with pytest.raises(ValueError, match=r"mask has shape \(4,\), wanted \(4, 3\)"):
        kfac.categorical(jnp.ones((4, 3, 5)), mask=jnp.ones(4))


def test_without_a_mask_dead_rows_count(rng):
    """A row whose units are all off still is a row of ``A``."""
    model = models.mlp(act=jax.nn.relu)
    params, (x, y) = model.params(), model.batch(4)
    found = model.tag(4).value_and_grad(params, x, y)[-1]["layer0"].a
    rows = np.concatenate([x, np.ones((4, 1))], 1)
    close(found, rows.T @ rows / 4)
