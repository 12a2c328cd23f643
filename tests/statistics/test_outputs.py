"""The untapped loss: its outputs, numbers of terms and residuals against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.statistics.outputs import marked_loss
from tests.helpers import close

ROWS, FEATURES, UNITS = 5, 3, 4
MASK = np.array([True, False, True, True, False])


def arrays():
    """Parameters and inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (FEATURES, UNITS))}
    x = jax.random.normal(keys[1], (ROWS, FEATURES))
    return params, x, jax.random.uniform(keys[2], (ROWS, UNITS))


def mean(terms, masked):
    """Mean over the rows that count."""
    return jnp.mean(terms) if not masked else jnp.sum(terms * MASK) / MASK.sum()


def cases(kind, masked):
    """``(loss, residuals by formula)`` of a likelihood."""
    params, x, y = arrays()
    labels, mask = jnp.array([0, 3, 1, 2, 2]), jnp.asarray(MASK) if masked else None

    @jax.jit
    def loss(params, x, y):
        z = x @ params["w"]
        if kind == "categorical":
            z = kfac.categorical(z, mask)
            terms = optax.softmax_cross_entropy_with_integer_labels(z, labels)
        elif kind == "bernoulli":
            z = kfac.bernoulli(z, mask)
            terms = optax.sigmoid_binary_cross_entropy(z, y).sum(-1)
        else:
            z = kfac.normal(z, 4.0, mask)
            terms = jnp.sum((z - y) ** 2, -1) / 8
        return mean(terms, masked) + 0.1 * jnp.sum(params["w"] ** 2)

    z = x @ params["w"]
    wanted = {
        "categorical": jax.nn.softmax(z) - jax.nn.one_hot(labels, UNITS),
        "bernoulli": jax.nn.sigmoid(z) - y,
        # The mark is on mean / deviation, whose row's loss is (z' - y / 2)² / 2.
        "normal": (z - y) / 2,
    }[kind]
    return loss, wanted * MASK[:, None] if masked else wanted


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "normal"])
def test_residuals_are_those_of_the_formula(kind, masked):
    params, x, y = arrays()
    loss, wanted = cases(kind, masked)
    model = marked_loss(kfac.tag(loss, params, x, y), params, (x, y))
    (residual,) = model.residuals(params)
    close(residual, wanted, 1e-12)
    value, marks = model.values(params)
    close(value, loss(params, x, y), 1e-12)
    (output,) = model.outputs(marks)
    assert output.likelihood == kind and output.value.shape == (ROWS, UNITS)
    assert model.num_terms(marks) == (MASK.sum() if masked else ROWS)


def test_the_gradient_is_that_of_the_residuals():
    """``∇L = Jᵀ r / N`` without a regulariser, through forward and reverse mode."""
    params, x, y = arrays()

    def loss(params, x, y):
        z = kfac.normal(jnp.tanh(x @ params["w"]))
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1)), z

    tagged = kfac.tag(loss, params, x, y, has_aux=True)
    model = marked_loss(tagged, params, (x, y))
    (_, marks), pull = jax.vjp(model.values, params)
    (residual,) = model.residuals(params)
    (grads,) = pull((jnp.zeros(()), (residual / ROWS,)))
    close(grads, jax.grad(loss, has_aux=True)(params, x, y)[0], 1e-12)
    (_, marks), push = jax.linearize(model.values, params)
    change, (moved,) = push(params)
    close(change, jnp.sum(moved * residual) / ROWS, 1e-12)
    assert len(marks) == 1


def test_unmarked_losses_are_refused():
    params, x, y = arrays()
    tagged = kfac.tag(
        lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2), params, x, y,
        fisher="empirical",
    )  # fmt: skip
    with pytest.raises(ValueError, match="marked"):
        marked_loss(tagged, params, (x, y))


def test_the_variance_of_a_marked_normal_is_no_output(rng):
    """Sampled targets move the mean; how it was scaled for that has no curvature."""

    def loss(p, x, y):
        mean = kfac.normal(x @ p["w"], variance=jnp.exp(p["log_v"]))
        return jnp.mean((mean - y) ** 2)

    params = {"w": rng.normal(size=(4, 3)), "log_v": np.full(1, 0.3)}
    batch = rng.normal(size=(5, 4)), rng.normal(size=(5, 3))
    tagged = kfac.tag(loss, params, *batch, fisher="mc")
    key = jax.random.key(0)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, *batch, key=key)
    np.testing.assert_allclose(grads["log_v"], 0, atol=1e-12)
    np.testing.assert_allclose(statistics["log_v"].gradient, 0, atol=1e-12)
