"""Variational Monte Carlo as in ferminet: a determinant, the energy's own gradient.

Two fermions on a line in a harmonic trap; the exact energy is 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests.acceptance.clients import (
    check_factors,
    coverage,
    linear,
    make_linear,
    notes,
    train,
    unseen,
)
from tests.helpers import cases

WALKERS = 7


def make_params(dtype=float):
    params = {
        "one": make_linear(0, 4, 5),
        "two": make_linear(1, 10, 5),
        "orbitals": make_linear(2, 5, 4),
        "envelope": {"rate": jnp.linspace(0.8, 1.2, 4)},
        "jastrow": make_linear(3, 2, 1),
    }
    return jax.tree.map(lambda p: p.astype(dtype), params)


def log_psi(p, x, see=unseen):
    """``log |Σ_d det φ_d|`` for the positions ``x [2]`` of one walker."""
    gap = x[:, None] - x
    h = jnp.stack([x, x**2, gap.sum(1), (gap**2).sum(1)], -1)
    h = jnp.tanh(linear(p, "one", h, see))
    mean = jnp.broadcast_to(h.mean(0), h.shape)
    h = h + jnp.tanh(linear(p, "two", jnp.concatenate([h, mean], -1), see))
    phi = linear(p, "orbitals", h, see)
    phi = phi * jnp.exp(-0.5 * x[:, None] ** 2 * p["envelope"]["rate"])
    signs, logs = jnp.linalg.slogdet(phi.reshape(2, 2, 2).transpose(1, 0, 2))
    top = jax.lax.stop_gradient(logs.max())
    total = jnp.log(jnp.abs(jnp.sum(signs * jnp.exp(logs - top)))) + top
    pair = jnp.stack([jnp.abs(gap[0, 1]), gap[0, 1] ** 2])
    return total + jnp.tanh(linear(p, "jastrow", pair, see))[0] * 0.1


def local_energy(p, x):
    """``−½ (Δ log ψ + |∇ log ψ|²) + ½ x²``."""
    slope = jax.grad(log_psi, 1)
    rows = jax.vmap(lambda v: jax.jvp(lambda y: slope(p, y), (x,), (v,))[1])
    laplacian = jnp.trace(rows(jnp.eye(2, dtype=x.dtype)))
    return -0.5 * (laplacian + (slope(p, x) ** 2).sum()) + 0.5 * (x**2).sum()


def over_walkers(f):
    return jax.vmap(f, (None, 0))


def surrogate(p, x):
    """Its gradient is the energy's; its value is none."""
    energy = jax.lax.stop_gradient(over_walkers(local_energy)(p, x))
    logs = kfac.normal(over_walkers(log_psi)(p, x))
    return 2 * ((energy - energy.mean()) * logs).mean()


@jax.custom_jvp
def energy_loss(p, x):
    """Mean local energy, with the derivative that sampling wants."""
    return over_walkers(local_energy)(p, x).mean()


@energy_loss.defjvp
def energy_jvp(primals, tangents):
    p, x = primals
    energy = over_walkers(local_energy)(p, x)
    _, slopes = jax.jvp(lambda p: over_walkers(log_psi)(p, x), (p,), tangents[:1])
    return energy.mean(), 2 * ((energy - energy.mean()) * slopes).mean()


def marked(p, x):
    return kfac.normal(over_walkers(log_psi)(p, x))


def tag(form, params, x):
    if form == "surrogate":
        return surrogate, kfac.tag(surrogate, params, x, fisher="exact")
    own = {"fisher": "exact", "curvature": marked}
    return energy_loss, kfac.tag(energy_loss, params, x, **own)


def walkers(dtype=float):
    return 0.8 * jax.random.normal(jax.random.key(9), (WALKERS, 2), dtype)


@pytest.mark.parametrize("form", cases(["surrogate", "curvature"], ["curvature"]))
def test_blocks(form):
    """The energy of walkers that stay where they are need not fall, nor is it asked."""
    params, x = make_params(), walkers()
    loss, tagged = tag(form, params, x)
    assert coverage(tagged) == 1, tagged
    assert notes(tagged) == {}
    statistics, _ = train(loss, params, (x,), tagged)
    part = 1 / WALKERS, lambda x, see: log_psi(params, x, see), x, "normal"
    for name in ("one", "two", "orbitals", "jastrow"):
        check_factors(statistics, name, [part])
    scale = statistics["envelope"].blocks
    s = jax.jit(over_walkers(jax.grad(log_psi)))(params, x)["envelope"]["rate"]
    np.testing.assert_allclose(scale[:, 0, 0], (s**2).mean(0), rtol=1e-9)


@pytest.mark.parametrize("form", cases(["surrogate", "curvature"], ["surrogate"]))
def test_gradient_is_the_covariance_formula(form):
    """``∇E = 2 mean((E_L − Ē) ∇ log|ψ|)`` in float32."""
    with jax.enable_x64(False):
        params, x = make_params(jnp.float32), walkers(jnp.float32)
        _, tagged = tag(form, params, x)
        _, grads, _ = jax.jit(tagged.value_and_grad)(params, x)
        energy = jax.jit(over_walkers(local_energy))(params, x)
        slopes = jax.jit(over_walkers(jax.grad(log_psi)))(params, x)

    def formula(o):
        o, e = np.asarray(o, np.float64), np.asarray(energy, np.float64)
        return 2 * np.einsum("n,n...->...", e - e.mean(), o) / len(e)

    wanted = jax.tree.map(formula, slopes)
    size = max(np.abs(w).max() for w in jax.tree.leaves(wanted))
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6 * max(size, 1), rtol=1e-5)


def test_fisher_is_that_of_log_derivatives_not_centred():
    """``F = mean(∇log|ψ| ∇log|ψ|ᵀ)``, nothing subtracted."""
    params, x = make_params(), walkers()
    tagged = tag("curvature", params, x)[1]
    operator = kfac.curvature.fisher(tagged, params, [(x,)])
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    slope = jax.grad(lambda f, x: log_psi(unravel(f), x))
    slopes = jax.jit(over_walkers(slope))(flat, x)
    v = jnp.sin(1.0 * jnp.arange(len(flat)))
    seen = jax.flatten_util.ravel_pytree(operator.mv(unravel(v)))[0]
    np.testing.assert_allclose(seen, slopes.T @ (slopes @ v) / WALKERS, atol=1e-9)
