"""The validated arguments of ``scale_by_kfac``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.assignment import NOBODY, Plan, make_plan
from kfac_jax_lite.distributed.context import Context
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.inverses import Method
from kfac_jax_lite.optimizer import damping as damping_lib
from kfac_jax_lite.optimizer.intervals import Interval


@dataclasses.dataclass(frozen=True)
class StepContext(Context):
    """What is fixed in one update, with the arguments that say when things happen."""

    interval: Interval
    inverse_interval: Any
    factor_decay: Any
    stagger: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of ``scale_by_kfac``; numbers may be traced values."""

    layers: tuple[LayerTag, ...]
    damping: damping_lib.Damping
    factor_decay: Any
    interval: Interval
    method: Method
    inverse_interval: Any
    axis_name: Any
    reduction: Reduction
    stagger: bool = False
    packed: bool = False

    def check(self) -> None:
        """Raises for values that cannot be right; traced values pass."""
        if not self.layers:
            raise ValueError("there are no layers: pass tagged.layers.")
        # Callers without a type checker pass anything.
        if not all(isinstance(layer, LayerTag) for layer in self.layers):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError("layers must be LayerTags: pass tagged.layers.")
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise ValueError("two layers share a name: pass layers of one tagged loss.")
        damping_lib.check(self.damping)
        decay = self.factor_decay
        if isinstance(decay, (int, float)) and not 0 <= decay < 1:
            raise ValueError(f"factor_decay must be in [0, 1), got {decay!r}.")
        n = self.inverse_interval
        if isinstance(n, (int, float)) and (n < 1 or n != int(n)):
            raise ValueError(
                f"inverse_interval must be a whole number >= 1, got {n!r}."
            )
        self.plan(self.layers)
        if not isinstance(self.interval, Interval):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"interval must come from kfac.intervals, got {self.interval!r}."
            )

    def plan(self, layers: Sequence[LayerTag]) -> Plan:
        """Who inverts which of the layers present."""
        reduction = self.reduction
        if reduction.mode == "all":
            return NOBODY
        if self.axis_name is None:
            raise ValueError(
                f'Reduction(mode="{reduction.mode}") wants axis_name=…: the mapped '
                "axis, or axes of Reduction.mesh."
            )
        devices = reduction.num_devices(self.axis_name)
        chosen = (self.method.name, self.inverse_interval)
        return make_plan(layers, reduction, devices, *chosen)

    def context(
        self, layers: Sequence[LayerTag], shift: Array, step: Array
    ) -> StepContext:
        """What is fixed in the update of that number, with that damping."""
        return StepContext(
            tuple(layers), self.plan(layers), self.method, self.reduction,
            self.axis_name, shift, step,
            self.interval, self.inverse_interval, self.factor_decay, self.stagger,
        )  # fmt: skip
