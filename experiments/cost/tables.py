"""The tables that ``cost`` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.configs.cost import CostConfig
from experiments.cost.figures import Network
from kfac_jax_lite.diagnostics.cost import CostModel

TITLES = {
    "all": "all-reduce, every device inverts",
    "owner": "reduce-scatter, owners invert",
    "grid": "the same, rows in groups",
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
    """Prints the tables."""
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
