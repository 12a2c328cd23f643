"""What K-FAC costs, from shapes alone: elements, bytes, operations, memory.

``cost_model(tagged.layers, …)`` holds one record per layer. Every total is taken for a
*trace*: how often each layer is refreshed and inverted per step, either a constant rate
or the records of ``kfac.report(opt_state)``.

Units: elements, bytes, floating-point operations (see ``flops``); factors, their
averages and their inverses are float32.

References:
    Osawa et al., 2019, arXiv:1811.12019, Sec. 5 (statistics, inversion and
    preconditioning on many devices).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.flops import (
    Rows,
    full_norm,
    gradient_flops,
    inversion_flops,
    precondition_flops,
    statistics_flops,
)
from kfac_jax_lite.diagnostics.memory import Memory, memory_of
from kfac_jax_lite.distributed.assignment import Plan, held_rows, make_plan, wire_size
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.distributed.traffic import REFRESH, STEP, Collective, traffic
from kfac_jax_lite.kronecker.inverses import Method, method_named
from kfac_jax_lite.optimizer.intervals import Interval, every, whole

BATCH_NORMS = ("unit", "full")
ALL_REDUCE = Reduction()
EVERY_STEP = every(1)
# Steps at which a layer is refreshed, as a share of all, or ``kfac.report``'s records.
Trace = float | Sequence[Mapping[str, Any]]
HEAD = (
    *("layer", "kind", "elements"),
    *("statistics", "inversion", "precondition", "memory"),
)


class Rate(NamedTuple):
    """How often something happens to a layer, per step."""

    refresh: float
    inversion: float


class Flops(NamedTuple):
    """Operations of one step on the device that has the most to do.

    Attributes:
        gradient: Forward and backward pass, products with parameters only.
        statistics: Factors of the layers that are refreshed.
        inversion: Inverses that this device makes.
        precondition: Products with inverses.
    """

    gradient: float
    statistics: float
    inversion: float
    precondition: float


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        layer: The layer, with the curvature block that the model assumes.
        rows: Its rows, or None if they are not known.
        statistics: Operations of a refresh; None without rows.
        gradient: Operations of a forward and backward pass; None without rows.
        inversion: Operations of one inversion.
        precondition: Operations of preconditioning, on each device.
        owner: Device that inverts it; None: every device does.
        memory: Bytes on each device.
        elements: Entries that one refresh sends, symmetric matrices as triangles if
            they are packed.
    """

    layer: LayerTag
    rows: Rows | None
    statistics: int | None
    gradient: int | None
    inversion: int
    precondition: float
    owner: int | None
    memory: Memory
    elements: int


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
        return {name: recorded(known[name]) for name in names}

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
        if any(record.rows is None for record in self.layers):
            raise ValueError(
                "operations need the rows of every layer: "
                "cost_model(…, rows=kfac.layer_rows(tagged, params, *batch))."
            )
        statistics, common, owned = 0.0, 0.0, dict[int, float]()
        for record in self.layers:
            rate = rates[record.layer.name]
            statistics += rate.refresh * (record.statistics or 0)
            work = record.inversion * inversions(record.layer, rate)
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
        return table(self)


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
    records = tuple(
        layer_cost(
            layer,
            None if rows is None else rows[layer.name],
            method,
            plan,
            interval.memory,
            reduction.pack and mapped,
            devices == 1,
        )
        for layer in layers
    )
    found = traffic(*common, mapped=mapped, memory=interval.memory)
    chosen = method.name, inverse_interval
    return CostModel(records, found, devices, reduction, *chosen)


def layer_cost(
    layer: LayerTag,
    rows: Rows | None,
    method: Method,
    plan: Plan,
    memory: int,
    packed: bool,
    alone: bool,
) -> LayerCost:
    """The record of one layer; ``alone``: one device has all rows of the gradient."""
    part = 1.0
    if plan.sliced(layer.name):
        part = held_rows(layer, plan) / max(layer.sizes)
    return LayerCost(
        layer,
        rows,
        None if rows is None else statistics_flops(layer, rows, method.moments),
        None if rows is None else gradient_flops(layer, rows),
        inversion_flops(layer, method),
        part * precondition_flops(layer, method, rows if alone else None),
        plan.owners.get(layer.name),
        memory_of(layer, method, plan, memory),
        wire_size(layer, Reduction(pack=packed), method.moments),
    )


def with_full_norm(layer: LayerTag) -> LayerTag:
    """The layer with one block for all its scales and shifts."""
    if not layer.unitwise or layer.a_shape[-1] != 2:
        return layer
    *stack, units, k, _ = layer.a_shape
    return dataclasses.replace(layer, a_shape=(*stack, 1, units * k, units * k))


def recorded(record: Mapping[str, Any]) -> Rate:
    """The rates of a record of ``kfac.report``."""
    steps = record["steps"]
    return Rate(record["refreshes"] / steps, record["inversions"] / steps)


def inversions(layer: LayerTag, rate: Rate) -> float:
    """Inversions per step: full blocks of norms are inverted at each refresh."""
    return rate.refresh if full_norm(layer) else rate.inversion


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


def table(cost: CostModel) -> str:
    """A line per layer and a line of totals, numbers to the right."""
    rows: list[tuple[str, ...]] = [HEAD]
    for r in cost.layers:
        sizes = (r.statistics, r.inversion, r.precondition, r.memory.total)
        texts = [number(size) for size in sizes]
        rows.append((r.layer.name, r.layer.kind, f"{r.elements:,}", *texts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, "<<>>>>>", strict=True)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, width, side in cells))
    lines.insert(1, "  ".join("─" * width for width in widths))
    lines.append(lines[1])
    count = "1 device" if cost.devices == 1 else f"{cost.devices:,} devices"
    lines.append(
        f"{cost.elements:,} elements per refresh of {len(cost.layers)} layers; mode "
        f'"{cost.reduction.mode}", {count}: {number(cost.bytes_per_step())}B sent per '
        f"step and {number(cost.memory.total)}B kept by each"
    )
    return "\n".join(lines)


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
