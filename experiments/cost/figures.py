"""The figures that ``cost`` prints: JSON values, from shapes alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

import kfac_jax_lite as kfac
from experiments.configs.cost import CostConfig
from experiments.errors import MetricsError
from experiments.metrics import read_records
from experiments.models.architectures import ARCHITECTURES, SMALL
from kfac_jax_lite.cost import CostModel
from kfac_jax_lite.simulate import DEVICES, Machine, StepTime, scale, step_time
from kfac_jax_lite.types import LayerTag

MODELS = ARCHITECTURES | SMALL
MODES = ("all", "owner", "grid")


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
            fraction=1 / config.slices if config.mode == "grid" else None,
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
        if mode == "grid" and config.devices % config.slices:
            continue
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


def curves(net: Network, config: CostConfig) -> dict[str, dict[int, StepTime]]:
    """Step times of every mode with and without adaptive intervals."""
    found = {}
    for mode in MODES:
        devices = [d for d in DEVICES if mode != "grid" or d % config.slices == 0]
        costs = {d: net.cost(config, mode=mode, devices=d) for d in devices}
        for rate in (1.0, config.adaptive):
            found[f"{mode} {rate}"] = scale(
                costs.__getitem__, as_machine(config), devices, rate
            )
    return found
