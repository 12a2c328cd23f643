"""``cost``: what K-FAC costs a network, from shapes alone, and simulated step times."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import kfac_jax_lite as kfac
from experiments.benchmarks.common import machine, write_json
from experiments.configs.cost import CostConfig
from experiments.errors import ConfigError, MetricsError
from experiments.metrics import read_records
from experiments.models.architectures import ARCHITECTURES, SMALL
from experiments.simulate import (
    DEVICES,
    Machine,
    StepTime,
    scale,
    step_time,
)
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.cost import CostModel

MODELS = ARCHITECTURES | SMALL
MODES = ("all", "owner")


@dataclasses.dataclass(frozen=True)
class Network:
    """A tagged network and the rows of one device's batch."""

    title: str
    layers: tuple[LayerTag, ...]
    rows: Mapping[str, Any]
    batch: int

    def cost(self, config: CostConfig, **changes: Any) -> CostModel:
        """The costs under a configuration."""
        config = dataclasses.replace(config, **changes)
        reduction = kfac.Reduction(
            config.mode,
            dtype=None if config.dtype == "float32" else jnp.dtype(config.dtype),
            devices=None if config.mode == "all" else config.devices,
        )
        return kfac.cost_model(
            self.layers,
            reduction,
            config.devices,
            rows=self.rows,
            # As long a memory as the adaptive rules need, which is what is compared.
            interval=kfac.intervals.adaptive(0.3),
            inverse=config.inverse,
            inverse_interval=config.inverse_interval,
            batch_norm=config.batch_norm,
        )


def network(config: CostConfig) -> Network:
    """Tags the network of a configuration; nothing is executed."""
    entry = MODELS[config.model]
    if config.batch is not None:
        entry = dataclasses.replace(entry, shape=(config.batch, *entry.shape[1:]))
    problem = entry.make()
    arguments = problem.params, *problem.args
    tagged = kfac.tag(problem.loss, *arguments, has_aux=problem.has_aux)
    rows = kfac.layer_rows(tagged, *arguments)
    return Network(entry.title, tagged.layers, rows, entry.shape[0])


def read_trace(config: CostConfig) -> Any:
    """The rate, or the last records of K-FAC in a metrics file."""
    if config.trace is None:
        return config.rate
    if not config.trace.exists():
        raise MetricsError(f"{config.trace} does not exist.")
    found = [r["layers"] for r in read_records(config.trace) if r["kind"] == "layers"]
    if not found:
        raise MetricsError(
            f"{config.trace} has no record of K-FAC's layers: wanted the metrics file "
            "of a finished run with K-FAC."
        )
    return found[-1]


def variants(net: Network, config: CostConfig, trace: Any) -> list[dict[str, Any]]:
    """Bytes of statistics that a device sends, each row with one saving more."""
    rows: list[dict[str, Any]] = []
    changes: dict[str, Any] = {"batch_norm": "full", "mode": "all", "dtype": "float32"}
    steps = (
        ("full batch-norm blocks, all-reduce, float32", {}),
        ("unit-wise batch norm", {"batch_norm": "unit"}),
        ("and reduce-scatter", {"mode": "owner"}),
        ("and bfloat16", {"dtype": "bfloat16"}),
    )
    for title, change in steps:
        changes |= change
        cost = net.cost(config, **changes)
        limit, exact = (
            config.steps * cost.bytes_per_step(trace, event="refresh", limit=limit)
            for limit in (True, False)
        )
        rows.append({"title": title, "elements": cost.elements} | changes)
        rows[-1] |= {
            "limit": limit,
            "exact": exact,
            "share": limit / rows[0].get("limit", limit),
        }
    return rows


def modes(net: Network, config: CostConfig, trace: Any) -> list[dict[str, Any]]:
    """What each mode costs a device on the configured number of devices."""
    rows = []
    for mode in MODES:
        cost = net.cost(config, mode=mode)
        time = step_time(cost, as_machine(config), trace)
        rows.append(
            {"mode": mode}
            | {
                event: cost.bytes_per_step(trace, event=event)
                for event in ("refresh", "inversion", "step")
            }
            | {
                "memory": cost.memory._asdict(),
                "flops": cost.flops_per_step(trace)._asdict(),
            }
            | {"time": time_json(time)}
        )
    return rows


def as_machine(config: CostConfig) -> Machine:
    """The simulated machine of a configuration."""
    return Machine(**dataclasses.asdict(config.machine))


def time_json(time: StepTime) -> dict[str, float]:
    """Seconds of the parts of a step, their sum, and the share of the factors."""
    whole = {"total": time.total, "factor_share": time.factor_share}
    return time._asdict() | whole


def as_json(curves: dict[str, dict[int, StepTime]]) -> dict[str, dict[str, Any]]:
    """``curves`` as JSON values."""
    return {
        name: {str(devices): time_json(time) for devices, time in times.items()}
        for name, times in curves.items()
    }


def simulated(net: Network, config: CostConfig) -> dict[str, dict[int, StepTime]]:
    """Step times of every mode with and without adaptive intervals."""
    found = {}
    for mode in MODES:
        costs = {d: net.cost(config, mode=mode, devices=d) for d in DEVICES}
        for rate in (1.0, config.adaptive):
            found[f"{mode} {rate}"] = scale(
                costs.__getitem__, as_machine(config), DEVICES, rate
            )
    return found


COLOURS = {"all": "#d55e00", "owner": "#0072b2"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of a paper."""

    devices: int  # number of devices
    batch: int  # examples on each
    seconds: float  # of a step
    source: str  # where it is from


# 5.5 minutes for batches of 32,768 on 1,024 GPUs (arXiv:2002.06015, abstract) over the
# 1,760 steps that the authors' code lists for that batch (tyohei/chainerkfac, README).
PUBLISHED = {
    "resnet50": (
        Published(1024, 32, 5.5 * 60 / 1760, "5.5 min (2002.06015) / 1,760 steps"),
    )
}


def save_plot(
    curves: dict[str, dict[int, StepTime]], net: Network, config: CostConfig
) -> None:
    path = config.plot
    assert path is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(draw(curves, net, config)).print_png(path)
    except OSError as error:
        raise MetricsError(f"{path} cannot be written: {error}.") from error


def draw(
    curves: dict[str, dict[int, StepTime]], net: Network, config: CostConfig
) -> Figure:
    """Draws seconds per step and share of the factors side by side."""
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    title = f"Simulated: {net.title}, {net.batch} examples per device"
    figure.suptitle(f"{title}, {config.machine.name}")
    seconds, shares = figure.subplots(1, 2)
    for name, times in curves.items():
        mode, rate = name.split()
        style: dict[str, Any] = {"color": COLOURS[mode], "marker": "."}
        style["linestyle"] = "-" if float(rate) == 1 else "--"
        label = f"{mode}, {'every step' if float(rate) == 1 else f'rate {rate}'}"
        values = list(times.values())
        seconds.plot(list(times), [t.total for t in values], label=label, **style)
        shares.plot(list(times), [t.factor_share for t in values], **style)
    plain = next(iter(curves.values()))
    floor = [t.compute + t.gradient_communication for t in plain.values()]
    seconds.plot(list(plain), floor, color="grey", label="gradient only")
    for point in PUBLISHED.get(config.model, ()):
        if point.batch == net.batch:
            style = {"color": "black", "marker": "*", "markersize": 12}
            seconds.plot(
                [point.devices],
                [point.seconds],
                linestyle="none",
                label=f"published: {point.source}",
                **style,
            )
    seconds.set_ylabel("seconds per step")
    seconds.set_ylim(bottom=0)
    shares.set_ylabel("statistics, inverses and their traffic / step")
    shares.set_ylim(0, 1)
    for axis in (seconds, shares):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("devices")
        axis.grid(True, which="both", alpha=0.3)
    handles, labels = seconds.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize="small"
    )
    return figure


TITLES = {
    "all": "all-reduce, every device inverts",
    "owner": "reduce-scatter, owners invert",
}


def size(count: float) -> str:
    """A number of bytes with four digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def new_table(title: str, *columns: str) -> Table:
    """An empty table: the first column to the left, the others to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def kinds_table(cost: CostModel) -> Table:
    """Totals by kind of layer: of one refresh, one inversion, one step."""
    table = new_table(
        "Layers, with GFLOP of a refresh, of an inversion, of preconditioning",
        "kind",
        "layers",
        "parameters",
        "elements",
        "refresh",
        "inversion",
        "step",
        "kept",
    )
    kinds = dict.fromkeys(record.layer.kind for record in cost.layers)
    for kind in [*kinds, None]:
        records = [r for r in cost.layers if kind in (None, r.layer.kind)]
        table.add_row(
            kind or "all",
            str(len(records)),
            f"{sum(r.layer.elements for r in records):,}",
            f"{sum(r.elements for r in records):,}",
            f"{sum(r.statistics or 0 for r in records) / 1e9:,.1f}",
            f"{sum(r.inversion for r in records) / 1e9:,.1f}",
            f"{sum(r.precondition for r in records) / 1e9:,.1f}",
            size(sum(r.memory.total for r in records)),
        )
    return table


def show(
    net: Network,
    cost: CostModel,
    config: CostConfig,
    result: dict[str, Any],
    console: Console,
) -> None:
    console.print(
        f"{net.title}: {len(cost.layers)} layers, {cost.parameters:,} parameters; "
        f"{net.batch} examples on each device",
        highlight=False,
    )
    console.print(kinds_table(cost))
    plural = "s" if config.steps != 1 else ""
    often = ""
    if config.rate < 1:
        often = f", refreshed in {100 * config.rate:.3g} % of them"
    if config.trace is not None:
        often = f", refreshed as in {config.trace.name}"
    total = new_table(
        f"Statistics sent by a device in {config.steps:,} step{plural}{often}",
        "variant",
        "elements",
        "ring limit",
        f"{config.devices:,} devices",
        "share",
    )
    for row in result["variants"]:
        total.add_row(
            row["title"],
            f"{row['elements']:,}",
            size(row["limit"]),
            size(row["exact"]),
            f"{100 * row['share']:.1f} %",
        )
    console.print(total)
    table = new_table(
        f"A step on {config.devices:,} devices, simulated: {config.machine.name}",
        "mode",
        "refresh",
        "inversion",
        "every step",
        "kept",
        "step ms",
        "factors",
    )
    for row in result["modes"]:
        table.add_row(
            TITLES[row["mode"]],
            size(row["refresh"]),
            size(row["inversion"]),
            size(row["step"]),
            size(sum(row["memory"].values())),
            f"{1e3 * row['time']['total']:,.0f}",
            f"{100 * row['time']['factor_share']:.0f} %",
        )
    console.print(table)


__all__ = ["run"]


def run(config: CostConfig, console: Console) -> None:
    """Counts, prints, and writes the files that are wanted."""
    net, trace = network(config), read_trace(config)
    costs = net.cost(config)
    try:
        result = {
            "computed_on": machine(),
            "settings": settings(config),
            "model": net.title,
            "parameters": costs.parameters,
            "elements": costs.elements,
            "variants": variants(net, config, trace),
            "modes": modes(net, config, trace),
        }
    except ValueError as error:
        raise ConfigError(f"{config.model}: {error}") from error
    show(net, costs, config, result, console)
    if config.plot is None and config.result is None:
        return
    curves = simulated(net, config)
    if config.plot is not None:
        save_plot(curves, net, config)
        console.print(f"Plot: {config.plot}", soft_wrap=True, highlight=False)
    if config.result is not None:
        result["curves"] = as_json(curves)
        write_json(config.result, result)
        console.print(f"Result: {config.result}", soft_wrap=True, highlight=False)


def settings(config: CostConfig) -> dict[str, Any]:
    """The command line as JSON values, without the files that are written."""
    values = dataclasses.asdict(config)
    del values["plot"], values["result"]
    return values | {"trace": config.trace and config.trace.name}
