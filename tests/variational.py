"""The variational optimisers in numpy, on a small network, after their papers."""

import jax
import numpy as np
import optax
import scipy.linalg

from tests import models, oracles

MODEL = models.mlp("small", (3, 4, 3))
STEPS, EXAMPLES, DATA = 4, 6, 64
VARIANCE, DAMPING, RATE = 2.0**-10, 2.0**-8, 2.0**-3
OPTIONS = {"prior_precision": 4.0, "temperature": 0.25, "augmentation": 4.0}


def backward(w, x, y):
    """Homogeneous inputs and every example's own cotangents, by layer."""
    ones = np.ones((len(x), 1))
    first = np.concatenate([x, ones], 1)
    hidden = np.tanh(first @ w["layer0"])
    second = np.concatenate([hidden, ones], 1)
    c1 = oracles.softmax(second @ w["layer1"]) - np.eye(3)[y]
    c0 = c1 @ w["layer1"][:-1].T * (1 - hidden**2)
    return {"layer0": (first, c0), "layer1": (second, c1)}


def gradient(w, batch):
    """``∇L``, the mean over the examples."""
    found = backward(w, *batch)
    return {k: a.T @ c / len(a) for k, (a, c) in found.items()}


def factors(w, batch):
    """``A = (1/N) Σ ā āᵀ`` and ``G = (1/N) Σ c cᵀ`` of the examples' own ``c``."""
    found = backward(w, *batch)
    return {k: (a.T @ a / len(a), c.T @ c / len(c)) for k, (a, c) in found.items()}


def squares(w, batch):
    """``(1/N) Σ_n g_n²``, one example after the other."""
    found = backward(w, *batch)
    return {
        k: sum(np.outer(a[n], c[n]) ** 2 for n in range(len(a))) / len(a)
        for k, (a, c) in found.items()
    }


def matrices(tree):
    """Kernel over bias, ``[in + 1, out]``, by layer."""
    return {
        k: np.concatenate([np.asarray(p["kernel"]), np.asarray(p["bias"])[None]])
        for k, p in tree.items()
    }


def noises(key, num_samples):
    """The standard normal numbers of every sample: the first half of its key's."""
    like = MODEL.params()
    for one in jax.random.split(key, num_samples):
        of_weights, _ = jax.random.split(one)
        yield matrices(optax.tree.random_like(of_weights, like, jax.random.normal))


def mean(trees):
    """Mean of dictionaries of arrays, or of tuples of them."""
    return jax.tree.map(lambda *v: sum(v) / len(v), *trees)


# ---------------------------------------------------------------- the algorithms


def drawn_matrix_normal(mu, e, averages, method):
    """``M + √(τ/N) L_A E L_Gᵀ``; in the eigenbasis the symmetric root."""
    out = {}
    for k, (a, g) in averages.items():
        if method == "eigh":
            curvature = np.kron(a, g) + DAMPING * np.eye(e[k].size)
            root = np.linalg.inv(scipy.linalg.sqrtm(curvature).real)
            moved = (root @ e[k].ravel()).reshape(e[k].shape)
        else:
            pi, root = oracles.pi_of(a, g), np.sqrt(DAMPING)
            c_a = np.linalg.cholesky(a + pi * root * np.eye(len(a)))
            c_g = np.linalg.cholesky(g + root / pi * np.eye(len(g)))
            moved = np.linalg.inv(c_a).T @ e[k] @ np.linalg.inv(c_g)
        out[k] = mu[k] + np.sqrt(VARIANCE) * moved
    return out


def noisy_steps(params, batches, keys, num_samples, method):
    """Zhang et al. 2018, Alg. 2, with K-FAC's momentum and trust region."""
    mu, decay, momentum, clip = matrices(params), 0.5, 0.75, 2.0**-6
    external, seen = 2.0**-6, {k: ([], []) for k in mu}
    velocity, averages = {k: 0.0 for k in mu}, None
    solve = oracles.solve_exact if method == "eigh" else oracles.solve_split
    for batch, key in zip(batches, keys, strict=True):
        found, grads = [], []
        for e in noises(key, num_samples):
            w = mu if averages is None else drawn_matrix_normal(mu, e, averages, method)
            grads.append(gradient(w, batch))
            found.append(factors(w, batch))
        g, f = mean(grads), mean(found)
        v = {k: g[k] + DAMPING * mu[k] for k in mu}
        averages = {}
        for k in mu:
            for history, value in zip(seen[k], f[k], strict=True):
                history.append(value)
            averages[k] = tuple(oracles.average(h, decay) for h in seen[k])
        u = {k: solve(*averages[k], v[k], DAMPING + external) for k in mu}
        size = RATE**2 * sum((u[k] * v[k]).sum() for k in mu)
        trust = min(1.0, np.sqrt(clip / size))
        velocity = {k: momentum * velocity[k] + trust * u[k] for k in mu}
        mu = {k: mu[k] - RATE * velocity[k] for k in mu}
    return mu


def vogn_steps(params, batches, keys, num_samples):
    """Osawa et al. 2019, Alg. 1, in the docstring's form."""
    mu, external, seen, s = matrices(params), 2.0**-6, ([], []), None
    for batch, key in zip(batches, keys, strict=True):
        found, grads = [], []
        for e in noises(key, num_samples):
            w = mu
            if s is not None:
                deviation = {k: np.sqrt(VARIANCE / (s[k] + DAMPING)) for k in mu}
                w = {k: mu[k] + deviation[k] * e[k] for k in mu}
            grads.append(gradient(w, batch))
            found.append(squares(w, batch))
        g = mean(grads)
        seen[0].append({k: g[k] + DAMPING * mu[k] for k in mu})
        seen[1].append(mean(found))
        m = {k: oracles.average([v[k] for v in seen[0]], 0.9) for k in mu}
        s = {k: oracles.average([v[k] for v in seen[1]], 0.8) for k in mu}
        mu = {k: mu[k] - RATE * m[k] / (s[k] + DAMPING + external) for k in mu}
    return mu


def ivon_steps(params, batches, keys, num_samples):
    """Shen et al. 2024, Alg. 1: ``λ = N/τ``, weight decay ``δ``."""
    mu, b1, b2 = matrices(params), 0.9, 0.95
    h, m = ({k: np.full_like(v, x) for k, v in mu.items()} for x in (0.5, 0.0))
    for t, (batch, key) in enumerate(zip(batches, keys, strict=True), start=1):
        sigma = {k: np.sqrt(VARIANCE / (h[k] + DAMPING)) for k in mu}
        grads, curvatures = [], []
        for e in noises(key, num_samples):
            w = {k: mu[k] + sigma[k] * e[k] for k in mu}
            g = gradient(w, batch)
            grads.append(g)
            curvatures.append({k: g[k] * (w[k] - mu[k]) / sigma[k] ** 2 for k in mu})
        g, new = mean(grads), mean(curvatures)
        m = {k: b1 * m[k] + (1 - b1) * g[k] for k in mu}
        h = {
            k: b2 * h[k]
            + (1 - b2) * new[k]
            + 0.5 * (1 - b2) ** 2 * (h[k] - new[k]) ** 2 / (h[k] + DAMPING)
            for k in mu
        }
        mu = {
            k: mu[k] - RATE * (m[k] / (1 - b1**t) + DAMPING * mu[k]) / (h[k] + DAMPING)
            for k in mu
        }
    return mu
