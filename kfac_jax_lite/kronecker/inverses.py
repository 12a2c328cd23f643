"""What is cached between refreshes so that preconditioning costs matrix products only.

One method per entry of ``METHODS``. Each has an initial value and ``refresh``, which
returns the new cache; entries that are not finite mean that a factorisation failed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, KroneckerStatistics, LayerTag
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker import low_rank as eigenpairs
from kfac_jax_lite.kronecker.low_rank import LowRankInverses

# The default rank, a share of a factor's size, and the least rank of any share.
SHARE, SMALLEST_RANK = 0.125, 32
Rank = int | float | Mapping[str, tuple[int, int]]


class FactorInverses(NamedTuple):
    """``(A + π√λ I)⁻¹`` and ``(G + √λ/π I)⁻¹``: damping is inside."""

    a: Array
    g: Array


class Eigenbases(NamedTuple):
    """``A = Q_A diag(d_a) Q_Aᵀ``, ``G = Q_G diag(d_g) Q_Gᵀ``; damping comes later.

    The basis of a factor kept as its diagonal is empty: the identity.
    """

    q_a: Array | tuple[()]
    d_a: Array
    q_g: Array | tuple[()]
    d_g: Array


class Method(NamedTuple):
    """One way to invert Kronecker factors.

    Attributes:
        name: What the user calls it.
        refresh: ``(layer, statistics, cached, damping, first) -> (cached,
            statistics)``.
        damped: Whether the damping is inside the cache (a new damping needs a refresh).
        moments: Whether statistics carry second moments in the eigenbasis.
        rank: Of ``low_rank``: how many eigenpairs are kept, see there.
    """

    name: str
    refresh: Callable[..., tuple[Any, KroneckerStatistics]]
    damped: bool
    moments: bool
    rank: int | float | tuple[Any, ...] = SHARE

    def ranks(self, layer: LayerTag) -> tuple[int, int]:
        """How many eigenpairs of each factor of a layer are kept; its size if all."""
        sizes = layer.a_shape[-1], layer.g_shape[-1]
        wanted = self.rank
        if isinstance(wanted, tuple):
            wanted = dict(wanted).get(layer.name, SHARE)
        if not isinstance(wanted, tuple):
            wanted = (wanted, wanted)
        a, g = (kept_pairs(w, size) for w, size in zip(wanted, sizes, strict=True))
        return a, g


def kept_pairs(rank: int | float, size: int) -> int:
    """A factor's rank, of that number or share of its size."""
    if isinstance(rank, float):
        rank = max(SMALLEST_RANK, math.ceil(rank * size))
    return size if 2 * rank >= size else rank


def split_damping(mean_a: Array, mean_g: Array, damping: Array) -> tuple[Array, Array]:
    """Splits Tikhonov damping over both Kronecker factors.

    ``π = √((tr A / dim A) / (tr G / dim G))``; ``A`` gets ``π √λ`` and ``G`` gets
    ``√λ / π``, so that ``(A + π√λ I) ⊗ (G + √λ/π I) ≈ A ⊗ G + λ I``.

    Args:
        mean_a: ``tr A / dim A``, ``[*blocks]``.
        mean_g: ``tr G / dim G``, ``[*blocks]``.
        damping: ``λ``, a scalar.

    Returns:
        The two additions, ``[*blocks]`` each; ``π = 1`` where a trace vanishes.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3.
    """
    proper = (mean_a > 0) & (mean_g > 0)
    ratio = jnp.where(proper, mean_a, 1) / jnp.where(proper, mean_g, 1)
    pi, root = jnp.sqrt(ratio), jnp.sqrt(damping).astype(mean_a.dtype)
    return pi * root, root / pi


def damped_factors(
    layer: LayerTag, statistics: KroneckerStatistics, damping: Array
) -> tuple[Array, Array]:
    """``A + π√λ I`` and ``G + √λ/π I``."""
    a, g, _ = statistics
    size_a, size_g = layer.sizes
    mean_a = forms.mean_diagonal(a, layer.a_form, size_a)
    mean_g = forms.mean_diagonal(g, layer.g_form, size_g)
    for_a, for_g = split_damping(mean_a, mean_g, damping)
    return forms.damped(a, layer.a_form, for_a), forms.damped(g, layer.g_form, for_g)


def cholesky(
    layer: LayerTag,
    statistics: KroneckerStatistics,
    cached: Any,
    damping: Array,
    first: Array,
) -> tuple[FactorInverses, KroneckerStatistics]:
    """Explicit inverses of the damped factors, see ``linalg.spd_inverse``.

    Returns:
        ``(inverses, statistics)``.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3.
    """
    del cached, first
    a, g = damped_factors(layer, statistics, damping)
    inverses = forms.inverse(a, layer.a_form), forms.inverse(g, layer.g_form)
    return FactorInverses(*inverses), statistics


def newton_schulz(
    layer: LayerTag,
    statistics: KroneckerStatistics,
    cached: Any,
    damping: Array,
    first: Array,
) -> tuple[FactorInverses, KroneckerStatistics]:
    """The same inverses by matrix products, warm-started from the cached ones.

    Returns:
        ``(inverses, statistics)``.

    References:
        Schulz, 1933; Higham, 2008, "Functions of Matrices", Sec. 5.3.
    """
    del first
    record = layer, statistics, cached, damping
    return warm_started(forms.iterated_inverse, *record), statistics


def auto(
    layer: LayerTag,
    statistics: KroneckerStatistics,
    cached: Any,
    damping: Array,
    first: Array,
) -> tuple[FactorInverses, KroneckerStatistics]:
    """The same inverses by the method that is fastest for the device and the size.

    Returns:
        ``(inverses, statistics)``.
    """
    del first
    record = layer, statistics, cached, damping
    return warm_started(forms.fastest_inverse, *record), statistics


def warm_started(
    invert: Callable[..., Array],
    layer: LayerTag,
    statistics: Any,
    cached: Any,
    damping: Array,
) -> FactorInverses:
    """Explicit inverses of the damped factors, from the cached ones."""
    a, g = damped_factors(layer, statistics, damping)
    tolerance = 1e-10 if a.dtype == jnp.float64 else 1e-5
    return FactorInverses(
        invert(a, layer.a_form, cached.a, tolerance),
        invert(g, layer.g_form, cached.g, tolerance),
    )


def eigh(
    layer: LayerTag,
    statistics: KroneckerStatistics,
    cached: Any,
    damping: Array,
    first: Array,
) -> tuple[Eigenbases, KroneckerStatistics]:
    """Eigendecompositions: any damping of ``A ⊗ G + λ I`` is then exact.

    Returns:
        ``(bases, statistics)``.

    References:
        Grosse & Martens, 2016, arXiv:1602.01407, App. B.
    """
    del cached, damping, first
    a = forms.eigh(statistics.a, layer.a_form)
    g = forms.eigh(statistics.g, layer.g_form)
    return Eigenbases(*a, *g), statistics


def ekfac(
    layer: LayerTag,
    statistics: Any,
    cached: Any,
    damping: Array,
    first: Array,
) -> tuple[Eigenbases, KroneckerStatistics]:
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
    bases, _ = eigh(layer, statistics, cached, damping, first)
    product = bases.d_a[..., :, None] * bases.d_g[..., None, :]
    turned = forms.columns(turn(cached.q_a, bases.q_a), statistics.s, layer.a_form)
    turned = forms.times(turned, turn(cached.q_g, bases.q_g), layer.g_form)
    return bases, statistics._replace(s=jnp.where(first, product, turned))


def low_rank_refresh(
    layer: LayerTag,
    statistics: KroneckerStatistics,
    cached: Any,
    damping: Array,
    first: Array,
) -> tuple[LowRankInverses, KroneckerStatistics]:
    """The factors' leading eigenpairs and tails, from the last ones.

    Returns:
        ``(inverses, statistics)``.

    References:
        See ``kfac_jax_lite.kronecker.low_rank``.
    """
    del damping

    def side(factor: Array, form: str, u: Any) -> Any:
        if form == forms.DIAGONAL:
            return (), factor, ()
        return eigenpairs.refreshed(factor, u, first)

    a = side(statistics.a, layer.a_form, cached.u_a)
    g = side(statistics.g, layer.g_form, cached.u_g)
    return LowRankInverses(*a, *g), statistics


def low_rank(rank: Rank = SHARE) -> Method:
    """The method ``inverse="low_rank"`` with another rank.

    Every factor is kept as ``U diag(e) Uᵀ + τ (I − U Uᵀ)``: its leading ``r``
    eigenpairs, found by one step of subspace iteration from the last ones, and a tail
    that keeps the trace. The damped inverse of the product of two such factors is then
    exact, as with ``"eigh"``.

    Args:
        rank: ``r``: a number; a float below 1, that share of each factor's size, but at
            least 32; or layer name to ``(r of A, r of G)``, as ``kfac.choose_ranks``
            returns it, with the default for layers that it lacks. A factor is kept
            whole where ``2 r`` is its size or more, and so is one that is kept as its
            diagonal.

    Returns:
        What to pass as ``inverse=``.

    Raises:
        ValueError: A rank that is not positive, or a share that is not below 1.
    """
    if isinstance(rank, Mapping):
        for name, pair in rank.items():
            if len(pair) != 2 or not all(whole_rank(r) for r in pair):
                raise ValueError(
                    f"layer {name} wants two ranks, whole numbers >= 1, got {pair!r}."
                )
        pairs = sorted((k, (int(a), int(g))) for k, (a, g) in rank.items())
        return METHODS["low_rank"]._replace(rank=tuple(pairs))
    if isinstance(rank, float):
        if not 0 < rank < 1:
            raise ValueError(f"a share of the size must be in (0, 1), got {rank!r}.")
    elif not whole_rank(rank):
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}.")
    return METHODS["low_rank"]._replace(rank=rank)


def whole_rank(value: Any) -> bool:
    """Whether it is a number of eigenpairs."""
    return not isinstance(value, (bool, float)) and int(value) == value >= 1


def turn(old: Array | tuple[()], new: Array | tuple[()]) -> Array | tuple[()]:
    """``P ∘ P`` with ``P = Q_oldᵀ Q_new``; empty where the basis is the identity."""
    if isinstance(old, tuple) or isinstance(new, tuple):
        return ()
    return jnp.square(jnp.swapaxes(old, -1, -2) @ new)


METHODS = {
    method.name: method
    for method in (
        Method("cholesky", cholesky, damped=True, moments=False),
        Method("newton_schulz", newton_schulz, damped=True, moments=False),
        Method("auto", auto, damped=True, moments=False),
        Method("eigh", eigh, damped=False, moments=False),
        Method("ekfac", ekfac, damped=False, moments=True),
        Method("low_rank", low_rank_refresh, damped=False, moments=False),
    )
}


def method_named(name: str | Method) -> Method:
    """The method of that name, or a ValueError that lists them; a method is itself."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise ValueError(f"inverse must be one of {tuple(METHODS)}, got {name!r}.")
    return METHODS[name]


def input_width(inverse: Any) -> int:
    """Entries of the vectors on which a cached inverse of the input factor acts."""
    if isinstance(inverse, FactorInverses):
        return jax.tree.leaves(inverse.a)[0].shape[-1]  # it may be slices
    if isinstance(inverse, Eigenbases):
        return inverse.d_a.shape[-1]
    diagonal = isinstance(inverse.u_a, tuple)
    return inverse.e_a.shape[-1] if diagonal else inverse.u_a.shape[-2]


def initial_inverse(layer: LayerTag, method: Method, dtype: Any) -> Any:
    """Identity inverses or bases; nothing for kinds that are solved directly."""
    if not layer.kronecker:
        return ()

    def eye(shape: Shape, form: str):
        if form == forms.DIAGONAL:
            return jnp.ones(shape, dtype)
        return jnp.array(jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape))

    def basis(shape: Shape, form: str):
        entries = forms.width(form, shape)
        tail = {forms.FULL: 2, forms.BLOCKS: 3, forms.DIAGONAL: 1}[form]
        ones = jnp.ones((*shape[: len(shape) - tail], entries), dtype)
        return () if form == forms.DIAGONAL else eye(shape, form), ones

    def pairs(rank: int, shape: Shape, form: str) -> Any:
        if form == forms.DIAGONAL:
            return (), jnp.ones(shape, dtype), ()
        return eigenpairs.initial(shape[:-2], shape[-1], rank, dtype)

    a, g = (layer.a_shape, layer.a_form), (layer.g_shape, layer.g_form)
    if method.name == "low_rank":
        of_a, of_g = method.ranks(layer)
        return LowRankInverses(*pairs(of_a, *a), *pairs(of_g, *g))
    if method.damped:
        return FactorInverses(eye(*a), eye(*g))
    return Eigenbases(*basis(*a), *basis(*g))
