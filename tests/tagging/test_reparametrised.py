"""Weights used as a function of their entries: ``exp(w)``, ``w * mask``, ``w²``.

With ``D = φ'(w)`` the block of ``w`` is ``diag(D) (A ⊗ G) diag(D)``, ``A`` and ``G``
those of the kernel ``φ(w)``. With one example that is ``g gᵀ`` where ``D`` has rank
one; of others the means of squares by row and by column are kept.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from kfac_jax_lite.statistics.dense import rank_one
from tests.helpers import close
from tests.tagging.test_rare_programs import blocks, outer

N, D, H = 6, 4, 3
MASK = np.tril(np.ones((D, H)))
IMAGE = ("NHWC", "HWIO", "NHWC")


@jax.custom_vjp
def rounded(w):
    """A straight-through estimator."""
    return jnp.round(4 * w) / 4


rounded.defvjp(lambda w: (rounded(w), None), lambda _, c: (c,))


def by_entries(slope):
    """The derivative of a function of one number, everywhere."""
    return lambda w: jnp.vectorize(jax.grad(slope))(w)


ONES = jnp.ones_like


def reciprocal(w):
    return 1 / (2 + jnp.exp(w))


def masked_exp(w):
    return 2 * jnp.exp(w * MASK)


def itself(w):
    return jnp.where(MASK > 0, w, lax.stop_gradient(w))


def two_cases(w):
    return jnp.where(MASK > 0, w, jnp.sin(w))


# Functions with derivatives by hand, or from the function of one number.
FUNCTIONS = {
    "exp": (jnp.exp, jnp.exp),
    "softplus": (jax.nn.softplus, jax.nn.sigmoid),
    "sigmoid": (jax.nn.sigmoid, by_entries(lambda w: 1 / (1 + jnp.exp(-w)))),
    "tanh": (jnp.tanh, lambda w: 1 - jnp.tanh(w) ** 2),
    "relu": (jax.nn.relu, lambda w: 1.0 * (w > 0)),
    "square": (lambda w: w**2, lambda w: 2 * w),
    "product": (lambda w: w * jnp.tanh(w), by_entries(lambda w: w * jnp.tanh(w))),
    "sum": (lambda w: w + jnp.exp(w), lambda w: 1 + jnp.exp(w)),
    "power": (lambda w: jnp.abs(w) ** 1.5, by_entries(lambda w: jnp.abs(w) ** 1.5)),
    "reciprocal": (reciprocal, by_entries(reciprocal)),
    "mask": (lambda w: w * MASK, lambda w: MASK),
    "where": (lambda w: jnp.where(MASK > 0, w, 0.0), lambda w: MASK),
    "itself": (itself, lambda w: MASK),
    "two_cases": (two_cases, lambda w: jnp.where(MASK > 0, 1, jnp.cos(w))),
    "masked_exp": (masked_exp, lambda w: 2 * MASK * jnp.exp(w * MASK)),
    "negative": (lambda w: -w, lambda w: -ONES(w)),
    "shifted": (lambda w: jnp.exp(w - 1.0) + 1e-3, lambda w: jnp.exp(w - 1.0)),
    "clipped": (lambda w: jnp.clip(w, -0.5, 0.5), lambda w: 1.0 * (jnp.abs(w) < 0.5)),
    "pruned": (lambda w: w * (jnp.abs(w) > 0.5), lambda w: 1.0 * (jnp.abs(w) > 0.5)),
    "rounded": (rounded, ONES),
    "straight_through": (lambda w: w + lax.stop_gradient(jnp.round(w) - w), ONES),
}


def expected(d):
    """What enters by row and by column, from the definition."""
    d = np.asarray(d)
    a, b = np.sqrt((d**2).mean(1)), np.sqrt((d**2).mean(0) / (d**2).mean())
    top = d[(d**2).mean(1).argmax()]
    return a * np.where(d @ top < 0, -1, 1), b * np.where(top < 0, -1, 1)


def loss_of(network):
    def loss(p, x, y):
        z = kfac.normal(network(p, x))
        return 0.5 * jnp.sum((z - y) ** 2, -1).mean()

    return loss


def data(rng, shape=(D, H), outs=H):
    p = {"w": jnp.asarray(rng.normal(size=shape))}
    x, y = (jnp.asarray(rng.normal(size=(N, d))) for d in (D, outs))
    return p, x, y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense_kernels(rng, name):
    phi, slope = FUNCTIONS[name]
    p, x, y = data(rng)
    loss = loss_of(lambda p, x: x @ phi(p["w"]))
    tagged = kfac.tag(loss, p, x, y)
    (layer,) = tagged.layers
    assert layer.kind == "dense"
    d = slope(p["w"])
    value, grads, found = jax.jit(tagged.value_and_grad)(p, x, y)
    close((value, grads), jax.value_and_grad(loss)(p, x, y), 1e-10)
    c = (x @ phi(p["w"]) - y) / N
    a, b = expected(d)
    close(found["w"].a, (x * a).T @ (x * a) / N, 1e-9)
    close(found["w"].g, (c * b).T @ (c * b) * N, 1e-9)
    assert ("function" in layer.note) == (name not in ("negative", "straight_through"))


@pytest.mark.parametrize("name", ["exp", "mask", "square", "softplus"])
def test_squares_are_exact(rng, name):
    phi, _ = FUNCTIONS[name]
    p, x, y = data(rng)
    loss = loss_of(lambda p, x: jnp.tanh(x @ phi(p["w"])) @ phi(p["w"]).T)
    y = jnp.concatenate([y, y[:, :1]], 1)
    tagged = kfac.tag(loss, p, x, y, statistics="squares")
    found = jax.jit(tagged.value_and_grad)(p, x, y)[-1]
    one = jax.jit(jax.grad(loss))
    each = [one(p, x[n, None], y[n, None])["w"] for n in range(N)]
    close(found["w"].squares, sum(g**2 for g in each) / N, 1e-9)


# ------------------------------------------------ exact with one example


def separable(w):
    """A function whose derivative is a product of two vectors, with signs."""
    return w * jnp.outer(jnp.arange(1.0, D + 1) - 2.2, jnp.arange(1.0, H + 1) - 1.7)


def as_weight(p, x):
    return x @ separable(p["w"])


def transposed(p, x):
    return x @ separable(p["w"].T).reshape(1, -1).reshape(D, H)


def in_a_call(p, x):
    w = jax.jit(separable)(p["w"])
    return jax.jit(lambda x, w: x @ w)(x, w)


def in_a_loop(p, x):
    """The function inside, and once more outside."""
    w = separable(p["w"])
    return lax.scan(lambda c, _: (c + x @ w, None), jnp.zeros((len(x), H)), None, 1)[0]


def as_kernel(p, x):
    kernel = separable(p["w"]).reshape(2, 2, 1, H)
    image = x.reshape(-1, 2, 2, 1)
    z = lax.conv_general_dilated(
        image, kernel, (1, 1), "VALID", dimension_numbers=IMAGE
    )
    return z.reshape(len(x), -1)


def learned_scale(p, x):
    """A positive gain: exact whatever the function."""
    return x[:, :H] * jax.nn.softplus(p["g"]) * 2.0


def learned_shift(p, x):
    return x[:, :H] - jnp.exp(p["g"])


EXACT = {
    as_weight: (D, H), transposed: (H, D), in_a_call: (D, H), in_a_loop: (D, H),
    as_kernel: (D, H), learned_scale: (H,), learned_shift: (H,),
}  # fmt: skip


@pytest.mark.parametrize("network", EXACT, ids=lambda f: f.__name__)
def test_block_of_one_example(rng, network):
    shape = EXACT[network]
    p = {"g" if len(shape) == 1 else "w": jnp.asarray(rng.normal(size=shape))}
    _, x, y = data(rng)
    loss = loss_of(network)
    many = kfac.tag(loss, p, x, y)
    one = kfac.tag(loss, p, x[:1], y[:1])
    assert many.fingerprint() == one.fingerprint()
    (layer,) = one.layers
    assert layer.kind != "diagonal", str(one)
    value, grads, found = jax.jit(one.value_and_grad)(p, x[:1], y[:1])
    plain = jax.value_and_grad(loss)(p, x[:1], y[:1])
    close((value, grads), plain, 1e-10)
    close(blocks(layer, found[layer.name]), outer(layer, plain[1]), 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_rank_one(seed):
    """Exact of rank one; else squares keep their means by row and by column."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 3, 5, 1)), rng.normal(size=(2, 3, 1, 4))
    one, two = rank_one(jnp.asarray(a * b))
    close(one[..., :, None] * two[..., None, :], a * b, 1e-12)
    d = rng.normal(size=(5, 4))
    one, two = rank_one(jnp.asarray(d))
    square = np.square(np.outer(one, two))
    close(square.mean(0), (d**2).mean(0), 1e-12)
    close(square.mean(1), (d**2).mean(1), 1e-12)
    zero = rank_one(jnp.zeros((5, 4)))
    assert not any(v.any() for v in zero)


def test_trace_within_the_factorisation(rng):
    """Traces of the blocks of random kernels are those of the true blocks, nearly."""
    p, x, y = data(rng)
    x, y = (jnp.asarray(rng.normal(size=(400, d))) for d in (D, H))
    loss = loss_of(lambda p, x: x @ jnp.exp(p["w"]))
    tagged = kfac.tag(loss, p, x, y, fisher="exact")
    found = jax.jit(tagged.value_and_grad)(p, x, y)[-1]["w"]
    true = float((jnp.exp(2 * p["w"]) * (x**2).mean(0)[:, None]).sum())
    got = float(jnp.trace(found.a) * jnp.trace(found.g))
    assert 0.9 * true < got < 1.1 * true


def test_ensembles(rng):
    """A function of stacked weights, each with its own rows and columns."""
    p = {"w": jnp.asarray(rng.normal(size=(2, D, H)))}
    x, y = jnp.asarray(rng.normal(size=(N, D))), jnp.asarray(rng.normal(size=(2, N, H)))
    loss = loss_of(lambda p, x: jax.vmap(lambda w: x @ jnp.exp(w))(p["w"]))
    tagged = kfac.tag(loss, p, x, y)
    found = jax.jit(tagged.value_and_grad)(p, x, y)[-1]["w"]
    for e in range(2):
        a, b = expected(jnp.exp(p["w"][e]))
        c = (x @ jnp.exp(p["w"][e]) - y[e]) / (2 * N) * b
        close(found.a[e], (x * a).T @ (x * a) / (2 * N), 1e-9)
        close(found.g[e], c.T @ c * (2 * N) ** 2 / N, 1e-9)
