"""What is fixed while the layers of one update are refreshed and inverted."""

import dataclasses
from typing import Any

from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.assignment import Plan
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.kronecker.inverses import Method


@dataclasses.dataclass(frozen=True)
class Context:
    """What every part of an update needs to know.

    Attributes:
        layers: The layers present.
        plan: Who holds and inverts what of them.
        method: How factors are inverted.
        reduction: How statistics travel.
        axis_name: Mapped axes to average over, or None.
        shift: The damping ``λ`` in force.
        step: The number of this update, from 1.
    """

    layers: tuple[LayerTag, ...]
    plan: Plan
    method: Method
    reduction: Reduction
    axis_name: Any
    shift: Array
    step: Array
