"""What is checked of every client, and the oracle of its layers' factors.

A client's forward function calls ``see(name, a, z)`` where a layer makes ``z`` of rows
``a``; it returns ``z``. The oracle adds a shift there: with ``D`` the Jacobian of an
example's outputs by the shift of one row and ``Λ`` the Hessian of the negative
log-likelihood, a row that counts with ``ω`` (the weight of its term over the number of
terms) adds to ``A = Σ ω a aᵀ`` and ``G = Σ ω Dᵀ Λ D / Σ ω``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from tests.fuzz.program import square_root


def unseen(name, a, z):
    """What a forward function calls outside the oracle."""
    del name, a
    return z


def linear(p, name, x, see=unseen):
    """``x W + b``."""
    return see(name, x, x @ p[name]["w"] + p[name]["b"])


def make_linear(key, n_in, n_out):
    """Its parameters, the bias not zero."""
    w, b = jax.random.split(jax.random.key(key))
    return {
        "w": jax.random.normal(w, (n_in, n_out)) / n_in**0.5,
        "b": 0.1 * jax.random.normal(b, (n_out,)),
    }


def coverage(tagged):
    """The share of parameters in Kronecker, embedding or unit-wise blocks."""
    covered = sum(t.elements for t in tagged.layers if t.kind != "diagonal")
    return covered / sum(t.elements for t in tagged.layers)


def notes(tagged):
    """What the table says of its layers, by their parameters."""
    return {" ".join(t.params): f"{t.kind}: {t.note}" for t in tagged.layers if t.note}


def train(loss, params, args, tagged, tx=None, steps=3, key=None, tolerance=1e-9):
    """Steps of K-FAC: the gradient is plain JAX's, every number finite.

    Returns:
        The first step's statistics, and the losses before every step and after all.
    """
    tx = kfac.kfac(tagged.layers, 0.1, damping=0.1) if tx is None else tx

    @jax.jit
    def step(params, state, key):
        value, grads, statistics = tagged.value_and_grad(
            params, *args, opt_state=state, key=key
        )
        plain = jax.value_and_grad(loss)(params, *args)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        found = optax.apply_updates(params, updates), state
        return *found, (value, grads), plain, statistics

    state, losses, first = tx.init(params), [], None
    for number in range(steps):
        own = None if key is None else jax.random.fold_in(key, number)
        params, state, seen, plain, statistics = step(params, state, own)
        first = statistics if first is None else first
        for one, two in zip(jax.tree.leaves(seen), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
        losses.append(float(plain[0]))
    losses.append(float(jax.jit(loss)(params, *args)))
    return first, losses


def hessian(kind, z):
    """``Λ`` of a vector of outputs."""
    if kind == "categorical":
        p = jax.nn.softmax(z)
        return jnp.diag(p) - jnp.outer(p, p)
    if kind == "bernoulli":
        p = jax.nn.sigmoid(z)
        return jnp.diag(p * (1 - p))
    return jnp.eye(z.size)


def in_one(kind, z):
    """``Σ_j s_j s_jᵀ`` of rows ``[N, K]`` that depend on each other's inputs.

    ``s_j`` is column j of every row's root of ``Λ``: the exact Fisher pulls these back
    together, as if the rows were independent. With rows that are not it keeps products
    of different rows' derivatives, which a sampled Fisher has not in the mean.
    """
    root = square_root(kind, z)
    return jnp.einsum("nij,mkj->nimk", root, root).reshape(z.size, z.size)


def sums(forward, name, kind):
    """``x -> Σ a aᵀ, Σ Dᵀ Λ D, rows`` over the rows of one example at a layer.

    Args:
        forward: ``(x, see)`` to outputs ``[K]``, or ``[N, K]`` of a whole batch.
        name: The layer.
        kind: The likelihood.
    """

    def of(x):
        def run(shifts):
            inputs, shapes = [], []

            def see(own, a, z):
                if own != name:
                    return z
                inputs.append(a)
                shapes.append(jnp.zeros(z.shape, z.dtype))
                return z if shifts is None else z + shifts[len(inputs) - 1]

            out = forward(x, see)
            return out, (out, inputs, shapes)

        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(lambda: run(None)[1][2]),
        )
        slopes, (z, inputs, _) = jax.jacrev(run, has_aux=True)(zeros)
        z = jnp.atleast_1d(z)
        square = (hessian if z.ndim == 1 else in_one)(kind, z)
        a = g = rows = 0
        for own, d in zip(inputs, slopes, strict=True):
            own = own.reshape(-1, own.shape[-1])
            d = d.reshape(z.size, len(own), -1)
            a, rows = a + own.T @ own, rows + len(own)
            g = g + jnp.einsum("kro,kl,lrp->op", d, square, d)
        return a, g, jnp.asarray(float(rows))

    return of


def factors(parts, name):
    """``A`` and ``G`` of a layer, its bias aside.

    Args:
        parts: Of every term ``(ω, forward, examples, likelihood)``, ``ω`` a number or
            one for every example.
        name: The layer.
    """
    total = 0, 0, 0
    for omega, forward, xs, kind in parts:
        each = jax.jit(jax.vmap(sums(forward, name, kind)))(xs)
        omega = np.broadcast_to(omega, len(each[2]))
        own = [np.einsum("n,n...->...", omega, np.asarray(e)) for e in each]
        total = [t + o for t, o in zip(total, own, strict=True)]
    a, g, rows = total
    return a, g / rows


def check_factors(statistics, name, parts, layer=None, tolerance=1e-8):
    """A layer's ``A ⊗ G`` (without the bias' row) is the oracle's.

    How a shared trunk's weights are split between ``A`` and ``G`` does not matter.
    """
    a, g = factors(parts, name)
    seen = statistics[layer or name]
    own = np.asarray(seen.a)[: len(a), : len(a)]
    wanted, actual = np.kron(a, g), np.kron(own, seen.g)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, atol=tolerance * scale)
