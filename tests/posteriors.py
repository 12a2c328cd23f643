"""Covariances of noisy K-FAC as dense matrices in numpy, and the root of its draws."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import kfac_jax_lite as kfac
from kfac_jax_lite.bayes import noisy
from tests.helpers import close

sample = kfac.bayes.sample


def matrix_of(factor, form, size):
    """A factor in any form as a dense matrix."""
    factor = np.asarray(factor, np.float64)
    if form == "diagonal":
        return np.diag(factor)
    if form == "block_diagonal":
        return scipy.linalg.block_diag(*factor)[:size, :size]
    return factor


def split_covariance(a, g, damping):
    """``(A + π√δ I)⁻¹ ⊗ (G + √δ/π I)⁻¹``."""
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    left = a + pi * np.sqrt(damping) * np.eye(len(a))
    right = g + np.sqrt(damping) / pi * np.eye(len(g))
    return np.kron(np.linalg.inv(left), np.linalg.inv(right))


def exact_covariance(a, g, damping):
    """``(A ⊗ G + δ I)⁻¹``."""
    matrix = np.kron(a, g)
    return np.linalg.inv(matrix + damping * np.eye(len(matrix)))


def basis_of(basis, form, size):
    """An eigenbasis as a dense matrix, padded as it is; that of a diagonal is empty."""
    if isinstance(basis, tuple):
        return np.eye(size)
    basis = np.asarray(basis)
    return scipy.linalg.block_diag(*basis) if form == "block_diagonal" else basis


def corrected_covariance(layer, factors, bases, damping):
    """``Q diag(1 / (s + δ)) Qᵀ`` with EKFAC's moments ``s``, ``Q = Q_A ⊗ Q_G``."""
    sizes, qs = layer.sizes, []
    for side, form, size in zip("ag", (layer.a_form, layer.g_form), sizes, strict=True):
        q = basis_of(getattr(bases, f"q_{side}"), form, size)
        wide = np.zeros((len(q), len(q)))
        wide[:size, :size] = matrix_of(getattr(factors, side), form, size)
        turned = q.T @ wide @ q
        close(turned, np.diag(np.diag(turned)), 1e-8)
        qs.append(q)
    kept = np.zeros((len(qs[0]), len(qs[1])), bool)
    kept[: sizes[0], : sizes[1]] = True
    at = np.flatnonzero(kept)
    q = np.kron(*qs)[at]
    return q @ np.diag(1 / (np.asarray(factors.s).ravel() + damping)) @ q.T


def block_covariance(layer, factors, inverse, method, damping):
    """``(F + δ I)⁻¹`` of one block without leading axes, densely."""
    if method == "ekfac":
        return corrected_covariance(layer, factors, inverse, damping)
    size_a, size_g = layer.sizes
    a = matrix_of(factors.a, layer.a_form, size_a)
    g = matrix_of(factors.g, layer.g_form, size_g)
    exact = exact_covariance if method == "eigh" else split_covariance
    return exact(a, g, damping)


def posterior_covariance(tagged, state, params, blocks, method, damping):
    """The whole covariance without its scale, in ravelled order.

    ``blocks(index)`` maps a tree of parameters to the matrices (one a group), units or
    leaves that are a layer's, by name.
    """
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    index = jax.tree.map(np.asarray, unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    total = np.zeros((flat.size, flat.size))
    layers = {layer.name: layer for layer in tagged.layers}
    for name, parts in blocks(index).items():
        factors, inverse = state.factors[name], state.inverses[name]
        for i, part in enumerate(parts):
            at = np.asarray(part).astype(int).ravel()
            if layers[name].kind == "scale_shift":
                unit = np.asarray(factors.blocks)[i]
                found = np.linalg.inv(unit + damping * np.eye(len(unit)))
            elif layers[name].kind == "diagonal":
                found = np.diag(1 / (np.asarray(factors.gradient).ravel() + damping))
            else:
                pick = (lambda x, i=i: x[i]) if layers[name].blocks else lambda x: x
                own, root = jax.tree.map(pick, (factors, inverse))
                found = block_covariance(layers[name], own, root, method, damping)
            total[np.ix_(at, at)] = found
    return total


def root_of_draws(state, params, monkeypatch):
    """``R`` with ``w = μ + R e``, by putting every unit vector in the noise's place."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def draw(e):
        with monkeypatch.context() as patch:
            patch.setattr(noisy, "noise_like", lambda params, key: unravel(e))
            weights = sample(state, params, jax.random.key(0))
        return jax.flatten_util.ravel_pytree(weights)[0]

    zero = jnp.zeros_like(flat)
    mean, root = jax.jit(lambda e: (draw(e), jax.jacfwd(draw)(e)))(zero)
    close(mean, flat)
    return np.asarray(root)


def homogeneous(p):
    """Kernel and bias as ``[in + 1, out]``."""
    kernel = p["kernel"].reshape(-1, p["kernel"].shape[-1])
    return jnp.concatenate([kernel, p["bias"][None]]) if "bias" in p else kernel
