"""The dual natural gradient against dense solves of the Fisher matrix."""

import hypothesis
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import close, leaves, random_like
from tests.models import mlp
from tests.tangents import (
    masked_loss,
    masked_setting,
    primal,
    ravel,
    setting,
    step_of,
)

CASES = [("cholesky", False), ("cholesky", True), ("qr", True)]
TINY = 1e-10


@pytest.mark.parametrize(("solver", "independent"), CASES)
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
@hypothesis.given(
    examples=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 4)),
    damping=st.floats(-6, 0).map(lambda power: 10.0**power),
    seed=st.integers(0, 10**6),
)
@hypothesis.settings(max_examples=2)
def test_dual_is_primal(
    likelihood, solver, independent, examples, sizes, damping, seed
):
    """Of the gradient, and of any vector, more outputs than parameters or fewer."""
    model = mlp("m", sizes, likelihood=likelihood, variance=0.5)
    params, batch = model.params(seed=seed), model.batch(examples, seed=seed + 1)
    tagged = model.tag(examples)
    tx = kfac.ntk.dual_natural_gradient(
        tagged, damping, solver=solver, independent=independent
    )
    fisher = oracles.dense_fisher(model, params, batch[0], fisher="exact")
    grads = jax.grad(model.plain_loss)(params, *batch)
    noise = random_like(np.random.default_rng(seed), params)
    decayed = jax.tree.map(lambda g, p: 0.3 * g + 0.01 * p, grads, params)

    @jax.jit
    @jax.vmap
    def step(vector):
        return tx.update(vector, tx.init(params), params, batch=batch)

    stacked = jax.tree.map(lambda *v: jnp.stack(v), grads, noise, decayed)
    updates, state = step(stacked)
    for i, vector in enumerate((grads, noise, decayed)):
        found = jax.tree.map(lambda u, i=i: u[i], updates)
        close(ravel(found), primal(fisher, ravel(vector), damping), 1e-8)
    assert state.count.tolist() == [1] * 3 and state.skipped.tolist() == [0] * 3


def graded(lead, parameters=30):
    """A linear model ``z = X θ`` whose ``X / √n`` has singular values 100 … 1e-6.

    With ``lead`` the residuals are the first singular vector, else of all of them.
    """
    rng, sigmas, n = np.random.default_rng(0), np.logspace(2, -6, 9), 9
    u, _ = np.linalg.qr(rng.normal(size=(n, n)))
    v, _ = np.linalg.qr(rng.normal(size=(parameters, n)))
    x = jnp.asarray(np.sqrt(n) * u * sigmas @ v.T)
    y = jnp.asarray(u[:, 0] if lead else u.sum(1))

    def loss(params, x, y):
        return 0.5 * jnp.mean((kfac.normal(x @ params["w"]) - y) ** 2)

    params = {"w": jnp.zeros(parameters)}
    weights = sigmas / (sigmas**2 + TINY) * (u.T @ np.asarray(y)) / np.sqrt(n)
    return kfac.tag(loss, params, x, y), params, (x, y), -v @ weights


def off(found, wanted):
    """Relative error of a vector."""
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("lead", "solver", "tolerance"),
    [(1, "cholesky", 1e-7), (1, "qr", 1e-9), (0, "cholesky", 2e-2), (0, "qr", 1e-7)],
)
def test_a_tiny_damping(lead, solver, tolerance):
    """``λ = 1e-10`` and ``λ_max = 1e4``; the answer is known without a solve."""
    tagged, params, batch, wanted = graded(lead)
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(tagged, TINY, solver=solver)
    found, _ = jax.jit(step_of(tx))(grads, params, batch)
    error = off(ravel(found), wanted)
    assert error < tolerance
    if lead:  # where Woodbury's formula takes the difference of equal numbers
        k = np.asarray(batch[0]) / 3
        inner = np.linalg.solve(k @ k.T + TINY * np.eye(9), k @ ravel(grads))
        assert error < off((ravel(grads) - k.T @ inner) / TINY, wanted) / 1000


def test_probabilities_that_vanish():
    """A confident and wrong classifier, whose ``Λ`` is zero to rounding."""
    tagged, params = (
        kfac.tag(linear_loss, {"w": jnp.eye(3)}, jnp.eye(3), jnp.arange(3)),
        {"w": jnp.eye(3)},
    )
    for height in (10.0, 200.0, 2000.0):
        batch = height * jnp.eye(3)[jnp.array([1, 2, 0])], jnp.arange(3)
        grads = jax.grad(linear_loss)(params, *batch)
        z = np.asarray(batch[0] @ params["w"])
        j = np.einsum("ni,ck->ncik", np.asarray(batch[0]), np.eye(3)).reshape(3, 3, 9)
        p = oracles.softmax(z)
        curvature = np.stack([np.diag(q) - np.outer(q, q) for q in p])
        fisher = np.einsum("ncp,nce,neq->pq", j, curvature, j) / 3
        for solver in ("cholesky", "qr"):
            tx = kfac.ntk.dual_natural_gradient(tagged, 0.1, solver=solver)
            u, _ = jax.jit(step_of(tx))(grads, params, batch)
            close(ravel(u), primal(fisher, ravel(grads), 0.1), 1e-9)


def linear_loss(params, x, y):
    """Cross entropy of a linear classifier."""
    z = kfac.categorical(x @ params["w"])
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def test_two_outputs():
    """A classifier and a regressor of the same trunk, their losses added."""
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "a": (4, 3), "b": (4, 2)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray([0, 1, 2, 1, 0])
    t = jnp.asarray(rng.normal(size=(5, 2)))

    def forward(p, x):
        h = jnp.tanh(x @ p["w"])
        return h @ p["a"], h @ p["b"]

    def loss(p, x, y, t):
        z, m = forward(p, x)
        terms = optax.softmax_cross_entropy_with_integer_labels(kfac.categorical(z), y)
        return terms.mean() + 0.5 * jnp.mean(jnp.sum((kfac.normal(m) - t) ** 2, -1))

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jz, jm = jax.jacrev(lambda v: forward(unravel(v), x))(flat)
    s = oracles.output_root("categorical", forward(params, x)[0])
    root = np.concatenate([
        np.einsum("nck,ncp->nkp", s, jz).reshape(15, -1),
        np.asarray(jm).reshape(10, -1),
    ])  # fmt: skip
    fisher = root.T @ root / 5
    tagged = kfac.tag(loss, params, x, y, t)
    grads = jax.grad(loss)(params, x, y, t)
    for solver, independent in (CASES[0], CASES[2]):
        tx = kfac.ntk.dual_natural_gradient(
            tagged, 1e-3, solver=solver, independent=independent
        )
        u, _ = jax.jit(step_of(tx))(grads, params, (x, y, t))
        close(ravel(u), primal(fisher, ravel(grads), 1e-3), 1e-9)
    with pytest.raises(
        ValueError, match=r"one marked output, got \[\(5, 3\), \(5, 2\)"
    ):
        kfac.ntk.kernel(tagged, params, (x, y, t))


@pytest.mark.parametrize(("solver", "independent"), CASES)
def test_rows_that_do_not_count(solver, independent):
    params, batch, z, jacobian = masked_setting()
    tagged = kfac.tag(masked_loss, params, *batch)
    count = np.asarray(batch[2]).reshape(-1)
    j = np.asarray(jacobian) * count[:, None, None]
    root = np.einsum("nck,ncp->nkp", oracles.output_root("categorical", z), j)
    root = root.reshape(-1, j.shape[-1])
    fisher = root.T @ root / count.sum()
    grads = jax.grad(masked_loss)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(
        tagged, 0.01, solver=solver, independent=independent
    )
    u, _ = jax.jit(step_of(tx))(grads, params, batch)
    close(ravel(u), primal(fisher, ravel(grads), 0.01), 1e-9)


# ---------------------------------------------------------------- errors


def test_errors_say_what_was_seen():
    model, tagged, params, (x, y) = setting("mlp", 4)
    grads = jax.grad(model.plain_loss)(params, x, y)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"batch=\(x, y, …\).*batch of type.*None"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="batch of type.*list"):
        tx.update(grads, state, params, batch=[x, y])
    with pytest.raises(ValueError, match="params of type.*None"):
        tx.update(grads, state, batch=(x, y))

    def shared(params, x, y, scale):
        return model.loss(params, scale * x, y)

    mixed = kfac.tag(shared, params, x, y, jnp.ones(3)[0])
    with pytest.raises(ValueError, match=r"\[\(4, 4\), \(4,\), \(\)\].*\[\(4, 3\)\]"):
        kfac.ntk.kernel(mixed, params, (x, y, jnp.ones(())), independent=True)
    unmarked = kfac.tag(model.plain_loss, params, x, y)
    with pytest.raises(ValueError, match=r"marked"):
        kfac.ntk.kernel(unmarked, params, (x, y))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"damping": 0.0}, ValueError),
        ({"damping": "small"}, TypeError),
        ({"damping": kfac.damping.adaptive()}, TypeError),
        ({"damping": kfac.damping.levenberg_marquardt()}, TypeError),
        ({"damping": 0.1, "solver": "lu"}, ValueError),
        ({"damping": 0.1, "chunk": 0}, ValueError),
        ({"damping": 0.1, "chunk": True}, ValueError),
    ],
    ids=str,
)
def test_wrong_options(options, error):
    tagged = setting("mlp")[1]
    with pytest.raises(error):
        kfac.ntk.dual_natural_gradient(tagged, **options)


def test_every_parameter_is_updated():
    """None is left out, whatever its layer is to K-FAC."""
    _, tagged, params, batch = setting("layer_norm", 4)
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1)
    found, _ = jax.jit(step_of(tx))(grads, params, batch)
    assert all(np.asarray(leaf).any() for leaf in leaves(found).values())
