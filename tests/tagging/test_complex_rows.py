"""Complex rows are two real rows: that of the real and that of the imaginary part.

Oracle: per-example Jacobians of the loss's output by real and imaginary parts of the
layer's output, in numpy: with ``z = W̄ᵀ ā``, ``ā = u + iv``, the rows are ``u`` (with 1
for a bias) and ``v`` (with 0), and their cotangents those of ``Re z`` and ``Im z``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac

KEY = jax.random.key
N, IN, OUT = 5, 3, 4


def complex_normal(key, shape):
    return jax.lax.complex(*jax.random.normal(key, (2, *shape)))


X = complex_normal(KEY(0), (N, IN))
PARAMS = {
    "w": jax.random.normal(KEY(1), (IN, OUT)),
    "b": jax.random.normal(KEY(2), (OUT,)),
    "o": jax.random.normal(KEY(3), (OUT, 2)),
}


def tail(p, z):
    """What follows the layer: real."""
    return jnp.abs(z) ** 2 @ p["o"] + jnp.sin(z.real) @ p["o"]


def net(p, x):
    return tail(p, x @ p["w"] + p["b"])


def loss(p, x):
    return 0.5 * (kfac.normal(net(p, x)) ** 2).sum(-1).mean()


def rows(p, x, bias=True):
    """``a [2N, in+1]`` and Jacobians ``d [2N, 2, out]``, real parts first."""
    one = np.stack([np.ones(N), np.zeros(N)])[..., None]
    a = np.stack([np.asarray(x.real), np.asarray(x.imag)])
    a = np.concatenate([a, one], -1) if bias else a

    def out(parts, row):
        z = (row @ p["w"] + p["b"])[None] + jax.lax.complex(parts[0], parts[1])[None]
        return tail(p, z)[0]

    zero = jnp.zeros((2, OUT))
    d = np.stack([jax.jacobian(out)(zero, row) for row in x])  # [N, 2, 2, out]
    return a.reshape(2 * N, -1), np.moveaxis(d, 2, 0).reshape(2 * N, 2, OUT), d


@pytest.mark.parametrize("method", ["cholesky", "ekfac"])
def test_factors_and_moments(method):
    tagged = kfac.tag(loss, PARAMS, X, fisher="exact", strict=True)
    tx = kfac.kfac(tagged.layers, 0.1, inverse=method)
    state = tx.init(PARAMS)
    a, d, _ = rows(PARAMS, X)
    call = jax.jit(tagged.value_and_grad)
    value, grads, seen = call(PARAMS, X, opt_state=state)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12),
        grads,
        jax.grad(loss)(PARAMS, X),
    )
    (name,) = (t.name for t in tagged.layers if "['w']" in t.params)
    np.testing.assert_allclose(seen[name].a, a.T @ a / N, rtol=1e-10)
    g = np.einsum("rko,rkp->op", d, d) / (2 * N)
    np.testing.assert_allclose(seen[name].g, g, rtol=1e-10)
    assert np.linalg.eigvalsh(seen[name].g).min() > 0
    if method == "ekfac":  # the first basis is the identity
        s = np.einsum("ri,rko->io", a**2, d**2) / N
        np.testing.assert_allclose(seen[name].s, s, rtol=1e-10)


def test_squares_of_examples():
    tagged = kfac.tag(loss, PARAMS, X, fisher="exact", statistics="squares")
    seen = tagged.value_and_grad(PARAMS, X)[2]
    a, _, d = rows(PARAMS, X)
    each = np.einsum("qni,nkqo->nkio", a.reshape(2, N, -1), d)  # [N, columns, in, out]
    (name,) = (t.name for t in tagged.layers if "['w']" in t.params)
    wanted = (each**2).sum((0, 1)) / N
    np.testing.assert_allclose(seen[name].squares, wanted, rtol=1e-9)


def test_reduce():
    """Positions of an example are averaged as complex numbers, then split."""
    x = complex_normal(KEY(5), (N, 2, IN))

    def shared(p, x):
        z = (jnp.abs(x @ p["w"]) ** 2).sum(1)
        return 0.5 * (kfac.normal(z) ** 2).sum(-1).mean()

    p = {"w": PARAMS["w"]}
    found = kfac.tag(shared, p, x, fisher="exact", weight_sharing="reduce")
    seen = found.value_and_grad(p, x)[2]["w"]
    mean = x.mean(1)
    np.testing.assert_allclose(seen.a, (mean.conj().T @ mean).real / N, rtol=1e-10)
    z = (x @ p["w"]).sum(1)  # column j of the root has cotangents 2 z at entry j
    g = np.diag(2 * (np.abs(z) ** 2).sum(0) * 2) / (2 * N)
    np.testing.assert_allclose(seen.g, g, rtol=1e-10)


def test_convolution_shift_and_lookup():
    """Other kinds: the oracle is the gradient of every example, by ``vmap``."""
    key = jax.random.split(KEY(7), 4)
    p = {
        "k": jax.random.normal(key[0], (3, 2, 4)),
        "s": jax.random.normal(key[1], (4,)),
        "t": jax.random.normal(key[2], (4,)),
        "e": jax.random.normal(key[3], (6, 4)),
    }
    x, i = complex_normal(KEY(8), (N, 5, 2)), jnp.array([0, 5, 2, 2, 1])

    def out(p, x, i):
        numbers = ("NWC", "WIO", "NWC")
        kernel = p["k"].astype(complex)
        z = jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=numbers
        )
        z = z * p["s"] + p["t"] + p["e"][i][:, None] * (1 + 2j)
        return (jnp.abs(z) ** 2).mean(1)

    def loss(p, x, i):
        return 0.5 * (kfac.normal(out(p, x, i)) ** 2).sum(-1).mean()

    tagged = kfac.tag(loss, p, x, i, fisher="exact")
    seen = jax.jit(tagged.value_and_grad)(p, x, i)[2]
    one = lambda p, x, i: out(p, x[None], i[None])[0]  # noqa: E731
    j = jax.vmap(jax.jacobian(one), (None, 0, 0))(p, x, i)  # [N, 4, *leaf]
    kinds = {t.params: t for t in tagged.layers}
    pair = kinds["['s']", "['t']"]
    both = np.stack([j["s"], j["t"]], -1)  # [N, 4, units, 2]
    blocks = np.einsum("ncuk,ncul->ukl", both, both) / N
    np.testing.assert_allclose(seen[pair.name].blocks, blocks, rtol=1e-9)
    table = kinds[("['e']",)]
    counts = np.bincount(i, minlength=6) / N
    np.testing.assert_allclose(seen[table.name].a, counts, rtol=1e-12)
    g = np.einsum("ncvo,ncvp->op", j["e"], j["e"]) / N
    np.testing.assert_allclose(seen[table.name].g, g, rtol=1e-9)
    conv = kinds[("['k']",)]
    patches = np.stack([np.asarray(x)[:, t : t + 3].reshape(N, 6) for t in range(3)], 1)
    flat = patches.reshape(-1, 6)
    np.testing.assert_allclose(
        seen[conv.name].a, (flat.conj().T @ flat).real / N, rtol=1e-10
    )
    assert np.linalg.eigvalsh(np.asarray(seen[conv.name].g)).min() > -1e-12
