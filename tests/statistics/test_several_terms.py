"""Losses of several terms: marks of other rows, each with its own weight.

Oracle: ``L = Σ_k w_k · mean_n ℓ_k``; every row of mark k counts with ``ω = w_k / N_k``,
``A = Σ_r ω_r a aᵀ`` and ``G = Σ_r ω_r Dᵀ Λ D / Σ_r ω_r`` over all rows, where ``D`` is
the Jacobian of the row's output by the layer's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac

KEY = jax.random.key
PARAMS = {
    "a": jax.random.normal(KEY(0), (3, 4)),
    "b": jax.random.normal(KEY(1), (4, 3)),
}


def net(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def nll(kind, z, y):
    """Every row's own loss."""
    if kind == "categorical":
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1)[:, 0]
    if kind == "bernoulli":
        return (jax.nn.softplus(z) - y * z).sum(-1)
    return 0.5 * ((z - y) ** 2).sum(-1)


def batch(kind, rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    y = rng.normal(size=(rows, 3))
    if kind == "categorical":
        y = rng.integers(0, 3, rows)
    if kind == "bernoulli":
        y = (y > 0).astype(float)
    return jnp.asarray(x), jnp.asarray(y)


def hessian(kind, z):
    if kind == "categorical":
        p = jax.nn.softmax(z)
        return jnp.diag(p) - jnp.outer(p, p)
    if kind == "bernoulli":
        p = jax.nn.sigmoid(z)
        return jnp.diag(p * (1 - p))
    return jnp.eye(len(z))


def oracle(terms, params, fisher):
    """``{layer: (A, G)}`` from terms ``(kind, x, y, row weights)``."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def rows(name, kind, x, y):
        def one(row, label):
            def out(shift):
                h = row @ params["a"]
                if name == "a":
                    return jnp.tanh(h + shift) @ params["b"]
                return jnp.tanh(h) @ params["b"] + shift

            zero = jnp.zeros(4 if name == "a" else 3)
            if fisher == "empirical":
                own = lambda s: nll(kind, out(s)[None], label[None])[0]  # noqa: E731
                g = jax.grad(own)(zero)
                square = jnp.outer(g, g)
            else:
                d = jax.jacobian(out)(zero)
                square = d.T @ hessian(kind, out(zero)) @ d
            a = row if name == "a" else jnp.tanh(row @ params["a"])
            return jnp.outer(a, a), square

        return jax.vmap(one)(x, y)

    found = {}
    for name in ("a", "b"):
        inputs, squares, total = 0, 0, 0
        for kind, x, y, omega in terms:
            a, g = map(np.asarray, rows(name, kind, x, y))
            inputs = inputs + np.einsum("r,rij->ij", omega, a)
            squares = squares + np.einsum("r,rij->ij", omega, g)
            total += sum(omega)
        found[name] = inputs, squares / total
    return found


TERMS = {
    "normal and normal": (("normal", 7, 1.0), ("normal", 4, 3.5)),
    "three kinds": (("categorical", 5, 0.5), ("bernoulli", 6, 2.0), ("normal", 3, 1.0)),
    "equal rows": (("categorical", 5, 1.0), ("normal", 5, 0.25)),
    "one, weighted": (("categorical", 5, 3.0),),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("normal and normal", "measured"),
        ("three kinds", "traced"),
        ("three kinds", "measured"),
        ("equal rows", "said"),
        ("one, weighted", "said"),
    ],
)
def test_factors(name, fisher, said):
    kinds = [k for k, _, _ in TERMS[name]]
    sizes = [n for _, n, _ in TERMS[name]]
    weights = [w for _, _, w in TERMS[name]]
    data = [batch(k, n, i) for i, (k, n) in enumerate(zip(kinds, sizes, strict=True))]

    def loss(p, data, weights):
        total = 0.0
        for kind, (x, y), w in zip(kinds, data, weights, strict=True):
            given = None if said == "measured" else w
            z = getattr(kfac, kind)(net(p, x), weight=given)
            total = total + w * nll(kind, z, y).mean()
        return total

    if said == "traced":
        weights = [jnp.asarray(w) for w in weights]
    tagged = kfac.tag(loss, PARAMS, data, weights, fisher=fisher)
    value, grads, seen = jax.jit(tagged.value_and_grad)(PARAMS, data, weights)
    plain = jax.value_and_grad(loss)(PARAMS, data, weights)
    np.testing.assert_allclose(value, plain[0], rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, plain[1]
    )
    terms = [
        (k, x, y, [float(w) / len(x)] * len(x))
        for k, (x, y), w in zip(kinds, data, weights, strict=True)
    ]
    wanted = oracle(terms, PARAMS, fisher)
    for layer in ("a", "b"):
        np.testing.assert_allclose(seen[layer].a, wanted[layer][0], rtol=1e-8)
        np.testing.assert_allclose(seen[layer].g, wanted[layer][1], rtol=1e-7)


def test_heads_on_one_trunk():
    """Rows that two outputs depend on: the sum of what either asks of them."""
    params = PARAMS | {"c": jax.random.normal(KEY(5), (4, 2))}
    x, y = batch("categorical", 6, 0)
    v = jax.random.normal(KEY(6), (6, 2))

    def loss(p, x, y, v):
        h = jnp.tanh(x @ p["a"])
        z = kfac.categorical(h @ p["b"])
        u = kfac.normal(h @ p["c"], weight=0.5)
        return nll("categorical", z, y).mean() + 0.5 * nll("normal", u, v).mean()

    tagged = kfac.tag(loss, params, x, y, v, fisher="exact")
    seen = jax.jit(tagged.value_and_grad)(params, x, y, v)[2]["a"]
    total = 0
    for row in x:
        for weight, kind, name in ((1, "categorical", "b"), (0.5, "normal", "c")):

            def out(shift, row=row, name=name):
                return jnp.tanh(row @ params["a"] + shift) @ params[name]

            d = jax.jacobian(out)(jnp.zeros(4))
            total = total + weight / 6 * d.T @ hessian(kind, out(jnp.zeros(4))) @ d
    block = np.kron(seen.a, seen.g)
    np.testing.assert_allclose(block, np.kron(x.T @ x / 6, total), atol=1e-12)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_row_weights_and_masks(fisher):
    """Each mark has its mask; a weight for every row scales its ``Λ``."""
    (x, y), (u, v) = batch("categorical", 6, 0), batch("bernoulli", 4, 1)
    mask = jnp.array([1, 1, 0, 1, 0, 1], bool)
    weight = jnp.array([0.5, 2.0, 0.0, 1.0])

    def loss(p, x, y, mask, u, v, weight):
        z = kfac.categorical(net(p, x), mask=mask)
        first = jnp.where(mask, nll("categorical", z, y), 0).sum() / mask.sum()
        q = kfac.bernoulli(net(p, u), weight=weight)
        return first + (weight * nll("bernoulli", q, v)).mean()

    args = x, y, mask, u, v, weight
    tagged = kfac.tag(loss, PARAMS, *args, fisher=fisher)
    run = jax.jit(tagged.value_and_grad)
    if fisher == "mc":  # draws at masked rows or rows of weight zero change nothing
        other = (x.at[2].set(9.0), y, mask, u.at[2].set(9.0), v, weight)
        one, two = (run(PARAMS, *a, key=KEY(3))[2]["b"].g for a in (args, other))
        np.testing.assert_allclose(one, two, rtol=1e-12)
        return
    seen = run(PARAMS, *args)[2]["b"]
    rows = np.asarray(mask)
    h = lambda x: jnp.tanh(x @ PARAMS["a"])  # noqa: E731
    a = h(x)[rows].T @ h(x)[rows] / 4 + weight.mean() * h(u).T @ h(u) / 4
    g = sum(hessian("categorical", net(PARAMS, r)) / 4 for r in x[rows])
    pairs = zip(u, weight, strict=True)
    g += sum(w / 4 * hessian("bernoulli", net(PARAMS, r)) for r, w in pairs)
    np.testing.assert_allclose(seen.a, a, rtol=1e-9)
    np.testing.assert_allclose(seen.g, g / (1 + weight.mean()), rtol=1e-9)


def test_products_with_the_whole_losses_matrix():
    """Gauss-Newton products and the quadratic model weigh their terms alike."""
    (x, y), (u, v) = batch("categorical", 5, 0), batch("normal", 3, 1)

    def loss(p, x, y, u, v):
        z, q = kfac.categorical(net(p, x)), kfac.normal(net(p, u), weight=4.0)
        return nll("categorical", z, y).mean() + 4 * nll("normal", q, v).mean()

    args = x, y, u, v
    tagged = kfac.tag(loss, PARAMS, *args, fisher="exact")
    flat, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    wanted = 0
    for rows, kind, omega in ((x, "categorical", 1 / 5), (u, "normal", 4 / 3)):
        for row in rows:
            j = jax.jacobian(lambda f, row=row: net(unravel(f), row))(flat)
            wanted += omega * j.T @ hessian(kind, net(PARAMS, row)) @ j
    model = kfac.quadratic_model(tagged, PARAMS, *args)
    vectors = [jax.tree.map(lambda p, s=s: jnp.sin(s * p), PARAMS) for s in (1.0, 2.0)]
    _, slopes, gram = model.products(vectors)
    stacked = jnp.stack([jax.flatten_util.ravel_pytree(v)[0] for v in vectors])
    np.testing.assert_allclose(gram, stacked @ wanted @ stacked.T, rtol=1e-9)
    gradient = jax.flatten_util.ravel_pytree(jax.grad(loss)(PARAMS, *args))[0]
    np.testing.assert_allclose(slopes, stacked @ gradient, rtol=1e-9)
    operator = kfac.curvature.fisher(tagged, PARAMS, [args])
    seen = [operator.mv(unravel(e)) for e in jnp.eye(len(flat))]
    seen = np.stack([jax.flatten_util.ravel_pytree(v)[0] for v in seen])
    np.testing.assert_allclose(seen, wanted, atol=1e-10)


def test_policy_losses_are_not_measured():
    """Where the loss is no likelihood's, its second derivative is not asked."""
    (x, y), (u, v) = batch("categorical", 5, 0), batch("normal", 3, 1)
    advantage = jnp.array([1.0, -2.0, 0.5, -0.1, 0.7])

    def loss(p, x, y, u, v):
        z, q = kfac.categorical(net(p, x)), kfac.normal(net(p, u))
        policy = (advantage * nll("categorical", z, y)).mean()
        return policy + 0.5 * nll("normal", q, v).mean()

    args = x, y, u, v
    tagged = kfac.tag(loss, PARAMS, *args, fisher="exact")
    seen = tagged.value_and_grad(PARAMS, *args)[2]
    terms = [
        ("categorical", x, y, [1 / 5] * 5),
        ("normal", u, v, [0.5 / 3] * 3),
    ]
    wanted = oracle(terms, PARAMS, "exact")
    np.testing.assert_allclose(seen["b"].a, wanted["b"][0], rtol=1e-8)
    np.testing.assert_allclose(seen["b"].g, wanted["b"][1], rtol=1e-8)


def test_weights_of_a_loss_with_a_rule_of_its_own():
    """``jax.custom_vjp`` has reverse mode only."""

    @jax.custom_vjp
    def squares(z):
        return 0.5 * (z**2).sum(-1).mean()

    squares.defvjp(lambda z: (squares(z), z), lambda z, c: (c * z / len(z),))
    x, u = batch("normal", 6, 0)[0], batch("normal", 4, 1)[0]

    def loss(p, x, u):
        return squares(kfac.normal(net(p, x))) + 3 * squares(kfac.normal(net(p, u)))

    tagged = kfac.tag(loss, PARAMS, x, u, fisher="exact")
    seen = tagged.value_and_grad(PARAMS, x, u)[2]["a"]
    np.testing.assert_allclose(seen.a, x.T @ x / 6 + 3 * u.T @ u / 4, rtol=1e-9)


def test_errors():
    z = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match="weight has shape"):
        kfac.categorical(z, weight=jnp.ones(3))
    with pytest.raises(ValueError, match="wants a weight >= 0"):
        kfac.bernoulli(z, weight=-1.0)
    with pytest.raises(TypeError, match="marks real outputs"):
        kfac.normal(z.astype(complex))
