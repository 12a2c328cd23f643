"""Data-parallel training: the batch is split over devices, the state is on each.

The step is the one for a single device under `jax.jit`; XLA adds the reductions, inside
the conditional of each layer. The losses agree with one device's to rounding.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.errors import ConfigError

PyTree = Any
AXIS = "batch"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where batches and state lie."""

    # The devices in one row; as many of every process, in the order of the processes.
    mesh: Mesh

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def split(self) -> NamedSharding:
        """Sharding of arrays whose rows are dealt out."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of arrays that every device has in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check_batch(self, batch_size: int) -> None:
        """Raises unless every device gets the same number of examples."""
        if batch_size % self.count:
            raise ConfigError(
                f"batch-size is {batch_size}; wanted a multiple of the "
                f"{self.count} devices."
            )

    def rows(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        """Places arrays of examples: split if the devices get equally many.

        Args:
            *arrays: the same in every process, ``[n, ...]``; each process copies only
                what its own devices need.
        """
        if self.count == 1:
            return arrays
        even = len(arrays[0]) % self.count == 0
        sharding = self.split if even else self.replicated
        index, processes = jax.process_index(), jax.process_count()

        def place(array: np.ndarray) -> jax.Array:
            share = len(array) // processes
            own = array[index * share : (index + 1) * share] if even else array
            return jax.make_array_from_process_local_data(sharding, own, array.shape)

        return tuple(place(array) for array in arrays)

    def everywhere(self, tree: PyTree) -> PyTree:
        """Copies the arrays of a state to every device."""

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            return replicate(np.asarray(leaf), self.replicated)

        return jax.tree.map(place, tree)


def replicate(array: np.ndarray, sharding: Any) -> jax.Array:
    """Copies an array that every process has to the devices of a sharding.

    Unlike `jax.device_put`, it does not compare the copies of the processes: that takes
    a collective for every array.
    """
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index], dtype=array.dtype
    )


def place_on(devices: int | None) -> Placement:
    """Chooses the devices, as many of every process."""
    processes = jax.process_count()
    if devices is None:
        devices = 1 if processes == 1 else 0
    wanted = devices or jax.device_count()
    share, rest = divmod(wanted, processes)
    if rest:
        raise ConfigError(
            f"devices is {devices}; wanted a multiple of the {processes} processes, "
            "or 0 for all devices."
        )
    owned = [
        sorted(
            (device for device in jax.devices() if device.process_index == process),
            key=lambda device: device.id,
        )
        for process in range(processes)
    ]
    fewest = min(map(len, owned))
    if share > fewest:
        raise ConfigError(
            f"devices is {devices}; each of {processes} processes has only {fewest} "
            f"({jax.devices()[0].platform}).{cpu_hint(share)}"
        )
    chosen = [device for devices in owned for device in devices[:share]]
    return Placement(Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,)))


def cpu_hint(share: int) -> str:
    """Says how a CPU is made to count as several devices; empty on other devices."""
    if jax.devices()[0].platform != "cpu":
        return ""
    flag = f"--xla_force_host_platform_device_count={share}"
    return f" A CPU counts as {share} with XLA_FLAGS={flag}."
