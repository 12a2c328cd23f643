"""Measures of matrices against dense linear algebra."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.curvature import measures
from tests import models
from tests.helpers import batches_of, close

SIZE = 12
LIKE = {
    "a": jax.ShapeDtypeStruct((3, 3), jnp.float64),
    "b": jax.ShapeDtypeStruct((3,), jnp.float64),
}


@dataclasses.dataclass(frozen=True)
class Dense:
    """A matrix that streams its products on the host."""

    matrix: np.ndarray
    structure: Any = dataclasses.field(default_factory=lambda: dict(LIKE))

    def mv(self, v):
        flat = np.concatenate([np.ravel(v["a"]), np.ravel(v["b"])])
        image = jnp.asarray(self.matrix @ flat)
        return {"a": image[:9].reshape(3, 3), "b": image[9:]}

    def to_dense(self):
        return jnp.asarray(self.matrix)

    def eigenvalues(self):
        return np.linalg.eigvalsh(self.matrix)[::-1]


def random(seed, rank=SIZE):
    """A positive semidefinite matrix."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, rank))
    return Dense(root @ root.T / rank)


def within(found, exact, errors=5.0):
    """A stochastic figure is near the exact one, and its error is not idle."""
    assert abs(found.value - exact) <= errors * found.error
    assert found.error < 0.5 * abs(exact)


@pytest.mark.parametrize("damping", [1e-3, 0.3, 10.0])
def test_effective_dimension(damping):
    m = random(0, rank=7)
    wanted = np.trace(m.matrix @ np.linalg.inv(m.matrix + damping * np.eye(SIZE)))
    exact = measures.effective_dimension(m, damping)
    np.testing.assert_allclose(exact.value, wanted, rtol=1e-9)
    assert exact.error == 0
    found = measures.effective_dimension(m, damping, jax.random.key(0), 64)
    within(found, wanted)


def test_stable_rank():
    m = random(1)
    norm = np.linalg.norm(m.matrix) ** 2 / np.linalg.norm(m.matrix, 2) ** 2
    np.testing.assert_allclose(measures.stable_rank(m).value, norm, rtol=1e-9)
    within(measures.stable_rank(m, jax.random.key(0), 64), norm)
    signed = Dense(np.diag(np.arange(SIZE) - 9.0))
    wanted = np.sum((np.arange(SIZE) - 9.0) ** 2) / 81
    np.testing.assert_allclose(measures.stable_rank(signed).value, wanted, rtol=1e-9)
    within(measures.stable_rank(signed, jax.random.key(1), 64), wanted)
    assert measures.stable_rank(Dense(np.zeros((SIZE, SIZE)))).value == 0


def test_condition_number():
    m = random(2)
    found = measures.condition_number(m, jax.random.key(0), 0.5)
    shifted = m.matrix + 0.5 * np.eye(SIZE)
    np.testing.assert_allclose(found, np.linalg.cond(shifted), rtol=1e-6)
    singular = Dense(np.diag([0.0] * 2 + [1.0] * (SIZE - 2)) - 1e-3 * np.eye(SIZE))
    assert measures.condition_number(singular, jax.random.key(0)) == np.inf


def test_takeuchi():
    c, h = random(3, rank=5), random(4)
    wanted = np.trace(c.matrix @ np.linalg.inv(h.matrix + 0.1 * np.eye(SIZE)))
    exact = measures.trace_of_quotient(c, h, 0.1)
    np.testing.assert_allclose(exact.value, wanted, rtol=1e-9)
    within(measures.trace_of_quotient(c, h, 0.1, jax.random.key(0), 80), wanted)
    found = measures.tic(c, h, 50, 0.1, jax.random.key(0), 80)
    np.testing.assert_allclose(
        [found.value * 50, found.error * 50],
        measures.trace_of_quotient(c, h, 0.1, jax.random.key(0), 80),
    )
    other = Dense(h.matrix, {"w": jax.ShapeDtypeStruct((SIZE,), jnp.float64)})
    with pytest.raises(ValueError, match="different parameters"):
        measures.trace_of_quotient(c, other, 0.1)


def test_conjugate_gradients():
    m = random(5).matrix + np.eye(SIZE)
    b = jnp.asarray(np.random.default_rng(0).normal(size=SIZE))
    x = measures.conjugate_gradients(lambda v: jnp.asarray(m @ v), b, 50, 1e-12)
    np.testing.assert_allclose(x, np.linalg.solve(m, b), rtol=1e-9)
    one = measures.conjugate_gradients(lambda v: jnp.asarray(m @ v), b, 1, 1e-12)
    np.testing.assert_allclose(one, b * (b @ b) / (b @ m @ b), rtol=1e-12)


def test_sharpness_of_a_quadratic_is_that_of_its_steepest_direction():
    """``½ δᵀ H δ`` on the ball is at most ``½ ρ² λ_max``."""
    h = jnp.asarray(random(6).matrix)
    start = {"w": 1e-3 * jnp.ones(SIZE)}
    values, vectors = np.linalg.eigh(h)

    def loss(params):
        return 0.5 * params["w"] @ h @ params["w"]

    rise, delta = measures.sharpness(loss, start, 0.5, 200)
    np.testing.assert_allclose(jnp.linalg.norm(delta["w"]), 0.5, rtol=1e-9)
    np.testing.assert_allclose(rise, loss({"w": start["w"] + delta["w"]}) - loss(start))
    assert 0.98 < rise / (0.5 * 0.25 * values[-1]) < 1.05
    assert abs(delta["w"] @ vectors[:, -1]) > 0.49
    flat, none = measures.sharpness(lambda p: jnp.sum(0 * p["w"]), start, 0.5)
    assert flat == 0
    close(none, {"w": jnp.zeros(SIZE)}, 0)


def test_operators_are_measured():
    """Exact figures of a network's matrices lie within the stochastic ones' errors."""
    model = models.BY_NAME["mlp"]
    params, batches = model.params(), batches_of(model, 3)
    tagged = model.tag(4)
    ggn = kfac.curvature.ggn(tagged, params, batches)
    covariance = kfac.curvature.gradient_covariance(tagged, params, batches)
    key = jax.random.key(0)
    for figure in (
        lambda key: measures.effective_dimension(ggn, 0.1, key),
        lambda key: measures.stable_rank(ggn, key, 64),
        lambda key: measures.tic(covariance, ggn, 12, 0.1, key, 64),
    ):
        within(figure(key), figure(None).value)


def test_wrong_numbers():
    with pytest.raises(ValueError, match="above 0"):
        measures.effective_dimension(random(0), 0.0)
    with pytest.raises(ValueError, match="above 0"):
        measures.sharpness(lambda p: jnp.sum(p["w"]), {"w": jnp.ones(2)}, 0.0)
