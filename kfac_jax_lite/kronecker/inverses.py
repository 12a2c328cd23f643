"""What is cached between refreshes so that preconditioning costs matrix products only.

A ``Method`` makes the cache of a layer: ``initial`` and ``refresh``; entries that are
not finite mean that a factorisation failed. A cache solves with the damped factors.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, KroneckerStatistics, LayerTag
from kfac_jax_lite.kronecker import low_rank as eigenpairs
from kfac_jax_lite.kronecker.factors import Basis, Form, forms_of, mean_diagonals
from kfac_jax_lite.kronecker.low_rank import LowRankInverses

# The default rank, a share of a factor's size, and the least rank of any share.
SHARE, SMALLEST_RANK = 0.125, 32
Rank = int | float | Mapping[str, tuple[int, int]]


class FactorInverses(NamedTuple):
    """``(A + π√λ I)⁻¹`` and ``(G + √λ/π I)⁻¹``: damping is inside."""

    a: Array
    g: Array

    @property
    def input_width(self) -> int:
        """Entries of the vectors on which the input's inverse acts."""
        return jax.tree.leaves(self.a)[0].shape[-1]  # it may be slices

    def solve(self, layer: LayerTag, v: Array, moments: Any, damping: Array) -> Array:
        """``A⁻¹ V G⁻¹`` of a block that is as wide as the factors."""
        del moments, damping
        form_a, form_g = forms_of(layer)
        # In either order 2 a² g + 2 a g²: what lies between is as large as V, also for
        # blocks and diagonals. Only low-rank factors have something to choose.
        return form_g.times(form_a.columns(self.a, v), self.g)


class Eigenbases(NamedTuple):
    """``A = Q_A diag(d_a) Q_Aᵀ``, ``G = Q_G diag(d_g) Q_Gᵀ``; damping comes later.

    The basis of a factor kept as its diagonal is empty: the identity.
    """

    q_a: Basis
    d_a: Array
    q_g: Basis
    d_g: Array

    @property
    def input_width(self) -> int:
        """Entries of the vectors on which the input's basis acts."""
        return self.d_a.shape[-1]

    @property
    def products(self) -> Array:
        """``d_a d_gᵀ``: the eigenvalues of ``A ⊗ G``."""
        return self.d_a[..., :, None] * self.d_g[..., None, :]

    def solve(self, layer: LayerTag, v: Array, moments: Any, damping: Array) -> Array:
        """``Q_A ((Q_Aᵀ V Q_G) / (s + λ)) Q_Gᵀ``; without moments ``s = d_a d_gᵀ``."""
        form_a, form_g = forms_of(layer)
        q_a, _, q_g, _ = self
        s = self.products if moments is None else moments
        turned = form_g.times(form_a.columns(q_a, v), q_g)
        turned = turned / (s + damping.astype(v.dtype))
        back_a, back_g = form_a.transposed(q_a), form_g.transposed(q_g)
        return form_g.times(form_a.columns(back_a, turned), back_g)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to invert Kronecker factors.

    Attributes:
        name: What the user calls it.
        damped: Whether the damping is inside the cache (a new damping needs a refresh).
        moments: Whether statistics carry second moments in the eigenbasis.
        warm: Whether a refresh starts from the cache.
    """

    name: ClassVar[str]
    damped: ClassVar[bool] = False
    moments: ClassVar[bool] = False
    warm: ClassVar[bool] = False

    def initial(self, layer: LayerTag, dtype: Any) -> Any:
        """The cache of identities; nothing for kinds that are solved directly."""
        return self.identities(layer, dtype) if layer.kronecker else ()

    def identities(self, layer: LayerTag, dtype: Any) -> Any:
        """The cache of a Kronecker layer whose factors are identities."""
        raise NotImplementedError

    def refresh(
        self,
        layer: LayerTag,
        statistics: Any,
        cached: Any,
        damping: Array,
        first: Array,
    ) -> tuple[Any, Any]:
        """The new cache, and the statistics with what it changes in them.

        Args:
            layer: A Kronecker layer.
            statistics: Its averaged statistics.
            cached: The cache before.
            damping: ``λ``.
            first: Whether the cache holds no statistics yet.
        """
        raise NotImplementedError

    def ranks(self, layer: LayerTag) -> tuple[int, int]:
        """How many eigenpairs of each factor of a layer are kept: all."""
        return layer.a_shape[-1], layer.g_shape[-1]


class Cholesky(Method):
    """Explicit inverses of the damped factors, see ``linalg.spd_inverse``.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3.
    """

    name = "cholesky"
    damped = True

    def identities(self, layer: LayerTag, dtype: Any) -> FactorInverses:
        a, g = forms_of(layer)
        return FactorInverses(
            a.identity(layer.a_shape, dtype), g.identity(layer.g_shape, dtype)
        )

    def refresh(
        self,
        layer: LayerTag,
        statistics: Any,
        cached: Any,
        damping: Array,
        first: Array,
    ) -> tuple[FactorInverses, Any]:
        del first
        a, g = damped_factors(layer, statistics, damping)
        form_a, form_g = forms_of(layer)
        old_a, old_g = cached if self.warm else (None, None)
        inverses = self.invert(form_a, a, old_a), self.invert(form_g, g, old_g)
        return FactorInverses(*inverses), statistics

    def invert(self, form: Form, factor: Array, start: Any) -> Array:
        """``M⁻¹`` of a damped factor."""
        del start
        return form.inverse(factor)


class NewtonSchulz(Cholesky):
    """The same inverses by matrix products, warm-started from the cached ones.

    References:
        Schulz, 1933; Higham, 2008, "Functions of Matrices", Sec. 5.3.
    """

    name = "newton_schulz"
    warm = True

    def invert(self, form: Form, factor: Array, start: Any) -> Array:
        return form.iterated_inverse(factor, start, tolerance_of(factor))


class Fastest(Cholesky):
    """The same inverses by the method that is fastest for the device and the size."""

    name = "auto"
    warm = True

    def invert(self, form: Form, factor: Array, start: Any) -> Array:
        return form.fastest_inverse(factor, start, tolerance_of(factor))


class Eigh(Method):
    """Eigendecompositions: any damping of ``A ⊗ G + λ I`` is then exact.

    References:
        Grosse & Martens, 2016, arXiv:1602.01407, App. B.
    """

    name = "eigh"

    def identities(self, layer: LayerTag, dtype: Any) -> Eigenbases:
        a, g = forms_of(layer)
        bases = a.standard_basis(layer.a_shape, dtype)
        return Eigenbases(*bases, *g.standard_basis(layer.g_shape, dtype))

    def refresh(
        self,
        layer: LayerTag,
        statistics: Any,
        cached: Any,
        damping: Array,
        first: Array,
    ) -> tuple[Eigenbases, Any]:
        del cached, damping, first
        return eigenbases(layer, statistics), statistics


class Ekfac(Eigh):
    """Eigenbases with re-estimated second moments.

    The moments ``s`` are measured in the basis of the last refresh. A new basis takes
    them along: the diagonal of ``Q diag(s) Qᵀ`` in the new basis is
    ``(P_A ∘ P_A)ᵀ s (P_G ∘ P_G)`` with ``P = Q_oldᵀ Q_new``. The first basis starts
    from the products of the factors' eigenvalues.

    References:
        George et al., 2018, arXiv:1806.03884, Sec. 3 (EKFAC-ra).
    """

    name = "ekfac"
    moments = True
    warm = True

    def refresh(
        self,
        layer: LayerTag,
        statistics: Any,
        cached: Any,
        damping: Array,
        first: Array,
    ) -> tuple[Eigenbases, Any]:
        del damping
        bases = eigenbases(layer, statistics)
        form_a, form_g = forms_of(layer)
        turned = form_a.columns(turn(cached.q_a, bases.q_a), statistics.s)
        turned = form_g.times(turned, turn(cached.q_g, bases.q_g))
        return bases, statistics._replace(s=jnp.where(first, bases.products, turned))


@dataclasses.dataclass(frozen=True)
class LowRank(Method):
    """The factors' leading eigenpairs and tails, from the last ones.

    Attributes:
        rank: How many eigenpairs are kept, see ``low_rank``.

    References:
        See ``kfac_jax_lite.kronecker.low_rank``.
    """

    name = "low_rank"
    warm = True
    rank: int | float | tuple[Any, ...] = SHARE

    def ranks(self, layer: LayerTag) -> tuple[int, int]:
        """How many eigenpairs of each factor of a layer are kept; its size if all."""
        wanted = self.rank
        if isinstance(wanted, tuple):
            wanted = dict(wanted).get(layer.name, SHARE)
        pair = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        a, g = map(kept_pairs, pair, super().ranks(layer))
        return a, g

    def identities(self, layer: LayerTag, dtype: Any) -> LowRankInverses:
        (form_a, form_g), (rank_a, rank_g) = forms_of(layer), self.ranks(layer)

        def side(form: Form, shape: Shape, rank: int) -> Any:
            if not form.matrix:
                return (), jnp.ones(shape, dtype), ()
            return eigenpairs.initial(shape[:-2], shape[-1], rank, dtype)

        a = side(form_a, layer.a_shape, rank_a)
        return LowRankInverses(*a, *side(form_g, layer.g_shape, rank_g))

    def refresh(
        self,
        layer: LayerTag,
        statistics: Any,
        cached: Any,
        damping: Array,
        first: Array,
    ) -> tuple[LowRankInverses, Any]:
        del damping
        form_a, form_g = forms_of(layer)

        def side(form: Form, factor: Array, u: Any) -> Any:
            return (
                eigenpairs.refreshed(factor, u, first)
                if form.matrix
                else ((), factor, ())
            )

        a = side(form_a, statistics.a, cached.u_a)
        return LowRankInverses(*a, *side(form_g, statistics.g, cached.u_g)), statistics


def eigenbases(layer: LayerTag, statistics: Any) -> Eigenbases:
    """The eigenbases of a Kronecker layer's factors."""
    a, g = forms_of(layer)
    return Eigenbases(*a.eigh(statistics.a), *g.eigh(statistics.g))


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
    (a, g, _), (form_a, form_g) = statistics, forms_of(layer)
    for_a, for_g = split_damping(*mean_diagonals(layer, a, g), damping)
    return form_a.damped(a, for_a), form_g.damped(g, for_g)


def tolerance_of(factor: Array) -> float:
    """How small the residual of an iterated inverse must be."""
    return 1e-10 if factor.dtype == jnp.float64 else 1e-5


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
        return LowRank(tuple(pairs))
    if isinstance(rank, float):
        if not 0 < rank < 1:
            raise ValueError(f"a share of the size must be in (0, 1), got {rank!r}.")
    elif not whole_rank(rank):
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}.")
    return LowRank(rank)


def whole_rank(value: Any) -> bool:
    """Whether it is a number of eigenpairs."""
    return not isinstance(value, (bool, float)) and int(value) == value >= 1


def turn(old: Array | tuple[()], new: Array | tuple[()]) -> Array | tuple[()]:
    """``P ∘ P`` with ``P = Q_oldᵀ Q_new``; empty where the basis is the identity."""
    if isinstance(old, tuple) or isinstance(new, tuple):
        return ()
    return jnp.square(jnp.swapaxes(old, -1, -2) @ new)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (Cholesky(), NewtonSchulz(), Fastest(), Eigh(), Ekfac(), LowRank())
}


def method_named(name: str | Method) -> Method:
    """The method of that name, or a ValueError that lists them; a method is itself."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise ValueError(f"inverse must be one of {tuple(METHODS)}, got {name!r}.")
    return METHODS[name]
