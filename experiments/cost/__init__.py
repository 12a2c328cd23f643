"""``cost``: what K-FAC costs a network, from shapes alone, and simulated step times."""

import dataclasses
from typing import Any

from rich.console import Console

from experiments.benchmarks.common import machine, write_json
from experiments.configs.cost import CostConfig
from experiments.cost import figures, plot
from experiments.cost.tables import show
from experiments.errors import ConfigError

__all__ = ["run"]


def run(config: CostConfig, console: Console) -> None:
    """Counts, prints, and writes the files that are wanted."""
    net, trace = figures.network(config), figures.read_trace(config)
    costs = net.cost(config)
    try:
        result = {
            "computed_on": machine(),
            "settings": settings(config),
            "model": net.title,
            "parameters": costs.parameters,
            "elements": costs.elements,
            "variants": figures.variants(net, config, trace),
            "modes": figures.modes(net, config, trace),
        }
    except ValueError as error:
        raise ConfigError(f"{config.model}: {error}") from error
    show(net, costs, config, result, console)
    if config.plot is None and config.result is None:
        return
    curves = figures.curves(net, config)
    if config.plot is not None:
        plot.save(curves, net, config)
        console.print(f"Plot: {config.plot}", soft_wrap=True, highlight=False)
    if config.result is not None:
        result["curves"] = figures.as_json(curves)
        write_json(config.result, result)
        console.print(f"Result: {config.result}", soft_wrap=True, highlight=False)


def settings(config: CostConfig) -> dict[str, Any]:
    """The command line as JSON values, without the files that are written."""
    values = dataclasses.asdict(config)
    del values["plot"], values["result"]
    return values | {"trace": config.trace and config.trace.name}
