"""The trust region of ``kfac.kfac`` against its formula."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.optimizer.steps import trust_region


@hypothesis.given(
    seed=st.integers(0, 2**16),
    rate=st.floats(1e-3, 10),
    clip=st.floats(1e-6, 1e3),
    sign=st.sampled_from([1, -1, 0]),
)
def test_trust_region(seed, rate, clip, sign):
    """``min(1, √(c / (η² Σ u·g)))``; 1 where the step goes nowhere or uphill."""
    rng = np.random.default_rng(seed)
    u = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    metric = rng.uniform(0.1, 2)
    g = {name: sign * metric * value for name, value in u.items()}
    size = rate**2 * sum(np.vdot(u[name], g[name]) for name in u)
    wanted = min(1.0, np.sqrt(clip / size)) if size > 0 else 1.0
    arrays = [{k: jnp.asarray(v) for k, v in tree.items()} for tree in (u, g)]
    found = trust_region(*arrays, rate, clip)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
