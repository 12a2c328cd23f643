"""Step times on many devices, simulated: ``α + n β`` per message, no overlap.

A message of ``n`` bytes takes ``α + n β`` seconds, with the latency ``α`` and the time
per byte ``β = 1 / bandwidth``. Collectives of ``n`` bytes on ``D`` devices take, with
``p = ⌈log₂ D⌉`` rounds,

* all-reduce: ``2 p α + 2 n β (D − 1) / D`` (halving, then doubling),
* reduce-scatter, all-gather: ``p α + n β (D − 1) / D``,
* all-to-all: the smaller of ``(D − 1) α + n β (D − 1) / D`` (pairs in turn) and
  ``p α + p n β / 2`` (in rounds),
* permute: ``α + n β`` for all of its pairs at once.

The bytes are those of rings; the rounds are logarithmic, without which 16,384 devices
would wait for latencies only. Arithmetic runs at one rate. Nothing overlaps, no link is
shared, no device is late: what is simulated is a model, not a machine.

References:
    Hockney, 1994, "The communication challenge for MPP", Parallel Computing 20(3).
    Thakur, Rabenseifner & Gropp, 2005, "Optimization of collective communication
    operations in MPICH", Int. J. High Perform. Comput. Appl. 19(1), Sec. 4.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kfac_jax_lite.diagnostics.cost import CostModel, Trace, happens
from kfac_jax_lite.distributed.traffic import Collective

# 8, 16, …, 16,384.
DEVICES = tuple(2**k for k in range(3, 15))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that are all alike, and the links between them.

    Attributes:
        bandwidth: Bytes per second that a device sends, while it receives as many.
        latency: Seconds before a message's first byte arrives.
        flops: Floating-point operations per second of a device, as reached in practice.
        name: What it is called.
    """

    bandwidth: float
    latency: float
    flops: float
    name: str = "machine"

    def __post_init__(self) -> None:
        """Checks the values."""
        for field in ("bandwidth", "flops"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"Machine.{field} must be positive, got {getattr(self, field)!r}."
                )
        if not self.latency >= 0:
            raise ValueError(
                f"Machine.latency must not be negative, got {self.latency!r}."
            )


class StepTime(NamedTuple):
    """Seconds of one step, the mean over the steps of a trace.

    Attributes:
        compute: Forward and backward pass.
        statistics: Factors of the layers that are refreshed.
        inversion: Inverses of the busiest device.
        precondition: Products with inverses.
        factor_communication: Everything that K-FAC sends.
        gradient_communication: All-reduce of the gradient.
    """

    compute: float
    statistics: float
    inversion: float
    precondition: float
    factor_communication: float
    gradient_communication: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self)

    @property
    def factor_share(self) -> float:
        """Part of the step that goes into factors: made, sent, inverted."""
        own = self.statistics + self.inversion + self.factor_communication
        return own / self.total if self.total else 0.0


def collective_time(collective: Collective, machine: Machine) -> float:
    """Seconds of one collective, by the formulas above; 0 on a single device."""
    devices, size = collective.devices, collective.payload
    if devices < 2:
        return 0.0
    rounds = math.ceil(math.log2(devices))
    alpha, beta = machine.latency, 1 / machine.bandwidth
    part = size * beta * (devices - 1) / devices
    match collective.kind:
        case "all_reduce":
            return 2 * (rounds * alpha + part)
        case "reduce_scatter" | "all_gather":
            return rounds * alpha + part
        case "all_to_all":
            in_rounds = rounds * (alpha + size * beta / 2)
            return min((devices - 1) * alpha + part, in_rounds)
        case "permute":
            return alpha + collective.elements * collective.itemsize * beta
        case kind:
            raise ValueError(f"there is no formula for the collective {kind!r}.")


def step_time(cost: CostModel, machine: Machine, trace: Trace = 1.0) -> StepTime:
    """Seconds of one step on a machine, from costs with rows."""
    flops, rates = cost.flops_per_step(trace), cost.rates(trace)
    gradient = Collective("", "step", "all_reduce", cost.parameters, 4, cost.devices)
    times = [collective_time(c, machine) * happens(c, rates) for c in cost.collectives]
    return StepTime(
        flops.gradient / machine.flops,
        flops.statistics / machine.flops,
        flops.inversion / machine.flops,
        flops.precondition / machine.flops,
        sum(times, start=0.0),
        collective_time(gradient, machine),
    )


def scale(
    make: Callable[[int], CostModel],
    machine: Machine,
    devices: Iterable[int] = DEVICES,
    trace: Trace = 1.0,
) -> dict[int, StepTime]:
    """Step times by number of devices, for ``make: devices -> CostModel``.

    With the rows of one device's batch that do not change, the global batch grows with
    the devices (weak scaling).
    """
    return {d: step_time(make(d), machine, trace) for d in devices}
