"""Every mode and every reduction compute what one device does with the whole batch."""

import itertools

import jax
import pytest

from tests import models
from tests.parallel import DEVICES, MODES, REDUCTIONS, run, same

STEPS = 20
# Reductions of the fast suite beside "gradients", which runs in every mode.
CHECKED = ("all", "bfloat16", "grid")
SHORT = models.mlp("short", (4, 5, 3))

pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices"),
]


def cases():
    """All modes × reductions; of the fast suite every mode, and what differs most."""
    for mode, name in itertools.product(MODES, REDUCTIONS):
        if mode in ("auto", "explicit") and "bfloat16" in name:
            continue  # XLA reduces; Reduction.dtype plays no part
        fast = name == "gradients" or (mode == "checked" and name in CHECKED)
        yield pytest.param(mode, name, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("mode", "name"), list(cases()))
def test_twenty_steps_with_adaptive_intervals(mode, name):
    # bfloat16 keeps 8 bits of every statistic.
    tolerance = 3e-2 if "bfloat16" in name else 1e-8
    same(SHORT, run(SHORT, mode, REDUCTIONS[name], STEPS), STEPS, tolerance)
