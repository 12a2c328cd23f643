"""One weight used in both directions: both uses' statistics, one Kronecker product."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import INVERSES, cases, close, kfac_state

DAMPING = 0.05


def lookup(p, ids):
    """A language model with one table."""
    return jnp.tanh(p["table"][ids] * 1.5) @ p["table"].T + p["bias"]


def autoencoder(p, x):
    """``tanh(x W + b) Wᵀ + c``."""
    return jnp.tanh(x @ p["table"] + p["bias"]) @ p["table"].T + p["after"]


def problem(name, rng):
    table = rng.normal(size=(5, 3))
    if name == "lookup":
        params = {"table": table, "bias": rng.normal(size=5)}
        return lookup, jax.tree.map(jnp.asarray, params), jnp.asarray([[0, 1], [4, 1]])
    params = {"table": table, "bias": rng.normal(size=3), "after": rng.normal(size=5)}
    x = jnp.asarray(rng.normal(size=(4, 5)))
    return autoencoder, jax.tree.map(jnp.asarray, params), x


def tagged_loss(apply, params, x, **options):
    def loss(params, x):
        z = kfac.normal(apply(params, x))
        return 0.5 * (z**2).sum(-1).mean()

    return kfac.tag(loss, params, x, **options)


def merged(a, g, a_out, g_out):
    """``(A + pi B) (x) (G + H / pi)`` in numpy, ``B`` beside ``A``."""
    mean = lambda m: np.trace(m) / len(m)  # noqa: E731
    pi = np.sqrt(mean(a) * mean(a_out) / (mean(g_out) * mean(g)))
    return a + pi * g_out, g + a_out / pi


BOTH = list(itertools.product(["lookup", "autoencoder"], INVERSES))
FAST = [("lookup", "cholesky"), ("lookup", "ekfac"), ("lookup", "low_rank")]
FAST += [("autoencoder", "newton_schulz"), ("autoencoder", "eigh")]


@pytest.mark.parametrize(("name", "inverse"), cases(BOTH, FAST))
def test_preconditioning_with_both_uses(name, inverse, rng):
    apply, params, x = problem(name, rng)
    tagged = tagged_loss(apply, params, x)
    (layer,) = [t for t in tagged.layers if t.tied]
    assert layer.params == ("['table']",) and "opposite direction" in layer.note
    assert {t.kind for t in tagged.layers} <= {"dense", "embedding", "scale_shift"}
    tx = kfac.scale_by_kfac(tagged.layers, damping=DAMPING, inverse=inverse)
    state = tx.init(params)
    run = jax.jit(tagged.value_and_grad)
    _, grads, statistics = run(params, x, opt_state=state)
    updates, state = tx.update(grads, state, params, statistics=statistics)
    dense = [np.diag(m) if m.ndim == 1 else m for m in statistics[layer.name][:4]]
    a, g = merged(*map(np.asarray, dense))
    if name == "lookup":  # a full G of the output is not kept: only its diagonal
        a = np.diag(np.diag(a))
    factors = kfac_state(state).factors[layer.name]
    close(factors.a, np.diag(a) if name == "lookup" else a, 1e-9)
    close(factors.g, g, 1e-9)
    solve = oracles.solve_exact
    if inverse in ("cholesky", "newton_schulz"):
        solve = oracles.solve_split
    v = np.asarray(grads["table"])
    close(updates["table"], solve(a, g, v, DAMPING), 1e-6)


def test_biases_of_both_uses_are_blocks_of_their_own(rng):
    """``A = [[1]]`` and ``G = N sum c c^T``."""
    apply, params, x = problem("autoencoder", rng)
    tagged = tagged_loss(apply, params, x)
    _, _, statistics = jax.jit(tagged.value_and_grad)(params, x)
    n = len(x)
    hidden = np.tanh(x @ params["table"] + params["bias"])
    after = (hidden @ params["table"].T + params["after"]) / n
    before = after @ params["table"] * (1 - hidden**2)
    for name, c in (("bias", before), ("after", after)):
        close(statistics[name].a, np.ones((1, 1)))
        close(statistics[name].g, n * c.T @ c)


def test_a_product_of_both_is_bounded_below_by_each():
    """The merged product is at least either use's (in the order of matrices)."""
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(d, d)) for d in (3, 2, 2, 3)]
    a, g, h, b = (r @ r.T for r in roots)
    both = np.kron(*merged(a, g, h, b))
    for one in (np.kron(a, g), np.kron(b, h), np.kron(a, g) + np.kron(b, h)):
        assert np.linalg.eigvalsh(both - one).min() > -1e-9


def test_second_moments_of_both_uses(rng):
    """EKFAC's moments start from the factors and are then measured at both uses."""
    apply, params, x = problem("autoencoder", rng)
    tagged = tagged_loss(apply, params, x)
    tx = kfac.scale_by_kfac(tagged.layers, damping=DAMPING, inverse="ekfac")
    state, run = tx.init(params), jax.jit(tagged.value_and_grad)
    _, grads, statistics = run(params, x, opt_state=state)
    _, state = tx.update(grads, state, params, statistics=statistics)
    seen = run(params, x, opt_state=state)[-1]["table"].s
    basis = kfac_state(state).inverses["table"]
    hidden = np.tanh(x @ params["table"] + params["bias"])
    output = hidden @ params["table"].T + params["after"]
    n = len(x)
    back = (output / n) @ params["table"] * (1 - hidden**2)
    # x W: inputs x, cotangents `back`; y W^T: cotangents output / n, inputs hidden
    forward = np.einsum("ni,nj->ij", (x @ basis.q_a) ** 2, (back @ basis.q_g) ** 2)
    reverse = np.einsum(
        "ni,nj->ij", (output / n @ basis.q_a) ** 2, (hidden @ basis.q_g) ** 2
    )
    close(seen, n * (forward + reverse), 1e-9)


def test_devices_average_before_they_merge(rng):
    """Eight devices with a share each compute what one does with all."""
    apply, params, _ = problem("lookup", rng)
    ids = jnp.asarray(rng.integers(0, 5, (8, 4)))
    steps = []
    for axis in (None, "batch"):
        tagged = tagged_loss(apply, params, ids if axis is None else ids[:1])
        tx = kfac.scale_by_kfac(tagged.layers, damping=DAMPING, axis_name=axis)

        def step(ids, tagged=tagged, tx=tx, axis=axis):
            _, grads, statistics = tagged.value_and_grad(params, ids)
            if axis:
                grads = jax.lax.pmean(grads, axis)
            state = tx.init(params)
            return tx.update(grads, state, params, statistics=statistics)[0]

        if axis is None:
            steps.append(jax.jit(step)(ids))
        else:
            out = jax.pmap(step, axis_name=axis)(ids[:, None])
            steps.append(jax.tree.map(lambda v: v[0], out))
    close(*steps, 1e-8)
