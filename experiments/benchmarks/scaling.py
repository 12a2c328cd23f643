"""Time per step on 1, 2, 4, 8 devices, by mode of `kfac.Reduction`.

    python -m experiments.benchmarks.scaling --devices 1 2 4 8 --rounds 15

The batch is the same for every number of devices (strong scaling). Where JAX has no
accelerators, the devices are host devices that share this machine's cores: work that
every device repeats then shows as time, and what is divided does not. All rows are
measured in one process, one step of each kind per round, in an order that rotates.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):  # before JAX starts
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

import kfac_jax_lite as kfac  # noqa: E402
from experiments.benchmarks.common import (  # noqa: E402
    OUT,
    begin,
    in_turns,
    kind_medians,
    parse,
    quartiles,
    text_table,
    timed,
    write_json,
)
from experiments.benchmarks.networks import Problem, Spec, make_problem  # noqa: E402
from experiments.models.networks import MLP  # noqa: E402
from experiments.progress import ended  # noqa: E402

AXIS = "batch"
KINDS = {
    "refresh+invert": (True, True),
    "refresh": (True, False),
    "nothing": (False,) * 2,
}
FACTORS, INVERSES = 10, 100


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the steps on several devices, by mode of ``kfac.Reduction``."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    rounds: int = 15
    """Timed steps of each kind."""
    batch: int = 512
    """Examples of all devices."""
    width: int = 512
    """Of the hidden layers."""
    layers: int = 6
    """Hidden layers."""
    out: Path = OUT
    """Folder of the result."""


def reductions(devices: int) -> dict[str, kfac.Reduction]:
    make, rows = kfac.Reduction, "gradients"
    found = {"all": make(), "owner": make("owner", devices=devices)}
    found["owner, rows"] = make("owner", share=rows, devices=devices)
    return found


class Runner:
    """One optimiser on some devices, ready to take steps of a kind.

    Args:
        name: of the row.
        problem: the network and its batches.
        devices: number of devices.
        reduction: None for SGD.
    """

    def __init__(
        self, name: str, problem: Problem, devices: int, reduction: Any
    ) -> None:
        self.name, self.kinds = name, list(KINDS) if reduction else ["step"]
        loss, params = problem.marked_loss(), problem.params
        self.tagged = None
        if reduction:
            shapes = jax.eval_shape(lambda b: share_of(b, devices), problem.batches[0])
            self.tagged = kfac.tag(loss, params, shapes)
            self.tx: Any = kfac.kfac(
                self.tagged.layers, 1e-3, axis_name=AXIS, reduction=reduction,
                interval=kfac.intervals.every(FACTORS), inverse_interval=INVERSES,
            )  # fmt: skip
        else:
            sgd = optax.sgd(1e-3, momentum=0.9)
            self.tx = optax.with_extra_args_support(sgd)
        self.params, self.state = params, self.tx.init(params)
        specs = kfac.state_specs(self.state, AXIS)
        whole, split = PartitionSpec(), PartitionSpec(AXIS)
        mesh = jax.make_mesh(
            (devices,), (AXIS,), axis_types=(AxisType.Auto,),
            devices=jax.devices()[:devices],
        )  # fmt: skip
        mapped = jax.shard_map(
            functools.partial(self.step, loss), mesh=mesh, check_vma=False,
            in_specs=(whole, specs, split), out_specs=(whole, specs, whole),
        )  # fmt: skip
        self.run = jax.jit(mapped)
        self.batch = problem.batches[0]
        for kind in self.kinds:
            self.take(kind)

    def step(self, loss: Callable, params: Any, state: Any, batch: Any) -> Any:
        value, statistics = None, None
        if self.tagged is None:
            value, grads = jax.value_and_grad(loss)(params, batch)
        else:
            value, grads, statistics = self.tagged.value_and_grad(
                params, batch, opt_state=state
            )
        value, grads = jax.lax.pmean((value, grads), AXIS)
        updates, state = self.tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    def take(self, kind: str) -> float:
        """Takes a step of a kind and returns its seconds."""
        if kind in KINDS:
            self.state = with_due(self.state, *KINDS[kind])
        seconds, result = timed(self.run, self.params, self.state, self.batch)
        self.params, self.state, _ = result
        return seconds


def share_of(batch: Any, devices: int) -> Any:
    """The first device's part of a batch."""
    return jax.tree.map(lambda x: x[: len(x) // devices], batch)


def with_due(state: Any, refresh: bool, invert: bool) -> Any:
    """The state with every layer due, or none, for statistics and for inversions."""
    clock = state.kfac.clock
    due = jnp.full_like(clock.due, refresh)
    last = jnp.zeros_like(clock.last_inverse) + (0 if invert else state.kfac.count + 1)
    clock = clock._replace(due=due, last_inverse=last)
    return state._replace(kfac=state.kfac._replace(clock=clock))


def sent_megabytes(runner: Runner, reduction: Any, devices: int) -> dict[str, float]:
    """Megabytes that a device sends, by event."""
    assert runner.tagged is not None
    found = kfac.traffic(
        runner.tagged.layers, reduction, devices, inverse_interval=INVERSES
    )
    events = ("refresh", "inversion", "step")
    return {e: sum(c.sent for c in found if c.event == e) / 1e6 for e in events}


def measure(problem: Problem, devices: int, rounds: int) -> dict[str, Any]:
    """Measures all rows on some devices."""
    modes: dict[str, Any] = {"SGD": None} | reductions(devices)
    runners = [Runner(name, problem, devices, r) for name, r in modes.items()]
    turns = {
        r.name: lambda r=r: [(kind, r.take(kind)) for kind in r.kinds] for r in runners
    }
    seen = in_turns(turns, rounds, warm_up=1)
    samples = {name: sum(found, []) for name, found in seen.items()}
    sgd = kind_medians(samples["SGD"])["step"]
    rows = {}
    for runner in runners:
        medians, reduction = kind_medians(samples[runner.name]), modes[runner.name]
        spread = {
            kind: [
                1e3 * q
                for q in quartiles([s for k, s in samples[runner.name] if k == kind])
            ]
            for kind in medians
        }
        rows[runner.name] = {
            "ms": {kind: 1e3 * s for kind, s in medians.items()},
            "quartiles_ms": spread,
            "ratio_to_sgd": {kind: s / sgd for kind, s in medians.items()},
        }
        if reduction:
            rows[runner.name]["sent_megabytes"] = sent_megabytes(
                runner, reduction, devices
            )
    return rows


def show(devices: int, rows: dict[str, Any]) -> str:
    """The table of one number of devices."""
    header = ("mode", *KINDS, "of SGD", "", "", "MB refresh", "inversion", "step")
    table = []
    for name, row in rows.items():
        kinds = KINDS if len(row["ms"]) > 1 else ["step"]
        times = [row["ms"][kind] for kind in kinds]
        ratios = [row["ratio_to_sgd"][kind] for kind in kinds]
        sent = list(row.get("sent_megabytes", {}).values()) or [None] * 3
        gap = [None] * (len(KINDS) - len(times))
        table.append((name, *gap, *times, *gap, *ratios, *sent))
    return f"\n{devices} devices, milliseconds\n{text_table(header, table)}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and writes ``scaling.json``."""
    config = parse(Config, argv, "scaling")
    count, batch = jax.device_count(), config.batch
    too_many = [n for n in config.devices if n > count or batch % n]
    if too_many:
        raise SystemExit(
            f"--devices {too_many[0]}: there are {count}, and they must divide the "
            f"batch of {batch}."
        )
    result = begin(config, rows={})
    hidden = (config.width,) * config.layers
    problem = make_problem("mlp", Spec(lambda: MLP(hidden, 10), (batch, 784)))
    for devices in config.devices:
        rows = measure(problem, devices, config.rounds)
        print(show(devices, rows), flush=True)
        result["rows"][str(devices)] = rows
        write_json(config.out / "scaling.json", result)
        jax.clear_caches()
    print(f"\nWritten to {config.out / 'scaling.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main() and 0))
