"""Every mode and every reduction compute what one device does with the whole batch."""

import itertools

import jax
import pytest

from tests import models
from tests.helpers import cases
from tests.parallel import DEVICES, MODES, REDUCTIONS, run, same

STEPS = 20
# What the fast suite runs: every mode, and the reductions that differ most.
FAST = [
    ("pmap", "all"),
    ("shard_map", "bfloat16"),
    ("checked", "gradients"),
    ("auto", "gradients"),
    ("explicit", "inverses"),
]
SHORT = models.mlp("short", (4, 5, 3))

pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices"),
]


EVERY = [
    (mode, name)
    for mode, name in itertools.product(MODES, REDUCTIONS)
    # Under jit XLA reduces; Reduction.dtype plays no part.
    if mode not in ("auto", "explicit") or "bfloat16" not in name
]


@pytest.mark.parametrize(("mode", "name"), cases(EVERY, FAST))
def test_twenty_steps_with_adaptive_intervals(mode, name):
    # bfloat16 keeps 8 bits of every statistic.
    tolerance = 3e-2 if "bfloat16" in name else 1e-8
    same(SHORT, run(SHORT, mode, REDUCTIONS[name], STEPS), STEPS, tolerance)
