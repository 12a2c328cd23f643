"""SIREN, a variational autoencoder, two towers with a contrastive loss, a graph net."""

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

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


# ---------------------------------------------------------------------------- SIREN


def siren(p, x, see=unseen):
    """Sines of ten times what a layer makes; the rate stands inside the layer."""
    for name in ("first", "second"):
        x = jnp.sin(10 * linear(p, name, x, see))
    return linear(p, "out", x, see)


def test_siren():
    params = {
        "first": make_linear(0, 2, 6),
        "second": make_linear(1, 6, 6),
        "out": make_linear(2, 6, 3),
    }
    params["second"] = jax.tree.map(lambda w: w / 10, params["second"])
    x, y = jnp.asarray(RNG.uniform(-1, 1, (9, 2))), normal(9, 3)

    def loss(p, x, y):
        return 0.5 * ((kfac.normal(siren(p, x)) - y) ** 2).sum(-1).mean()

    tagged = kfac.tag(loss, params, x, y, fisher="exact")
    assert coverage(tagged) == 1 and notes(tagged) == {}
    statistics, losses = train(loss, params, (x, y), tagged)
    assert losses[-1] < losses[0]
    part = 1 / 9, lambda x, see: siren(params, x, see), x, "normal"
    for name in params:
        check_factors(statistics, name, [part])


# ------------------------------------------------------------ variational autoencoder

VAE = {
    "encoder": make_linear(0, 6, 5),
    "mean": make_linear(1, 5, 2),
    "log_variance": make_linear(2, 5, 2),
    "decoder": make_linear(3, 2, 5),
    "pixels": make_linear(4, 5, 6),
}


def encode(p, x, see=unseen):
    h = jnp.tanh(linear(p, "encoder", x, see))
    return linear(p, "mean", h, see), linear(p, "log_variance", h, see)


def decode(p, z, see=unseen):
    return linear(p, "pixels", jnp.tanh(linear(p, "decoder", z, see)), see)


def test_variational_autoencoder():
    """One mark for the pixels, one for the latent's distribution, weights of 1.

    The Kullback-Leibler term's curvature by mean and log-variance of the latent is that
    of normal distributions with variance 1 and 2 (where the posterior is the prior).
    """
    x = jnp.asarray(RNG.integers(0, 2, (8, 6)) * 1.0)
    noise = normal(8, 2)

    def loss(p, x, noise):
        mean, log_variance = encode(p, x)
        latent = jnp.concatenate([mean, log_variance], -1)
        latent = kfac.normal(latent, jnp.array([1.0, 1.0, 2.0, 2.0]), weight=1.0)
        mean, log_variance = latent[:, :2], latent[:, 2:]
        z = mean + jnp.exp(0.5 * log_variance) * noise
        logits = kfac.bernoulli(decode(p, z), weight=1.0)
        pixels = (jax.nn.softplus(logits) - x * logits).sum(-1).mean()
        prior = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1)
        return pixels + prior.mean()

    tagged = kfac.tag(loss, VAE, x, noise, fisher="exact")
    assert coverage(tagged) == 1 and notes(tagged) == {}
    statistics, losses = train(loss, VAE, (x, noise), tagged, tolerance=1e-8)
    assert losses[-1] < losses[0]

    def pixels(pair, see):
        mean, log_variance = encode(VAE, pair[0], see)
        return decode(VAE, mean + jnp.exp(0.5 * log_variance) * pair[1], see)

    def prior(pair, see):
        mean, log_variance = encode(VAE, pair[0], see)
        return jnp.concatenate([mean, log_variance / 2**0.5])

    own = [(1 / 8, f, (x, noise), kind) for f, kind in
           ((pixels, "bernoulli"), (prior, "normal"))]  # fmt: skip
    check_factors(statistics, "decoder", own[:1])
    check_factors(statistics, "pixels", own[:1])
    for name in ("encoder", "mean", "log_variance"):
        check_factors(statistics, name, own)


# ------------------------------------------------------------------------- two towers

TOWERS = {
    "image": make_linear(0, 5, 4),
    "image_out": make_linear(1, 4, 3),
    "words": normal(6, 4),
    "text_out": make_linear(2, 4, 3),
    "scale": jnp.asarray(0.5),
}


def similarities(p, images, texts, see=unseen):
    """``[B, B]``: every image beside every text."""
    a = linear(p, "image_out", jnp.tanh(linear(p, "image", images, see)), see)
    b = linear(p, "text_out", jnp.tanh(p["words"][texts].mean(1)), see)
    a, b = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
    return jnp.exp(p["scale"]) * a @ b.T


def test_contrastive_towers():
    images, texts = normal(7, 5), jnp.asarray(RNG.integers(0, 6, (7, 3)))

    def loss(p, images, texts):
        logits, total = similarities(p, images, texts), 0.0
        for z in (logits, logits.T):
            z = kfac.categorical(z, weight=0.5)
            total = total - 0.5 * jnp.diag(jax.nn.log_softmax(z)).mean()
        return total

    args = images, texts
    tagged = kfac.tag(loss, TOWERS, *args, fisher="exact")
    assert coverage(tagged) == 1 and notes(tagged) == {}
    statistics, losses = train(loss, TOWERS, args, tagged)
    assert losses[-1] < losses[0]

    def forward(turned):
        def run(pair, see):
            z = similarities(TOWERS, *pair, see)
            return z.T if turned else z

        return run

    whole = jax.tree.map(lambda v: v[None], args)
    parts = [(0.5 / 7, forward(turned), whole, "categorical") for turned in (0, 1)]
    for name in ("image", "image_out", "text_out"):
        check_factors(statistics, name, parts)


# ------------------------------------------------------------------------- graph net

GRAPH = {
    "message": make_linear(0, 8, 5),
    "update": make_linear(1, 9, 4),
    "out": make_linear(2, 4, 3),
}


def graph_net(p, nodes, edges, see=unseen):
    """Two rounds of messages along edges ``[E, 2]``, summed where they arrive."""
    for _ in range(2):
        pairs = jnp.concatenate([nodes[edges[:, 0]], nodes[edges[:, 1]]], -1)
        sent = jnp.tanh(linear(p, "message", pairs, see))
        got = jax.ops.segment_sum(sent, edges[:, 1], len(nodes))
        both = jnp.concatenate([nodes, got], -1)
        nodes = nodes + jnp.tanh(linear(p, "update", both, see))
    return linear(p, "out", nodes, see)


@pytest.mark.parametrize("masked", [False, True])
def test_graph_net(masked):
    nodes, edges = normal(6, 4), jnp.asarray(RNG.integers(0, 6, (11, 2)))
    labels = jnp.asarray(RNG.integers(0, 3, 6))
    known = jnp.array([1, 1, 0, 1, 0, 1], bool)

    def loss(p, nodes, edges, labels, known):
        mask = known if masked else None
        z = kfac.categorical(graph_net(p, nodes, edges), mask=mask)
        logp = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1)[:, 0]
        return (
            -jnp.where(known, logp, 0).sum() / known.sum() if masked else -logp.mean()
        )

    args = nodes, edges, labels, known
    tagged = kfac.tag(loss, GRAPH, *args, fisher="exact")
    assert coverage(tagged) == 1 and notes(tagged) == {}
    statistics, losses = train(loss, GRAPH, args, tagged)
    assert losses[-1] < losses[0]
    if masked:
        return  # which messages reach a node that counts is the masks' own test
    whole = nodes[None], edges[None]
    part = 1 / 6, lambda pair, see: graph_net(GRAPH, *pair, see), whole, "categorical"
    for name in GRAPH:
        check_factors(statistics, name, [part])
