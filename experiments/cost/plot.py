"""Simulated step time and share of the factors against the number of devices."""

import dataclasses
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.configs.cost import CostConfig
from experiments.cost.figures import Network
from experiments.errors import MetricsError
from kfac_jax_lite.simulate import StepTime

COLOURS = {"all": "#d55e00", "owner": "#0072b2", "grid": "#009e73"}


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


def save(
    curves: dict[str, dict[int, StepTime]], net: Network, config: CostConfig
) -> None:
    """Writes the plot."""
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
