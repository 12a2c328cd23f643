"""A NaN on one of eight devices: all of them skip the batch, and none waits for ever.

Collectives inside a conditional hang when devices take different branches of it. Each
scenario therefore runs in a process of its own, which has to end in time.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import batches_of, cases, identical, kfac_state, leaves
from tests.models import BY_NAME

ROOT = pathlib.Path(kfac.__file__).parents[1]
PATIENCE = 240
DEVICES = 8
BROKEN_DEVICE = 5
EXAMPLES = 16
STEPS = 12
BROKEN_STEPS = (0, 3, 4, 6, 9)
AXIS = "batch"
MODEL = BY_NAME["mlp"]
ALL_REDUCE = kfac.Reduction()

ALL = ("batch", "statistics", "gradient")
# What one process runs: a way of training, and where the NaN is.
SCENARIOS = [
    ("pmap", ALL),
    ("shard_map", ALL),
    # The type system knows that an averaged gradient is the same on all devices.
    ("checked_shard_map", ALL[:2]),
    ("jit", ALL[:1]),
    # Each device has a slice of the reduced statistics: one alone sees the NaN.
    ("owners", ("statistics",)),
    ("owners", ("batch", "gradient")),
]
FAST = [("owners", ("statistics",))]


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight host devices")
@pytest.mark.parametrize(("kind", "places"), cases(SCENARIOS, FAST))
def test_nan_on_one_device(kind, places):
    # Programs with owners are compiled anew: see `compiled_anew` in conftest.py.
    kept = {} if kind == "owners" else kept_programs()
    code = "import sys; from tests.distributed.test_faults import scenario\n"
    code += "for place in sys.argv[2:]: scenario(sys.argv[1], place)"
    done = subprocess.run(
        [sys.executable, "-c", code, kind, *places],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_X64": "1", **kept},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("agreed") == len(places)


def kept_programs():
    """Variables by which a process uses the compiled programs that pytest keeps."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def scenario(kind, place):
    """Steps with and without broken ones; compares devices, and the two runs.

    Runs in a process of its own; any difference is an AssertionError there.
    """
    start, advance, copies = BUILD[kind](place)
    batches = batches_of(MODEL, STEPS, EXAMPLES)
    seen, clean, skipped, mixed = start(), start(), 0, 0
    for number, batch in enumerate(batches):
        broken = number in BROKEN_STEPS
        due = np.asarray(kfac_state(copies(seen)[0][1]).clock.due)
        seen = advance(seen, batch, broken)
        # Statistics that no layer has asked for are not looked at.
        broken &= place != "statistics" or bool(due.any())
        skipped += broken
        if broken:
            mixed += due.any() and not due.all()
        else:
            clean = advance(clean, batch, False)
        every = copies(seen)
        for other in every[1:]:
            identical(shared(other), shared(every[0]))
        assert int(kfac_state(every[0][1]).skipped) == skipped
        assert int(kfac_state(every[0][1]).count) == number + 1 - skipped
        sliced = len(shared(every[0])) < len(leaves(every[0]))
        assert sliced == (kind == "owners")
        for one, other in zip(every, copies(clean), strict=True):
            identical(without_skipped(one), without_skipped(other))
    assert mixed, "no broken step at which some layers were due and others were not"
    print(kind, place, "agreed")


def shared(tree):
    """The leaves by path that every device has: all but slices of statistics."""
    is_slices = lambda node: type(node).__name__ == "Slices"  # noqa: E731
    drop = lambda node: None if is_slices(node) else node  # noqa: E731
    return leaves(jax.tree.map(drop, tree, is_leaf=is_slices))


def without_skipped(tree):
    """The leaves by path, but for the counter of skipped batches."""
    return {k: v for k, v in leaves(tree).items() if not k.endswith(".skipped")}


def make(axis_name, examples, reduction=ALL_REDUCE):
    """Tagged loss and transformation, with intervals that layers do not share."""
    tagged = MODEL.tag(examples)
    tx = kfac.kfac(
        tagged.layers, 0.05, damping=0.01, weight_decay=0.1, axis_name=axis_name,
        reduction=reduction,
        interval=kfac.intervals.adaptive(0.5, rule="elapsed"), inverse_interval=2,
    )  # fmt: skip
    return tagged, tx


def device_step(tagged, tx, place, average):
    """One device's step; with ``broken``, one device has NaN at the given place."""

    def step(params, state, x, y, broken):
        here = broken & (lax.axis_index(AXIS) == BROKEN_DEVICE)

        def spoil(tree, where):
            if place != where:
                return tree
            return jax.tree.map(lambda v: with_nan(v, here), tree)

        _, grads, statistics = tagged.value_and_grad(
            params, spoil(x, "batch"), y, opt_state=state
        )
        grads = spoil(average(grads), "gradient")
        statistics = spoil(statistics, "statistics")
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


def with_nan(array, here):
    """The array with NaN as its first number, where ``here`` says so."""
    first = jnp.arange(array.size).reshape(array.shape) == 0
    return jnp.where(here & first, jnp.nan, array)


def pmapped(place):
    """By ``jax.pmap``."""
    tagged, tx = make(AXIS, EXAMPLES // DEVICES)
    average = functools.partial(lax.pmean, axis_name=AXIS)
    step = device_step(tagged, tx, place, average)
    run = jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, 0, 0, None))

    def start():
        carry = (MODEL.params(), tx.init(MODEL.params()))
        return jax.tree.map(lambda v: jnp.stack([v] * DEVICES), carry)

    def advance(carry, batch, broken):
        x, y = (v.reshape(DEVICES, -1, *v.shape[1:]) for v in batch)
        return run(*carry, x, y, jnp.asarray(broken))

    def copies(carry):
        host = jax.device_get(carry)
        return [jax.tree.map(lambda v, d=d: v[d], host) for d in range(DEVICES)]

    return start, advance, copies


def mapped(place, check_vma, reduction=ALL_REDUCE):
    """By ``jax.shard_map``."""
    tagged, tx = make(AXIS, EXAMPLES // DEVICES, reduction)

    def average(grads):
        if check_vma:  # autodiff has summed already
            return jax.tree.map(lambda g: g / DEVICES, grads)
        return lax.pmean(grads, AXIS)

    whole, part = PartitionSpec(), PartitionSpec(AXIS)
    specs = kfac.state_specs(jax.eval_shape(tx.init, MODEL.params()), AXIS)
    run = jax.shard_map(
        device_step(tagged, tx, place, average),
        mesh=mesh(),
        in_specs=(whole, specs, part, part, whole),
        out_specs=(whole, specs),
        check_vma=check_vma,
    )
    run = jax.jit(run)

    def advance(carry, batch, broken):
        return run(*carry, *batch, jnp.asarray(broken))

    return placed_start(tx, specs), advance, shards


def jitted(place):
    """By ``jax.jit`` with a sharded batch."""
    assert place == "batch"
    tagged, tx = make(None, EXAMPLES)
    replicated = NamedSharding(mesh(), PartitionSpec())

    @functools.partial(jax.jit, out_shardings=replicated)
    def run(params, state, x, y):
        _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    def advance(carry, batch, broken):
        x, y = batch
        if broken:
            share = EXAMPLES // DEVICES
            x = x.at[BROKEN_DEVICE * share, 0].set(jnp.nan)
        batch = jax.device_put((x, y), NamedSharding(mesh(), PartitionSpec(AXIS)))
        return run(*carry, *batch)

    return placed_start(tx, PartitionSpec()), advance, shards


def mesh():
    """Eight devices in a row."""
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))


def placed_start(tx, specs):
    """A function to parameters, on all devices, and state, where its specs say."""
    sharding = jax.tree.map(
        lambda spec: NamedSharding(mesh(), spec), (PartitionSpec(), specs)
    )
    return lambda: jax.device_put((MODEL.params(), tx.init(MODEL.params())), sharding)


def shards(carry):
    """What each device has of arrays that should be the same on all."""

    def of(array, device):
        found = {shard.device.id: shard.data for shard in array.addressable_shards}
        return np.asarray(found[device])

    return [jax.tree.map(lambda v, d=d: of(v, d), carry) for d in range(DEVICES)]


BUILD = {
    "pmap": pmapped,
    "shard_map": functools.partial(mapped, check_vma=False),
    "checked_shard_map": functools.partial(mapped, check_vma=True),
    "jit": jitted,
    "owners": functools.partial(
        mapped,
        check_vma=False,
        reduction=kfac.Reduction(mode="owner", bucket=0, devices=DEVICES),
    ),
}
