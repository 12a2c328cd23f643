"""Training over eight host devices in every mode, against one device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import batches_of, close, kfac_state, train

DEVICES = 8
EXAMPLES = 16
AXIS = "batch"
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()

OWNER = functools.partial(kfac.Reduction, "owner", devices=DEVICES, bucket=0)
REDUCTIONS = {
    "all": kfac.Reduction(),
    "alone": kfac.Reduction(bucket=0),
    "unpacked": kfac.Reduction(pack=False, bucket=0),
    "bfloat16": kfac.Reduction(dtype=jnp.bfloat16),
    "owner": OWNER(),
    "inverses": OWNER(share="inverses"),
    "gradients": OWNER(share="gradients", pack=False),
    "owner_bfloat16": OWNER(dtype=jnp.bfloat16),
}
MODES = ("pmap", "shard_map", "checked", "auto", "explicit")


def transformation(layers, axis_name=None, reduction=None, inverse="cholesky"):
    """K-FAC with adaptive intervals."""
    return kfac.kfac(
        layers, 0.05, damping=0.01, inverse=inverse, inverse_interval=2,
        interval=kfac.intervals.adaptive(0.6, "elapsed"), axis_name=axis_name,
        reduction=reduction or kfac.Reduction(),
    )  # fmt: skip


def device_step(tagged, tx, summed, **options):
    """A step of one of several devices; ``summed``: gradients are sums already."""

    def step(params, state, x, y):
        value, grads, statistics = tagged.value_and_grad(
            params, x, y, opt_state=state, **options
        )
        value = jax.lax.pmean(value, AXIS)
        if summed:
            grads = jax.tree.map(lambda g: g / jax.lax.axis_size(AXIS), grads)
        else:
            grads = jax.lax.pmean(grads, AXIS)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    return step


def mesh_of(kind, devices=DEVICES):
    """A mesh of one axis."""
    return jax.make_mesh(
        (devices,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:devices]
    )


def prepare(
    model, mode, reduction, inverse="cholesky", devices=DEVICES, fisher="empirical",
    **options,
):  # fmt: skip
    """``(step, state, place, transformation)`` of a mode; ``place`` shards a batch.

    ``options`` are those of ``value_and_grad``.
    """
    if mode in ("auto", "explicit"):
        return under_jit(model, mode, reduction, inverse, devices, fisher, **options)
    tagged = model.tag(EXAMPLES // devices, fisher=fisher)
    tx = transformation(tagged.layers, AXIS, reduction, inverse)
    state = tx.init(model.params())
    step = device_step(tagged, tx, mode == "checked", **options)
    if mode == "pmap":
        axes = kfac.state_axes(state)
        step = jax.pmap(
            step, AXIS, in_axes=(None, axes, 0, 0), out_axes=(None, axes, None),
            devices=jax.devices()[:devices],
        )  # fmt: skip
        return step, state, functools.partial(jax.tree.map, split_rows(devices)), tx
    specs = kfac.state_specs(state, AXIS)
    step = jax.shard_map(
        step, mesh=mesh_of(AxisType.Auto, devices), check_vma=mode == "checked",
        in_specs=(WHOLE, specs, SPLIT, SPLIT), out_specs=(WHOLE, specs, WHOLE),
    )  # fmt: skip
    return jax.jit(step), state, lambda batch: batch, tx


def split_rows(devices):
    """A function that gives every device its rows."""
    return lambda x: x.reshape(devices, -1, *x.shape[1:])


class JitStep(NamedTuple):
    """A compiled step that places the parameters first."""

    step: Any
    place: Callable

    def __call__(self, params, *args):
        return self.step(self.place(params), *args)

    def text(self, params, *args):
        """Its optimised program."""
        return self.step.lower(self.place(params), *args).compile().as_text()


def under_jit(model, mode, reduction, inverse, devices, fisher="empirical", **options):
    """The same for ``jit`` with a sharded batch."""
    mesh = mesh_of(AxisType.Auto if mode == "auto" else AxisType.Explicit, devices)
    axis_name = None
    if reduction.mode != "all":
        reduction = dataclasses.replace(reduction, mesh=mesh, devices=None)
        axis_name = AXIS
    tagged = model.tag(EXAMPLES, fisher=fisher)
    tx = transformation(tagged.layers, axis_name, reduction, inverse)

    def step(params, state, x, y):
        value, grads, statistics = tagged.value_and_grad(
            params, x, y, opt_state=state, **options
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    state = tx.init(model.params())
    state = jax.tree.map(put, state, kfac.state_specs(state, AXIS))

    placed = JitStep(jax.jit(step), lambda params: put(params, WHOLE))
    return placed, state, lambda batch: put(batch, SPLIT), tx


def run(model, mode, reduction, steps, inverse="cholesky", devices=DEVICES, **options):
    """Parameters and state after some steps."""
    step, state, place, _ = prepare(model, mode, reduction, inverse, devices, **options)
    params = model.params()
    for batch in batches_of(model, steps, EXAMPLES):
        params, state, _ = step(params, state, *place(batch))
    return params, state


def whole(model, state, inverse="cholesky"):
    """The ``KFACState`` as one device would have it."""
    layers = model.tag(EXAMPLES).layers
    like = transformation(layers, inverse=inverse).init(model.params())
    return kfac_state(kfac.relayout(state, like, layers))


SINGLE: dict = {}


def single(model, steps, inverse="cholesky"):
    """The same on one device with the whole batch."""
    key = (model.name, steps, inverse)
    if key not in SINGLE:
        tagged = model.tag(EXAMPLES)
        tx = transformation(tagged.layers, inverse=inverse)
        batches = batches_of(model, steps, EXAMPLES)
        params, state, _ = train(tagged, tx, model.params(), batches)
        SINGLE[key] = jax.device_get((params, kfac_state(state)))
    return SINGLE[key]


def same(model, result, steps, tolerance=1e-8, inverse="cholesky"):
    """Asserts parameters, factors, inverses and intervals of one device."""
    params, state = jax.device_get(result[0]), whole(model, result[1], inverse)
    wanted, wanted_state = single(model, steps, inverse)
    close(params, wanted, tolerance)
    close(state.factors, wanted_state.factors, tolerance)
    close(state.inverses, wanted_state.inverses, tolerance)
    # A float32 in the state, whatever the statistics are.
    close(state.clock.diff, wanted_state.clock.diff, max(tolerance, 1e-6))
    for name in ("interval", "last_refresh", "refreshes", "inversions", "due"):
        seen, expected = getattr(state.clock, name), getattr(wanted_state.clock, name)
        assert seen.tolist() == expected.tolist(), name
