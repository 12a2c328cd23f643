"""What is cached between refreshes so that preconditioning costs matrix products only.

One method per entry of ``METHODS``. Each has an initial value and ``refresh``, which
returns the new cache; entries that are not finite mean that a factorisation failed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kfac_jax_lite.damping import split
from kfac_jax_lite.linalg import add_diagonal, newton_schulz_inverse, spd_inverse
from kfac_jax_lite.types import Array, KroneckerStatistics, LayerTag


class FactorInverses(NamedTuple):
    """``(A + π√λ I)⁻¹`` and ``(G + √λ/π I)⁻¹``: damping is inside."""

    a: Array
    g: Array


class Eigenbases(NamedTuple):
    """``A = Q_A diag(d_a) Q_Aᵀ``, ``G = Q_G diag(d_g) Q_Gᵀ``; damping comes later."""

    q_a: Array
    d_a: Array
    q_g: Array
    d_g: Array


class Method(NamedTuple):
    """One way to invert Kronecker factors.

    Attributes:
        refresh: ``(statistics, cached, damping, first) -> (cached, statistics)``.
        damped: Whether the damping is inside the cache (a new damping needs a refresh).
        moments: Whether statistics carry second moments in the eigenbasis.
    """

    refresh: Callable[..., tuple[Any, KroneckerStatistics]]
    damped: bool
    moments: bool


def cholesky(statistics, cached, damping, first):
    """Explicit inverses of the damped factors by Cholesky factorisation.

    Returns:
        ``(inverses, statistics)``.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3.
    """
    del cached, first
    a, g, _ = statistics
    for_a, for_g = split(a, g, damping)
    inverses = FactorInverses(
        spd_inverse(add_diagonal(a, for_a)), spd_inverse(add_diagonal(g, for_g))
    )
    return inverses, statistics


def newton_schulz(statistics, cached, damping, first):
    """The same inverses by matrix products, warm-started from the cached ones.

    Returns:
        ``(inverses, statistics)``.

    References:
        Schulz, 1933; Higham, 2008, "Functions of Matrices", Sec. 5.3.
    """
    del first
    a, g, _ = statistics
    for_a, for_g = split(a, g, damping)
    tolerance = 1e-10 if a.dtype == jnp.float64 else 1e-5
    inverses = FactorInverses(
        newton_schulz_inverse(add_diagonal(a, for_a), cached.a, tolerance),
        newton_schulz_inverse(add_diagonal(g, for_g), cached.g, tolerance),
    )
    return inverses, statistics


def eigh(statistics, cached, damping, first):
    """Eigendecompositions: any damping of ``A ⊗ G + λ I`` is then exact.

    Returns:
        ``(bases, statistics)``.

    References:
        Grosse & Martens, 2016, arXiv:1602.01407, App. B.
    """
    del cached, damping, first
    (d_a, q_a), (d_g, q_g) = (jnp.linalg.eigh(m) for m in statistics[:2])
    # Rounding makes the smallest eigenvalues of a singular factor slightly negative.
    bases = Eigenbases(q_a, jnp.maximum(d_a, 0), q_g, jnp.maximum(d_g, 0))
    return bases, statistics


def ekfac(statistics, cached, damping, first):
    """Eigenbases with re-estimated second moments.

    The moments ``s`` are measured in the basis of the last refresh. A new basis takes
    them along: the diagonal of ``Q diag(s) Qᵀ`` in the new basis is
    ``(P_A ∘ P_A)ᵀ s (P_G ∘ P_G)`` with ``P = Q_oldᵀ Q_new``. The first basis starts
    from the products of the factors' eigenvalues.

    Returns:
        ``(bases, statistics)``, the moments turned.

    References:
        George et al., 2018, arXiv:1806.03884, Sec. 3 (EKFAC-ra).
    """
    bases, _ = eigh(statistics, cached, damping, first)
    product = bases.d_a[..., :, None] * bases.d_g[..., None, :]
    turn_a = jnp.square(jnp.swapaxes(cached.q_a, -1, -2) @ bases.q_a)
    turn_g = jnp.square(jnp.swapaxes(cached.q_g, -1, -2) @ bases.q_g)
    turned = jnp.swapaxes(turn_a, -1, -2) @ statistics.s @ turn_g
    return bases, statistics._replace(s=jnp.where(first, product, turned))


METHODS = {
    "cholesky": Method(cholesky, damped=True, moments=False),
    "newton_schulz": Method(newton_schulz, damped=True, moments=False),
    "eigh": Method(eigh, damped=False, moments=False),
    "ekfac": Method(ekfac, damped=False, moments=True),
}


def method_named(name: str) -> Method:
    """The method of that name, or a ValueError that lists them."""
    if name not in METHODS:
        raise ValueError(f"inverse must be one of {tuple(METHODS)}, got {name!r}.")
    return METHODS[name]


def initial_inverse(layer: LayerTag, method: Method, dtype: Any) -> Any:
    """Identity inverses or bases; nothing for kinds that are solved directly."""
    if not layer.kronecker:
        return ()

    def eye(shape):
        return jnp.array(jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape))

    a, g = layer.a_shape, layer.g_shape
    if method.damped:
        return FactorInverses(eye(a), eye(g))
    return Eigenbases(eye(a), jnp.ones(a[:-1], dtype), eye(g), jnp.ones(g[:-1], dtype))
