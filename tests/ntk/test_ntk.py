"""The tangent kernel and its spectrum against explicit Jacobians."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import cases, close
from tests.tangents import masked_loss, masked_setting, setting

MODELS = ["mlp", "conv2d", "bernoulli", "normal", "language", "batch_norm_flat"]
BOTH = pytest.mark.parametrize("independent", [False, True], ids=["coupled", "alone"])


def marked_jacobian(model, params, x):
    """``J`` of what is marked, ``[n, C, P]``: a normal mean over its deviation."""
    scale = np.sqrt(model.variance) if model.likelihood == "normal" else 1.0
    return oracles.parameter_jacobian(model, params, x) / scale


FAST = [("mlp", False), ("mlp", True), ("normal", False), ("language", True)]
FAST += [("batch_norm_flat", False)]


@pytest.mark.parametrize(
    ("name", "independent"), cases(itertools.product(MODELS, (False, True)), FAST)
)
def test_kernel_is_the_product_of_jacobians(name, independent):
    if independent and name == "batch_norm_flat":
        pytest.skip("batch norm couples examples")
    model, tagged, params, batch = setting(name)
    other = model.batch(3, seed=7)
    j, k = (marked_jacobian(model, params, x) for x, _ in (batch, other))

    @jax.jit
    def run(params, batch, other):
        kernel = functools.partial(
            kfac.ntk.kernel, tagged, params, batch, independent=independent
        )
        return kernel(chunk=2), kernel(trace=True), kernel(other, chunk=7)

    whole, contracted, across = run(params, batch, other)
    wanted = np.einsum("icp,jep->icje", j, j)
    close(whole, wanted, 1e-11)
    close(contracted, np.einsum("icjc->ij", wanted), 1e-11)
    close(across, np.einsum("icp,jep->icje", j, k), 1e-11)


@BOTH
def test_rows_that_do_not_count(independent):
    params, batch, _, jacobian = masked_setting()
    tagged = kfac.tag(masked_loss, params, *batch)
    count = np.asarray(batch[2]).reshape(-1)
    j = np.asarray(jacobian) * count[:, None, None]
    run = functools.partial(kfac.ntk.kernel, tagged, independent=independent)
    found = jax.jit(run)(params, batch)
    close(found, np.einsum("icp,jep->icje", j, j), 1e-11)


@BOTH
@pytest.mark.parametrize(
    "name",
    cases(["mlp", "conv2d", "bernoulli", "normal", "language"], ["mlp", "language"]),
)
def test_the_spectrum_is_that_of_the_fisher_matrix(name, independent):
    model, tagged, params, batch = setting(name, 3)
    run = functools.partial(kfac.ntk.eigenvalues, tagged, independent=independent)
    found = jax.jit(run)(params, batch)
    fisher = oracles.dense_fisher(model, params, batch[0], fisher="exact")
    wanted = np.sort(np.linalg.eigvalsh(fisher))[::-1]
    size = min(len(found), len(wanted))
    close(found[:size], wanted[:size], 1e-11)
    for zeros in (found[size:], wanted[size:]):
        np.testing.assert_allclose(zeros, 0, atol=1e-11 * wanted[0])


def test_widths_that_differ():
    def loss(params, x):
        return jnp.mean(jnp.sum(kfac.normal(x * params) ** 2, -1)) / 2

    params, x = jnp.ones(()), jnp.ones((4, 3))
    tagged = kfac.tag(loss, params, x)
    with pytest.raises(ValueError, match=r"\(4, 3\) and that of other \(5, 2\)"):
        kfac.ntk.kernel(tagged, params, (x,), (jnp.ones((5, 2)),))
