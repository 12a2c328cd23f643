"""How many rows a layer has, and what its curvature costs in arithmetic.

Counted are matrix products (``2 m k n`` for ``[m, k] @ [k, n]``) and factorisations.
Elementwise work, such as moving averages, unit-wise and diagonal solves, activations
and the counting of tokens, is not: it is bound by memory, not by arithmetic.

Notation: ``R`` rows, factors of shape ``[*blocks, d, d]``; ``A`` is ``a × a`` and ``G``
``g × g``. A factor kept as diagonal blocks costs what its blocks cost, one kept as its
diagonal nothing.
"""

import functools
import math
from typing import Any, NamedTuple

from kfac_jax_lite.core.likelihoods import MASK
from kfac_jax_lite.core.linalg import spd_inverse_flops
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import Method
from kfac_jax_lite.statistics.conv import chosen_axis, sampled_geometry, shifted_flops
from kfac_jax_lite.statistics.deferred import thin_layers
from kfac_jax_lite.statistics.estimators import Recipe, count_rows, make_recipe
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.tagging.sites import ConvGeometry, RaggedGeometry, Site

# Iterations of a warm-started Newton-Schulz inverse; an assumption, it depends on data.
NEWTON_SCHULZ_STEPS = 3


class Rows(NamedTuple):
    """How often a layer's weight is applied to a batch.

    Attributes:
        forward: Rows of the product ``x W`` over all its uses.
        reverse: Rows of ``y Wᵀ``, for tied weights.
        statistics: ``R`` of the statistics of ``x W``: after ``reduce`` and
            ``subsample``; of a scale_shift layer the number of example gradients.
        saved: Operations that shifted products of a convolution's patches spare.
        thin: Whether the rows are so few that, with ``deferred=True`` on one device,
            the gradient is preconditioned by its rows.
    """

    forward: int
    reverse: int
    statistics: int
    saved: int = 0
    thin: bool = False


def layer_rows(tagged: TaggedLoss, params: Any, *args: Any) -> dict[str, Rows]:
    """Rows of every layer for a batch, from shapes alone; nothing is executed.

    Args:
        tagged: The tagged loss.
        params: Parameters, arrays or ``jax.ShapeDtypeStruct``.
        *args: Further arguments, likewise: the batch of *one* device. Its size need not
            be that of ``kfac.tag``.

    Returns:
        Layer name to rows.
    """
    found = tagged.trace(params, args, tagged.fisher != "empirical")
    reduce, n = tagged.weight_sharing == "reduce", found.num_examples
    rows, thin = {}, thin_layers(found)
    for layer in found.layers:
        sites = found.sites.get(layer.name, [])
        if layer.fallback:
            rows[layer.name] = Rows(n, 0, n)
            continue
        masked = MASK in found.marks
        recipe = make_recipe(layer, sites, n, reduce, masked, tagged.subsample)
        forward = count_rows([s for s in sites if not s.reverse], False)
        if recipe.by_example:
            statistics = n
        elif layer.unitwise:
            statistics = sum(example_gradients(site) for site in sites)
        else:
            shares = [lattice.share for s in sites if (lattice := recipe.lattice(s))]
            statistics = recipe.num_rows // min(shares, default=1)
        saved = sum(saved_flops(site, recipe) for site in sites)
        ragged = any(isinstance(s.geometry, RaggedGeometry) for s in sites)
        share = math.prod(layer.blocks) if ragged else 1  # a row meets one block
        numbers = (forward, recipe.rows_out, statistics)
        own, reverse, refreshed = (-(-number // share) for number in numbers)
        thin_one = layer.name in thin
        rows[layer.name] = Rows(own, reverse, refreshed, saved, thin_one)
    return rows


def saved_flops(site: Site, recipe: Recipe) -> int:
    """``2 R a²`` less what shifted products take, where a convolution has them."""
    geometry = site.geometry
    if not isinstance(geometry, ConvGeometry) or not geometry.n_in:
        return 0
    lattice = recipe.lattice(site)
    if lattice is not None:
        geometry = sampled_geometry(geometry, lattice)
        if lattice.uneven:
            return 0
    axis = chosen_axis(geometry, recipe.at(site))
    if axis is None:
        return 0
    rows, size = math.prod(geometry.rows), recipe.layer.a_shape[-1]
    full = forms.symmetric_product_flops(rows, size)
    times = site.repeat * math.prod(recipe.layer.stack)
    return (full - shifted_flops(geometry, axis)) * times


def example_gradients(site: Site) -> int:
    """Number of gradients ``s_n`` that one site of a scale_shift layer makes."""
    return site.examples * site.repeat


def gradient_flops(layer: LayerTag, rows: Rows) -> int:
    """``6 R in out``: forward product, gradient of the input, gradient of the weight.

    Of products with parameters only: attention scores and elementwise layers are not
    in it, and the first layer's input is taken to need its gradient too.
    """
    if not layer.kronecker:
        return 0
    weight = math.prod((*layer.stack, *layer.blocks, *layer.views[0].core[-2:]))
    products = rows.reverse + (0 if layer.one_hot else rows.forward)
    return 6 * products * weight


def statistics_flops(layer: LayerTag, rows: Rows, moments: bool = False) -> int:
    """``2 R a² + 2 R g²``: ``A = Σ ā āᵀ`` and ``G = Σ c cᵀ``.

    Of a large one a block is spared, see ``forms.symmetric_product``.

    A convolution whose patches are multiplied with themselves shifted along an axis on
    which the kernel has ``k`` points takes about a ``k``-th for ``A``: ``rows.saved``
    less (see ``factors.conv``).

    A tied weight has both for its reverse use as well; a scale_shift layer has
    ``2 R k²`` for each of its ``k × k`` blocks. EKFAC turns the rows into the
    eigenbasis and multiplies their squares: ``2 R a² + 2 R g² + 2 R a g`` more.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 8 (the same terms).
    """
    r = rows.statistics
    if layer.fallback:
        return 0
    if layer.unitwise:
        return 2 * r * math.prod(layer.a_shape)
    a, g = (entries(*pair) for pair in factors_of(layer))
    of_a, of_g = (functools.partial(outer_flops, *pair) for pair in factors_of(layer))
    total = (0 if layer.one_hot else of_a(r)) + of_g(r)
    total += of_a(rows.reverse) + of_g(rows.reverse) - rows.saved
    if moments:
        total += 2 * (r + rows.reverse) * (a + g)
        product = 0 if layer.one_hot else r
        total += 2 * (product + rows.reverse) * moments_size(layer)
    return total


def inversion_flops(layer: LayerTag, method: Method) -> int:
    """Operations of one inversion of both factors.

    * Cholesky, and ``"auto"`` as on a CPU: the products of an elimination by blocks,
      see ``linalg.spd_inverse_flops``.
    * Newton-Schulz: two residuals ``2 d³`` and two products per iteration,
      ``(4 + 4 i) d³`` with ``i = 3``.
    * Eigendecomposition: ``9 d³``; EKFAC also turns its moments, ``2 d³`` per factor
      and ``2 a² g + 2 a g²``.
    * Low-rank, ``r`` of ``d`` eigenpairs: the product with the matrix ``2 d² r``, four
      products and a solve of ``d × r`` matrices ``9 d r²``, and ``38/3 r³`` for an
      eigendecomposition, two Cholesky factors and three solves. A factor that is kept
      whole costs its eigendecomposition.

    References:
        Golub & Van Loan, 2013, "Matrix Computations", Secs. 3.1, 4.2, 8.3 (triangular
        solve ``d²`` per column, Cholesky ``d³/3``, symmetric QR with vectors ``9 d³``).
    """
    if full_norm(layer):
        return round(matrices(layer.a_shape) * spd_inverse_flops(layer.a_shape[-1]))
    if not layer.kronecker:
        return 0
    total = 0.0
    for (shape, form), rank in zip(factors_of(layer), method.ranks(layer), strict=True):
        if not form.matrix:
            continue
        d, cube = shape[-1], shape[-1] ** 3
        if method.moments:
            each = 11 * cube
        elif method.name == "low_rank" and rank < d:
            each = 2 * d**2 * rank + 9 * d * rank**2 + 38 * rank**3 / 3
        elif not method.damped:
            each = 9 * cube
        elif method.name == "newton_schulz":
            each = (4 + 4 * NEWTON_SCHULZ_STEPS) * cube
        else:
            each = spd_inverse_flops(shape[-1])
        total += matrices(shape) * each
    return round(total + (apply_flops(layer) if method.moments else 0))


def precondition_flops(
    layer: LayerTag, method: Method, rows: Rows | None = None
) -> int:
    """``2 a² g + 2 a g²`` per step: ``A⁻¹ V G⁻¹``.

    By ``R`` rows of the gradient, where these are few: ``2 R (a² + g² + a g)``. Twice
    the first in an eigenbasis (there and back). With the ``r`` and ``s`` leading
    eigenpairs of ``A`` and ``G``: ``4 a g (r + s) + 4 r s min(a, g)``. A full ``d × d``
    block of a normalisation layer: ``2 d²``.
    """
    if full_norm(layer):
        return 2 * math.prod(layer.a_shape)
    if not layer.kronecker:
        return 0
    if method.name == "low_rank":
        return low_rank_flops(layer, method)
    if rows is not None and rows.thin and method.damped:
        a, g = layer.sizes
        return 2 * rows.forward * (a * a + g * g + a * g)
    return apply_flops(layer) * (1 if method.damped else 2)


def low_rank_flops(layer: LayerTag, method: Method) -> int:
    """Operations of the solve with low-rank factors, for every pair of their blocks."""
    sizes = layer.a_shape[-1], layer.g_shape[-1]
    width_a, width_g = forms.widths(layer)
    ranks = [
        0 if not form.matrix else rank
        for (_, form), rank in zip(factors_of(layer), method.ranks(layer), strict=True)
    ]
    inner = 0
    if all(0 < rank < size for rank, size in zip(ranks, sizes, strict=True)):
        pairs = (width_a // sizes[0]) * (width_g // sizes[1])
        inner = 4 * math.prod(ranks) * min(sizes) * pairs
    whole = math.prod(layer.stack + layer.blocks)
    return whole * (4 * width_a * width_g * sum(ranks) + inner)


def apply_flops(layer: LayerTag) -> int:
    """``2 a² g + 2 a g²``: both factors times a block of the gradient."""
    width_a, width_g = forms.widths(layer)
    a, g = (entries(*pair) for pair in factors_of(layer))
    return 2 * (a * width_g + g * width_a)


def moments_size(layer: LayerTag) -> int:
    """Entries of EKFAC's second moments."""
    return math.prod((*layer.stack, *layer.blocks, *forms.widths(layer)))


def full_norm(layer: LayerTag) -> bool:
    """Whether it is a scale_shift layer with one full block, as in some papers."""
    return layer.unitwise and layer.a_shape[-1] > 2


def factors_of(layer: LayerTag) -> tuple[tuple[Shape, forms.Form], ...]:
    """Shape and form of the factors of a Kronecker layer."""
    a, g = forms.forms_of(layer)
    return (layer.a_shape, a), (layer.g_shape, g)


def outer_flops(shape: Shape, form: forms.Form, rows: int) -> int:
    """Operations of ``Σ x xᵀ`` over rows; 0 if the diagonal is kept."""
    if form.whole:
        return matrices(shape) * forms.symmetric_product_flops(rows, shape[-1])
    return 2 * rows * entries(shape, form)


def entries(shape: Shape, form: forms.Form) -> int:
    """Entries of a factor's matrices; 0 if it is kept as its diagonal."""
    return 0 if not form.matrix else math.prod(shape)


def matrices(shape: Shape) -> int:
    """How many matrices a factor holds."""
    return math.prod(shape[:-2])
