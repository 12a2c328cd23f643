"""What K-FAC costs, from shapes alone: elements, bytes, operations, memory.

``cost_model(tagged.layers, …)`` holds one record per layer. Every total is taken for a
*trace*: how often each layer is refreshed and inverted per step, either a constant rate
or the records of ``kfac.report(opt_state)``. Factors and inverses are float32.

Operations are those of matrix products (``2 m k n`` for ``[m, k] @ [k, n]``) and
factorisations; elementwise work is bound by memory, not by arithmetic. Notation: ``R``
rows, factors of shape ``[*blocks, d, d]``; ``A`` is ``a × a`` and ``G`` ``g × g``. A
factor kept as diagonal blocks costs what its blocks cost, one kept as its diagonal
nothing.

References:
    Osawa et al., 2019, arXiv:1811.12019, Sec. 5 (statistics, inversion and
    preconditioning on many devices).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.likelihoods import MASK
from kfac_jax_lite.core.linalg import spd_inverse_flops
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.distributed.assignment import (
    Plan,
    held_rows,
    larger_side,
    make_plan,
    slice_sizes,
    wire_size,
)
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.distributed.traffic import REFRESH, STEP, Collective, traffic
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import (
    LowRank,
    Method,
    NewtonSchulz,
    method_named,
)
from kfac_jax_lite.kronecker.precondition import zero_statistics
from kfac_jax_lite.optimizer.intervals import Interval, every, whole
from kfac_jax_lite.statistics.conv import chosen_axis, sampled_geometry, shifted_flops
from kfac_jax_lite.statistics.deferred import thin_layers
from kfac_jax_lite.statistics.estimators import Recipe, count_rows, make_recipe
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.tagging.sites import ConvGeometry, RaggedGeometry, Site

BATCH_NORMS = ("unit", "full")
ALL_REDUCE = Reduction()
EVERY_STEP = every(1)
# Iterations of a warm-started Newton-Schulz inverse; an assumption, it depends on data.
NEWTON_SCHULZ_STEPS = 3
# Steps at which a layer is refreshed, as a share of all, or ``kfac.report``'s records.
Trace = float | Sequence[Mapping[str, Any]]
HEAD = "layer kind elements statistics inversion precondition memory"


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


class Memory(NamedTuple):
    """Bytes that one device keeps between steps.

    Attributes:
        factors: Moving averages.
        previous: Past statistics that the interval rule compares with.
        inverses: What preconditioning reads.
    """

    factors: int
    previous: int
    inverses: int

    @property
    def total(self) -> int:
        return sum(self)


class Rate(NamedTuple):
    """How often something happens to a layer, per step."""

    refresh: float
    inversion: float


class Flops(NamedTuple):
    """Operations of one step on the device that has the most to do."""

    gradient: float
    statistics: float
    inversion: float
    precondition: float


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Operations of what is done with one layer, its memory and what it sends."""

    layer: LayerTag  # with the curvature block that the model assumes
    statistics: int | None  # of a refresh; None without rows
    gradient: int | None  # of a forward and backward pass; None without rows
    inversion: int
    precondition: float  # on each device
    owner: int | None  # the device that inverts it; None: every device does
    memory: Memory
    elements: int  # entries that one refresh sends


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The costs of a network on a number of devices; see ``cost_model``.

    Attributes:
        layers: One record per layer.
        collectives: What travels between the devices, at which event.
        devices: Number of devices.
        reduction: How statistics travel.
        inverse: Name of the inversion method.
        inverse_interval: Least number of steps between inversions.
    """

    layers: tuple[LayerCost, ...]
    collectives: tuple[Collective, ...]
    devices: int
    reduction: Reduction
    inverse: str
    inverse_interval: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(record.layer.elements for record in self.layers)

    @property
    def elements(self) -> int:
        """Entries on the wire when every layer is refreshed."""
        return sum(record.elements for record in self.layers)

    @property
    def memory(self) -> Memory:
        """Bytes that one device keeps between steps."""
        return Memory(*map(sum, zip(*(r.memory for r in self.layers), strict=True)))

    def rates(self, trace: Trace = 1.0) -> dict[str, Rate]:
        """Refreshes and inversions per step of every layer.

        Args:
            trace: A constant rate from 0 to 1 (a layer is then inverted at most every
                ``inverse_interval`` steps), or records of ``kfac.report``.

        Returns:
            Layer name to rates.

        Raises:
            ValueError: A rate out of range; records without steps or of other layers.
        """
        names = [record.layer.name for record in self.layers]
        if isinstance(trace, (int, float)):
            if not 0 <= trace <= 1:
                raise ValueError(f"a rate must be from 0 to 1, got {trace!r}.")
            rate = Rate(trace, min(trace, 1 / self.inverse_interval))
            return dict.fromkeys(names, rate)
        known = {record["name"]: record for record in trace}
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"the trace has no record of layer {missing[0]!r} and "
                f"{len(missing) - 1} others; it has {sorted(known)[:3]}."
            )
        if not all(known[name]["steps"] for name in names):
            raise ValueError("the trace has no steps yet: take one, then report.")
        return {
            name: Rate(r["refreshes"] / r["steps"], r["inversions"] / r["steps"])
            for name in names
            if (r := known[name])
        }

    def bytes_per_step(
        self,
        trace: Trace = 1.0,
        kind: str | None = None,
        event: str | None = None,
        limit: bool = False,
    ) -> float:
        """Bytes that one device sends per step.

        Ring algorithms: an all-reduce of ``n`` bytes sends ``2 n (D − 1) / D``, a
        reduce-scatter, all-gather or all-to-all ``n (D − 1) / D``.

        Args:
            trace: See ``rates``.
            kind: Only collectives of this kind.
            event: Only collectives at this event: ``"refresh"``, ``"inversion"`` or
                ``"step"``.
            limit: Take ``(D − 1) / D`` as 1, the limit of many devices.

        Returns:
            Bytes, the mean over the steps of the trace and over the devices.
        """
        rates = self.rates(trace)
        sent = [
            (limit_of(c) if limit else c.sent) * happens(c, rates)
            for c in self.collectives
            if kind in (None, c.kind) and event in (None, c.event)
        ]
        return sum(sent, start=0.0)

    def flops_per_step(self, trace: Trace = 1.0) -> Flops:
        """Operations of one step on the busiest device.

        Inversions without an owner are made by every device; those with one are summed
        up by owner, and the largest sum counts: a mean over the steps for each device.

        Args:
            trace: See ``rates``.

        Returns:
            Floating-point operations.

        Raises:
            ValueError: The model was made without rows.
        """
        rates = self.rates(trace)
        if any(record.statistics is None for record in self.layers):
            raise ValueError(
                "operations need the rows of every layer: "
                "cost_model(…, rows=kfac.layer_rows(tagged, params, *batch))."
            )
        statistics, common, owned = 0.0, 0.0, dict[int, float]()
        for record in self.layers:
            rate = rates[record.layer.name]
            statistics += rate.refresh * (record.statistics or 0)
            # Full blocks of norms are inverted at each refresh.
            often = rate.refresh if full_norm(record.layer) else rate.inversion
            work = record.inversion * often
            if record.owner is None:
                common += work
            else:
                owned[record.owner] = owned.get(record.owner, 0.0) + work
        return Flops(
            sum(record.gradient or 0 for record in self.layers),
            statistics,
            common + max(owned.values(), default=0.0),
            sum(record.precondition for record in self.layers),
        )

    def __str__(self) -> str:
        """A line per layer, and the totals when every layer is refreshed."""
        rows: list[Sequence[str]] = [HEAD.split()]
        for r in self.layers:
            sizes = r.statistics, r.inversion, r.precondition, r.memory.total
            cells = r.layer.name, r.layer.kind, f"{r.elements:,}"
            rows.append((*cells, *map(number, sizes)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join(f"{{:{s}{w}}}" for s, w in zip("<<>>>>>", widths, strict=True))
        head, *lines = (form.format(*row) for row in rows)
        rule = "  ".join("─" * width for width in widths)
        count = "1 device" if self.devices == 1 else f"{self.devices:,} devices"
        totals = (
            f"{self.elements:,} elements per refresh of {len(self.layers)} layers; "
            f'mode "{self.reduction.mode}", {count}: '
            f"{number(self.bytes_per_step())}B sent per step and "
            f"{number(self.memory.total)}B kept by each"
        )
        return "\n".join([head, rule, *lines, rule, totals])


def cost_model(
    layers: Sequence[LayerTag],
    reduction: Reduction = ALL_REDUCE,
    devices: int = 1,
    rows: Mapping[str, Rows] | None = None,
    interval: Interval = EVERY_STEP,
    inverse: str | Method = "cholesky",
    inverse_interval: int = 1,
    batch_norm: str = "unit",
    mapped: bool = True,
) -> CostModel:
    """Elements, bytes, operations and memory of K-FAC, from shapes alone.

    Operations are those of ``fisher="empirical"``: a sampled or exact Fisher also pulls
    further cotangents back when a layer is due.

    Args:
        layers: ``tagged.layers``.
        reduction: How statistics travel; its ``devices`` are those given here.
        devices: Number of devices, ``D``.
        rows: ``kfac.layer_rows(tagged, params, *batch)`` for the batch of one device;
            without it there are no operations of statistics and gradient.
        interval: The interval rule: how many past statistics it keeps.
        inverse: The inversion method.
        inverse_interval: Least number of steps between inversions of a layer.
        batch_norm: ``"unit"``: a ``2 × 2`` block per unit of a layer with scale and
            shift, as this library has it; ``"full"``: one ``2C × 2C`` block, as some
            papers have it, inverted and applied like a factor.
        mapped: Under ``pmap`` or ``shard_map``. False: under ``jit`` with a sharded
            batch, where XLA reduces whole matrices in their own precision.

    Returns:
        The model.

    Raises:
        ValueError: An argument is out of range; rows of other layers.
    """
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm must be one of {BATCH_NORMS}: {batch_norm!r}.")
    whole("devices", devices)
    whole("inverse_interval", inverse_interval)
    method = method_named(inverse)
    missing = [t.name for t in layers if rows is not None and t.name not in rows]
    if missing:
        raise ValueError(f"rows has no entry for layer {missing[0]!r}.")
    if batch_norm == "full":
        layers = [with_full_norm(layer) for layer in layers]
    layers = tuple(layers)
    if reduction.mode != "all":
        reduction = dataclasses.replace(reduction, devices=devices)
    common = layers, reduction, devices, method, inverse_interval
    plan = make_plan(*common)
    wire, records = Reduction(pack=reduction.pack and mapped), []
    for layer in layers:
        own = None if rows is None else rows[layer.name]
        all_rows = own if devices == 1 else None  # of the gradient, on one device
        sliced = plan.sliced(layer.name)
        part = held_rows(layer, plan) / max(layer.sizes) if sliced else 1.0
        records.append(
            LayerCost(
                layer,
                None if own is None else statistics_flops(layer, own, method.moments),
                None if own is None else gradient_flops(layer, own),
                inversion_flops(layer, method),
                part * precondition_flops(layer, method, all_rows),
                plan.owners.get(layer.name),
                memory_of(layer, method, plan, interval.memory),
                wire_size(layer, wire, method.moments),
            )
        )
    found = traffic(*common, mapped=mapped, memory=interval.memory)
    chosen = method.name, inverse_interval
    return CostModel(tuple(records), found, devices, reduction, *chosen)


def with_full_norm(layer: LayerTag) -> LayerTag:
    """The layer with one block for all its scales and shifts."""
    if not layer.unitwise or layer.a_shape[-1] != 2:
        return layer
    *stack, units, k, _ = layer.a_shape
    return dataclasses.replace(layer, a_shape=(*stack, 1, units * k, units * k))


def happens(collective: Collective, rates: Mapping[str, Rate]) -> float:
    """How often per step; what is for all layers, as often as the most frequent."""
    if collective.event == STEP:
        return 1.0
    if not collective.layer:
        return max((rate.refresh for rate in rates.values()), default=0.0)
    rate = rates[collective.layer]
    return rate.refresh if collective.event == REFRESH else rate.inversion


def limit_of(collective: Collective) -> float:
    """Bytes that a device sends by a ring of very many devices."""
    if collective.kind == "permute":
        return collective.sent
    return collective.payload * (2.0 if collective.kind == "all_reduce" else 1.0)


def number(value: int | float | None) -> str:
    """Three digits and a decimal prefix: ``2.05 G``; a dash where it is unknown."""
    if value is None:
        return "-"
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    digits = f"{value:.0f}" if value >= 99.95 or value == int(value) else f"{value:.3g}"
    return f"{digits} {prefixes[0]}"


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
            statistics = sum(site.examples * site.repeat for site in sites)
        else:
            shares = [lattice.share for s in sites if (lattice := recipe.lattice(s))]
            statistics = recipe.num_rows // min(shares, default=1)
        saved = sum(saved_flops(site, recipe) for site in sites)
        ragged = any(isinstance(s.geometry, RaggedGeometry) for s in sites)
        share = math.prod(layer.blocks) if ragged else 1  # a row meets one block
        numbers = (forward, recipe.rows_out, statistics)
        own, reverse, refreshed = (-(-number // share) for number in numbers)
        rows[layer.name] = Rows(own, reverse, refreshed, saved, layer.name in thin)
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


def gradient_flops(layer: LayerTag, rows: Rows) -> int:
    """``6 R in out``: forward product, gradients of the input and of the weight."""
    if not layer.kronecker:
        return 0
    weight = math.prod((*layer.stack, *layer.blocks, *layer.views[0].core[-2:]))
    products = rows.reverse + (0 if layer.one_hot else rows.forward)
    return 6 * products * weight


def statistics_flops(layer: LayerTag, rows: Rows, moments: bool = False) -> int:
    """``2 R a² + 2 R g²``: ``A = Σ ā āᵀ`` and ``G = Σ c cᵀ``.

    A tied weight has both for its reverse use as well; a scale_shift layer has
    ``2 R k²`` for each of its ``k × k`` blocks. EKFAC turns the rows into the
    eigenbasis and multiplies their squares: ``2 R a² + 2 R g² + 2 R a g`` more.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 8 (the same terms).
    """
    r = rows.statistics
    if not layer.kronecker:
        return 2 * r * math.prod(layer.a_shape) if layer.unitwise else 0
    a, g = factors_of(layer)
    rows_in = rows.reverse + (0 if layer.one_hot else r)
    rows_out = rows.reverse + r
    total = outer_flops(*a, rows_in) + outer_flops(*g, rows_out) - rows.saved
    if moments:
        total += 2 * rows_out * (entries(*a) + entries(*g))
        widths = forms.widths(layer)
        total += 2 * rows_in * math.prod((*layer.stack, *layer.blocks, *widths))
    return total


def inversion_flops(layer: LayerTag, method: Method) -> int:
    """Operations of one inversion of both factors.

    * Cholesky, and ``"auto"`` as on a CPU: ``linalg.spd_inverse_flops``.
    * Newton-Schulz: two residuals and two products per iteration, ``(4 + 4 i) d³``.
    * Eigendecomposition: ``9 d³``; EKFAC also turns its moments, ``2 d³`` per factor
      and ``2 a² g + 2 a g²``.
    * Low-rank, ``r`` of ``d`` eigenpairs: the product with the matrix ``2 d² r``, four
      products and a solve of ``d × r`` matrices ``9 d r²``, and ``38/3 r³`` for an
      eigendecomposition, two Cholesky factors and three solves.

    References:
        Golub & Van Loan, 2013, "Matrix Computations", Secs. 3.1, 4.2, 8.3 (triangular
        solve ``d²`` per column, Cholesky ``d³/3``, symmetric QR with vectors ``9 d³``).
    """
    if full_norm(layer):
        *blocks, _, size = layer.a_shape
        return round(math.prod(blocks) * spd_inverse_flops(size))
    if not layer.kronecker:
        return 0
    total = 0.0
    for (shape, form), rank in zip(factors_of(layer), method.ranks(layer), strict=True):
        if not form.matrix:
            continue
        d = shape[-1]
        if rank < d:
            each = 2 * d**2 * rank + 9 * d * rank**2 + 38 * rank**3 / 3
        elif not method.damped:
            each = (11 if method.moments else 9) * d**3
        elif isinstance(method, NewtonSchulz):
            each = (4 + 4 * NEWTON_SCHULZ_STEPS) * d**3
        else:
            each = spd_inverse_flops(d)
        total += math.prod(shape[:-2]) * each
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
    if isinstance(method, LowRank):
        return low_rank_flops(layer, method)
    if rows is not None and rows.thin and method.damped:
        a, g = layer.sizes
        return 2 * rows.forward * (a * a + g * g + a * g)
    return apply_flops(layer) * (1 if method.damped else 2)


def low_rank_flops(layer: LayerTag, method: Method) -> int:
    """Operations of the solve with low-rank factors, for every pair of their blocks."""
    sizes = layer.a_shape[-1], layer.g_shape[-1]
    width_a, width_g = forms.widths(layer)
    pairs = zip(forms.forms_of(layer), method.ranks(layer), strict=True)
    ranks = [rank * form.matrix for form, rank in pairs]
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
        return math.prod(shape[:-2]) * forms.symmetric_product_flops(rows, shape[-1])
    return 2 * rows * entries(shape, form)


def entries(shape: Shape, form: forms.Form) -> int:
    """Entries of a factor's matrices; 0 if it is kept as its diagonal."""
    return 0 if not form.matrix else math.prod(shape)


def memory_of(layer: LayerTag, method: Method, plan: Plan, memory: int) -> Memory:
    """Bytes of a layer's state on one device.

    Of an owned layer a device keeps ``1/D`` of the packed factors and, if rows are
    divided, its rows of the larger inverse and all of the smaller.
    """
    zeros, inverse = state_shapes(layer, method)
    factors, inverses = bytes_of(zeros), bytes_of(inverse)
    if full_norm(layer):
        inverses = factors
    if layer.name in plan.owners:
        factors = 4 * sum(slice_sizes(layer, plan)) + bytes_of(getattr(zeros, "s", ()))
    if plan.sliced(layer.name):
        larger = inverse.a if larger_side(layer) == "a" else inverse.g
        kept = held_rows(layer, plan) / larger.shape[-1]
        inverses += round((kept - 1) * bytes_of(larger))
    return Memory(factors, memory * factors, inverses)


@functools.lru_cache(maxsize=1024)
def state_shapes(layer: LayerTag, method: Method) -> tuple[Any, Any]:
    """Shapes of a layer's factors and inverses, in float32; kept, they are slow."""
    return jax.eval_shape(
        lambda: (
            zero_statistics(layer, jnp.float32, method.moments),
            method.initial(layer, jnp.float32),
        )
    )


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
