"""The six matrices as operators: one function each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.curvature.blocks import DensePart
from kfac_jax_lite.curvature.kronecker import kronecker_parts
from kfac_jax_lite.curvature.laws import Law
from kfac_jax_lite.curvature.layout import make_layout, owners, unit_wise
from kfac_jax_lite.curvature.operator import Kept, Operator, Streamed
from kfac_jax_lite.curvature.stream import Stream, ravel
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

# A sequence of tuples; checked by ``check_batches``, which says what it wants.
Batches = Any


def full(stream: Stream) -> Streamed:
    """The whole matrix."""
    return Streamed(stream, stream.size, stream.centre())


def block_diagonal(stream: Stream) -> Streamed:
    """All parameters of a layer are a block; of a fallback, each leaf."""
    layout = make_layout(stream.tagged, stream.params)
    own = owners(layout, stream.params)
    return Streamed(stream, stream.size, stream.centre(), layout, own)


def diagonal(stream: Stream) -> Kept:
    """The exact diagonal."""
    return kept(stream, [np.arange(stream.size)[:, None]])


def unit_blocks(stream: Stream) -> Kept:
    """Exact blocks of output units, channels and rows of embeddings."""
    return kept(stream, unit_wise(make_layout(stream.tagged, stream.params)))


def kept(stream: Stream, places: list[np.ndarray]) -> Kept:
    """Exact blocks at these positions."""
    pairs = zip(places, stream.moments(places), strict=True)
    return Kept([DensePart(jnp.asarray(i), m) for i, m in pairs], stream.size)


def kronecker(stream: Stream) -> Kept:
    """K-FAC's products."""
    layout = make_layout(stream.tagged, stream.params)
    return Kept(kronecker_parts(stream, layout, moments=False), stream.size)


def ekfac(stream: Stream) -> Kept:
    """The products' eigenbases with second moments."""
    layout = make_layout(stream.tagged, stream.params)
    return Kept(kronecker_parts(stream, layout, moments=True), stream.size)


APPROXIMATIONS: dict[str, Callable[[Stream], Streamed | Kept]] = {
    "full": full,
    "block_diagonal": block_diagonal,
    "kronecker": kronecker,
    "ekfac": ekfac,
    "diagonal": diagonal,
    "unit_wise": unit_blocks,
}


def make_operator(
    law: Law,
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str,
    *,
    key: Any = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Operator:
    """The operator of a law; see ``ggn`` for the arguments."""
    if approximation not in APPROXIMATIONS:
        raise ValueError(
            f"{law.name}: approximation must be one of {tuple(APPROXIMATIONS)}, got "
            f"{approximation!r}."
        )
    check_batches(law, batches)
    if chunk is not None and chunk < 1:
        raise ValueError(f"{law.name}: chunk must be at least 1, got {chunk}.")
    structure = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params
    )
    stream = Stream(tagged, law, params, batches, key, progress, chunk)
    form = APPROXIMATIONS[approximation](stream)
    return Operator(law.name, approximation, structure, form, stream)


def check_batches(law: Law, batches: Any) -> None:
    """They must be a sequence of tuples, at least one."""
    if not (hasattr(batches, "__len__") and hasattr(batches, "__iter__")):
        raise ValueError(
            f"{law.name}: batches is a {type(batches).__name__}, wanted a sequence "
            "that can be gone through for every product: a list, or an object with "
            "__len__ and __iter__."
        )
    if not len(batches):
        raise ValueError(f"{law.name}: batches is empty, wanted at least one batch.")
    first = next(iter(batches))
    if not isinstance(first, (tuple, list)):
        raise ValueError(
            f"{law.name}: a batch is a {type(first).__name__}, wanted the tuple of the "
            "loss's arguments after params, such as [(x, y)]."
        )


def hessian(
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str = "full",
    *,
    progress: bool = False,
    chunk: int | None = None,
    key: Any = None,
    num_samples: int = 32,
) -> Operator:
    """``H = ∇²L`` of the whole loss, regularisers included (the others are without).

    It may be indefinite. Products are forward over reverse. ``"diagonal"`` and
    ``"unit_wise"`` take ``P`` products over the data, a layer's dense block (for
    ``"kronecker"`` and ``"ekfac"``: the nearest product of that block, see
    ``curvature.kronecker``) as many as it has parameters.

    Args:
        tagged: The tagged loss; its output must be marked.
        params: The point.
        batches: As for ``ggn``.
        approximation: As for ``ggn``.
        progress: As for ``ggn``.
        chunk: As for ``ggn``.
        key: Of ``"diagonal"`` only: estimate it by products with random signs instead.
        num_samples: Products of that estimate.

    Returns:
        The operator.

    Raises:
        ValueError: As for ``ggn``; a key where there is nothing to estimate.

    References:
        Pearlmutter, 1994, Neural Computation 6(1); Bekas, Kokiopoulou & Saad, 2007,
        Appl. Numer. Math. 57 (the estimated diagonal).
    """
    law = Law("hessian", "hessian")
    options: dict[str, Any] = {"progress": progress, "chunk": chunk}
    if key is None:
        return make_operator(law, tagged, params, batches, approximation, **options)
    if approximation != "diagonal":
        raise ValueError(
            f"hessian: only approximation='diagonal' is estimated with a key, got "
            f"{approximation!r} and a key."
        )
    whole = make_operator(law, tagged, params, batches, "full", **options)
    flat = ravel(whole.diagonal(key, num_samples).value)
    index = jnp.arange(flat.size)[:, None]
    form = Kept([DensePart(index, flat[:, None, None])], flat.size)
    return Operator("hessian", "diagonal", whole.structure, form, whole.stream)


def ggn(
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str = "full",
    *,
    progress: bool = False,
    chunk: int | None = None,
) -> Operator:
    """The generalised Gauss-Newton matrix ``(1/N) Σ_n J_nᵀ Λ(z_n) J_n``.

    ``J_n`` is the Jacobian of row ``n`` of the marked output and ``Λ`` the Hessian of
    its loss; what the loss adds to the marked outputs' terms (regularisers) does not
    enter. For the marked likelihoods it equals the Fisher matrix.

    Args:
        tagged: The tagged loss; its output must be marked.
        params: The point.
        batches: Tuples of the loss's other arguments, a sequence that can be gone
            through many times; the matrix is the mean over all rows that count. Arrays
            may be sharded over devices. Another shape of batch compiles anew.
        approximation: ``"full"``; ``"block_diagonal"`` (a block for every layer: each
            product costs as many as there are blocks); ``"kronecker"`` and ``"ekfac"``
            (see ``curvature.kronecker``); ``"diagonal"`` and ``"unit_wise"`` (incoming
            weights and bias of a unit, scale and shift of a channel, a row of an
            embedding), both exact, from one backward pass over its batch for every row
            and column of ``Λ``'s root: of ``N C`` rows in all, in batches of ``B``, the
            cost is that of ``N C B`` examples, so use small batches.
        progress: Whether to show a bar over the batches (needs rich).
        chunk: How many backward passes, or products for ``to_dense``, at once.

    Returns:
        The operator; approximations other than the first two are computed here.

    Raises:
        ValueError: An unknown approximation; no batches; no marked output; a layer that
            is too large for what is asked.

    References:
        Schraudolph, 2002, Neural Computation 14(7); Martens, 2020, arXiv:1412.1193.
    """
    law = Law("ggn", "exact")
    options: dict[str, Any] = {"progress": progress, "chunk": chunk}
    return make_operator(law, tagged, params, batches, approximation, **options)


def fisher(
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str = "full",
    *,
    progress: bool = False,
    chunk: int | None = None,
) -> Operator:
    """The Fisher matrix ``(1/N) Σ_n E_y ∇log p(y | z_n) ∇log p(y | z_n)ᵀ``, exactly.

    The marked likelihoods are exponential families in their natural parameters, where
    it is the generalised Gauss-Newton matrix: the same operator under another name.

    Args:
        tagged: As for ``ggn``.
        params: As for ``ggn``.
        batches: As for ``ggn``.
        approximation: As for ``ggn``.
        progress: As for ``ggn``.
        chunk: As for ``ggn``.

    Returns:
        The operator.

    References:
        Martens, 2020, arXiv:1412.1193, Sec. 9.2.
    """
    law = Law("fisher", "exact")
    options: dict[str, Any] = {"progress": progress, "chunk": chunk}
    return make_operator(law, tagged, params, batches, approximation, **options)


def mc_fisher(
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str = "full",
    *,
    key: Any = None,
    num_samples: int = 1,
    progress: bool = False,
    chunk: int | None = None,
) -> Operator:
    """The Fisher matrix with labels drawn from the model; unbiased.

    Batch ``b`` draws with ``fold_in(key, b)``: all products of an operator see the same
    labels, and so do all approximations made with one key.

    Args:
        tagged: As for ``ggn``.
        params: As for ``ggn``.
        batches: As for ``ggn``.
        approximation: As for ``ggn``; a row costs ``num_samples`` backward passes.
        key: PRNG key.
        num_samples: Labels drawn for every row.
        progress: As for ``ggn``.
        chunk: As for ``ggn``.

    Returns:
        The operator.

    Raises:
        ValueError: No key, no samples; as for ``ggn``.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 5.
    """
    if key is None:
        raise ValueError("mc_fisher samples labels: pass key=jax.random.key(…).")
    if num_samples < 1:
        raise ValueError(f"mc_fisher: num_samples must be >= 1, got {num_samples}.")
    law = Law("mc_fisher", "mc", num_samples=int(num_samples))
    options: dict[str, Any] = {"progress": progress, "chunk": chunk, "key": key}
    return make_operator(law, tagged, params, batches, approximation, **options)


def empirical_fisher(
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str = "full",
    *,
    progress: bool = False,
    chunk: int | None = None,
) -> Operator:
    """``(1/N) Σ_n g_n g_nᵀ``, ``g_n`` the gradient of row ``n``'s own loss; uncentred.

    Args:
        tagged: As for ``ggn``.
        params: As for ``ggn``.
        batches: As for ``ggn``.
        approximation: As for ``ggn``; a row costs one backward pass.
        progress: As for ``ggn``.
        chunk: As for ``ggn``.

    Returns:
        The operator.

    References:
        Kunstner, Balles & Hennig, 2019, arXiv:1905.12558.
    """
    law = Law("empirical_fisher", "empirical")
    options: dict[str, Any] = {"progress": progress, "chunk": chunk}
    return make_operator(law, tagged, params, batches, approximation, **options)


def gradient_covariance(
    tagged: TaggedLoss,
    params: Any,
    batches: Batches,
    approximation: str = "full",
    *,
    progress: bool = False,
    chunk: int | None = None,
) -> Operator:
    """``(1/N) Σ_n (g_n − ḡ)(g_n − ḡ)ᵀ`` with ``ḡ`` the mean over all batches.

    The covariance of the rows' gradients with ``1/N`` (not ``1/(N − 1)``): of one
    example's stochastic gradient. ``ḡ`` is the gradient of the loss without what it
    adds to the marked outputs' terms.

    Args:
        tagged: As for ``ggn``.
        params: As for ``ggn``.
        batches: As for ``ggn``.
        approximation: As for ``ggn``; ``"kronecker"`` and ``"ekfac"`` are the nearest
            to each layer's dense block, which is formed.
        progress: As for ``ggn``.
        chunk: As for ``ggn``.

    Returns:
        The operator.
    """
    law = Law("gradient_covariance", "empirical", centred=True)
    options: dict[str, Any] = {"progress": progress, "chunk": chunk}
    return make_operator(law, tagged, params, batches, approximation, **options)
