"""The simulator: its formulas message by message, its limits, its monotony."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

import kfac_jax_lite as kfac
from experiments.simulate import (
    Machine,
    StepTime,
    collective_time,
    scale,
    step_time,
)
from kfac_jax_lite.distributed.traffic import Collective
from tests.helpers import first_pass
from tests.models import BY_NAME

MODES = ["all", "owner"]
POSITIVE = st.floats(1e-3, 1e3)


@functools.cache
def cost_of(mode, devices):
    """The model of a small network with every layer owned."""
    model = BY_NAME["mlp"]
    with jax.enable_x64(True):
        tagged = first_pass("mlp")[0]
        rows = kfac.layer_rows(tagged, model.params(), *model.batch(4))
    reduction = kfac.Reduction(mode, devices=devices, bucket=0, share="gradients")
    return kfac.cost_model(tagged.layers, reduction, devices, rows=rows)


def halving(size, devices, machine):
    """Seconds of a reduce-scatter by recursive halving, message by message."""
    seconds, part = 0.0, float(size)
    while devices > 1:
        part, devices = part / 2, devices // 2
        seconds += machine.latency + part / machine.bandwidth
    return seconds


@hypothesis.given(st.integers(0, 10), st.integers(1, 10**6), POSITIVE, POSITIVE)
def test_collectives_message_by_message(power, elements, bandwidth, latency):
    devices, machine = 2**power, Machine(bandwidth, latency, 1.0)

    def seconds(kind):
        one = Collective("", "step", kind, elements, 4, devices)
        return collective_time(one, machine)

    once = halving(4 * elements, devices, machine)
    assert seconds("reduce_scatter") == pytest.approx(once)
    # An all-gather is the same backwards, an all-reduce is both.
    assert seconds("all_gather") == pytest.approx(once)
    assert seconds("all_reduce") == pytest.approx(2 * once)
    pairs = (devices - 1) * (latency + 4 * elements / devices / bandwidth)
    rounds = power * (latency + 2 * elements / bandwidth)
    assert seconds("all_to_all") == pytest.approx(min(pairs, rounds))
    message = latency + 4 * elements / bandwidth if power else 0
    assert seconds("permute") == pytest.approx(message)


def test_pairs_of_a_permutation_send_at_once():
    machine = Machine(100.0, 1.0, 1.0)
    one = Collective("", "inversion", "permute", 25, 4, 8, count=4)
    assert collective_time(one, machine) == 2.0


def test_an_unknown_collective():
    with pytest.raises(ValueError, match="no formula for the collective 'gossip'"):
        one = Collective("", "step", "gossip", 1, 4, 2)
        collective_time(one, Machine(1.0, 0.0, 1.0))


@pytest.mark.parametrize("mode", MODES)
def test_free_links_leave_arithmetic(mode):
    cost = cost_of(mode, 8)
    time = step_time(cost, Machine(math.inf, 0.0, 1e3))
    assert time.factor_communication == time.gradient_communication == 0
    flops = cost.flops_per_step()
    assert time[:4] == pytest.approx([work / 1e3 for work in flops])
    assert time.total == pytest.approx(sum(flops) / 1e3)


@pytest.mark.parametrize("mode", MODES)
def test_free_arithmetic_leaves_links(mode):
    time = step_time(cost_of(mode, 8), Machine(1e3, 1e-3, math.inf))
    assert time[:4] == (0, 0, 0, 0)
    assert time.factor_communication > 0 and time.gradient_communication > 0


def test_one_device_sends_nothing():
    time = step_time(cost_of("all", 1), Machine(1.0, 1.0, 1.0))
    assert time.factor_communication == time.gradient_communication == 0


@pytest.mark.parametrize("mode", MODES)
@hypothesis.given(
    st.tuples(POSITIVE, POSITIVE, POSITIVE),
    st.tuples(st.floats(1, 10), st.floats(0, 1), st.floats(1, 10)),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_better_machines_and_rarer_refreshes_take_no_longer(
    mode, machine, better, rate, share
):
    cost = cost_of(mode, 8)
    worse = Machine(*machine)
    good = Machine(*(x * f for x, f in zip(machine, better, strict=True)))
    slow, fast = (step_time(cost, m, rate).total for m in (worse, good))
    assert fast <= slow * (1 + 1e-12)
    rarer = step_time(cost, worse, rate * share).total
    assert rarer <= slow * (1 + 1e-12)


def test_owners_invert_in_parallel():
    """The busiest owner counts, not the sum."""
    alone, shared = cost_of("all", 8), cost_of("owner", 8)
    loads = [record.inversion for record in shared.layers]
    assert len({record.owner for record in shared.layers}) == len(loads) == 2
    assert alone.flops_per_step().inversion == sum(loads)
    assert shared.flops_per_step().inversion == max(loads)


def test_scale_covers_the_given_devices():
    times = scale(functools.partial(cost_of, "all"), Machine(1e6, 1e-6, 1e6), (8, 16))
    assert list(times) == [8, 16]
    assert times[8].compute == times[16].compute
    assert times[8].factor_communication < times[16].factor_communication


def test_the_share_of_the_factors():
    time = StepTime(1.0, 2.0, 3.0, 4.0, 5.0, 5.0)
    assert time.total == 20 and time.factor_share == 0.5
    assert StepTime(*[0.0] * 6).factor_share == 0


@pytest.mark.parametrize(
    "values, error",
    [
        ((0.0, 0.0, 1.0), "bandwidth must be positive, got 0.0"),
        ((1.0, -1.0, 1.0), "latency must not be negative, got -1.0"),
        ((1.0, 0.0, math.nan), "flops must be positive, got nan"),
    ],
)
def test_wrong_machines(values, error):
    with pytest.raises(ValueError, match=error):
        Machine(*values)
