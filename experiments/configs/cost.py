"""The configuration of ``cost``: network, devices, simulated machine."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.configs.checks import check

CostModelName = Literal[
    "resnet50",
    "resnet152",
    "vit_b16",
    "mixer_b16",
    "gpt2_small",
    "gpt2_small_scan",
    "gpt2_xl",
    "gpt2_xl_scan",
    "lstm",
    "mlp",
    "autoencoder",
    "lenet5",
    "resnet",
]


@dataclasses.dataclass(frozen=True)
class MachineConfig:
    """The simulated machine; by default a cluster like that of the papers.

    V100 SXM2 (15.7 TFLOP/s in single precision: NVIDIA, "Tesla V100 GPU accelerator",
    data sheet, 2018) of which half is taken to be reached, and a link of 100 Gb/s for
    each device (InfiniBand EDR). The half and the latency are assumptions.
    """

    bandwidth: float = 12.5e9
    """Bytes per second and direction of a device's link."""
    latency: float = 5e-6
    """Seconds before a message's first byte arrives."""
    flops: float = 7.85e12
    """Floating-point operations per second that a device reaches."""
    name: str = "V100 at half its peak, 100 Gb/s per device"
    """What tables and the plot call it."""

    def __post_init__(self) -> None:
        check(self, "machine.", positive="bandwidth flops", not_negative="latency")


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """Counts elements, bytes, operations and memory of K-FAC, from shapes alone."""

    model: CostModelName = "resnet50"
    """The network."""
    batch: int | None = None
    """Examples on each device; by default those of the catalogue."""
    batch_norm: Literal["unit", "full"] = "unit"
    """Blocks of normalisation layers: 2 x 2 per unit, or one of 2C x 2C."""
    steps: int = 1
    """Steps of the run."""
    devices: int = 128
    """Number of devices."""
    mode: Literal["all", "owner"] = "all"
    """How statistics travel."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of statistics on the wire."""
    inverse: Literal[
        "cholesky", "newton_schulz", "eigh", "ekfac", "low_rank", "auto"
    ] = "cholesky"
    """How factors are inverted."""
    inverse_interval: int = 1
    """Least number of steps between inversions of a layer."""
    rate: float = 1.0
    """Share of the steps at which a layer is refreshed."""
    trace: Path | None = None
    """Metrics file of a run with the same layers; its refreshes instead of the rate."""
    adaptive: float = 0.109
    """Rate of the plot's adaptive curves; ResNet-50 at a threshold of 0.3 had 0.109."""
    machine: MachineConfig = MachineConfig()
    """The simulated machine."""
    plot: Path | None = None
    """File of the plot: step time and factor share against devices."""
    result: Path | None = None
    """JSON file for all that is printed and plotted."""

    def __post_init__(self) -> None:
        check(
            self,
            counts="steps devices inverse_interval batch",
            shares="rate adaptive",
        )
