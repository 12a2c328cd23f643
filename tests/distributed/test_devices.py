"""Eight devices compute what one device computes with the whole batch."""

import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests.helpers import batches_of, cases, close, kfac_state, train, train_step
from tests.models import BY_NAME

DEVICES = 8
MODELS = ["mlp", "conv2d", "layer_norm"]
EXAMPLES = 16

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs eight host devices"
)


def make(tagged, inverse="cholesky", axis_name=None):
    """A transformation with everything adaptive."""
    return kfac.kfac(
        tagged.layers, 0.05, damping=0.01, inverse=inverse, axis_name=axis_name,
        interval=kfac.intervals.staleness(0.5), inverse_interval=2,
    )  # fmt: skip


def single(name, inverse="cholesky"):
    """Four steps on one device with the whole batch."""
    model = BY_NAME[name]
    tagged = model.tag(EXAMPLES)
    batches = batches_of(model, 4, EXAMPLES)
    return train(tagged, make(tagged, inverse), model.params(), batches)


def pmapped(name, inverse="cholesky"):
    """The same by ``pmap``, two examples to a device."""
    model = BY_NAME[name]
    tagged = model.tag(EXAMPLES // DEVICES)
    tx = make(tagged, inverse, axis_name="batch")

    def step(params, state, x, y):
        value, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
        value, grads = jax.lax.pmean((value, grads), "batch")
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, value

    run = jax.pmap(step, axis_name="batch")
    params, losses = model.params(), []
    carry = jax.tree.map(lambda v: np.stack([v] * DEVICES), (params, tx.init(params)))
    for batch in batches_of(model, 4, EXAMPLES):
        parts = jax.tree.map(lambda v: v.reshape(DEVICES, -1, *v.shape[1:]), batch)
        *carry, loss = run(*carry, *parts)
        losses.append(loss)
    return jax.device_get((*carry, losses))


@pytest.mark.parametrize("name", cases(MODELS, ["mlp"]))
def test_pmap(name):
    params, state, losses = pmapped(name)
    wanted, wanted_state, wanted_losses = single(name)
    for device in (0, DEVICES - 1):
        at = lambda tree, d=device: jax.tree.map(lambda v: v[d], tree)  # noqa: E731
        close(at(params), wanted, 1e-8)
        close(at(losses), wanted_losses, 1e-8)
        close(at(kfac_state(state).factors), kfac_state(wanted_state).factors, 1e-8)
        clock = at(kfac_state(state).clock)
        np.testing.assert_array_equal(
            clock.refreshes, kfac_state(wanted_state).clock.refreshes
        )


@pytest.mark.parametrize(
    "inverse", cases(["eigh", "ekfac", "newton_schulz"], ["ekfac"])
)
def test_pmap_inverses(inverse):
    params, *_ = pmapped("mlp", inverse)
    close(jax.tree.map(lambda v: v[0], params), single("mlp", inverse)[0], 1e-7)


def sharded():
    """Shardings of the batch and of everything else over eight devices."""
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    return (
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )


@pytest.mark.parametrize("name", cases(MODELS, ["layer_norm"]))
def test_jit_with_a_sharded_batch(name):
    model = BY_NAME[name]
    split, replicated = sharded()
    tagged = model.tag(EXAMPLES)
    batches = [jax.device_put(b, split) for b in batches_of(model, 4, EXAMPLES)]
    params = jax.device_put(model.params(), replicated)
    new, state, losses = train(tagged, make(tagged), params, batches)
    wanted, wanted_state, wanted_losses = single(name)
    close((new, losses), (wanted, wanted_losses), 1e-8)
    close(kfac_state(state).factors, kfac_state(wanted_state).factors, 1e-8)
    assert all(v.sharding.is_fully_replicated for v in jax.tree.leaves(new))


def test_the_reduction_is_inside_the_conditional():
    """A layer that is not due is not communicated."""
    model = BY_NAME["mlp"]
    split, replicated = sharded()
    tagged, params = model.tag(EXAMPLES), model.params()
    tx = make(tagged)
    state = jax.device_put(tx.init(params), replicated)
    batch = jax.device_put(model.batch(EXAMPLES), split)
    run = jax.jit(train_step(tagged, tx))
    text = run.lower(jax.device_put(params, replicated), state, *batch)
    text = text.compile().as_text()
    blocks = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text)
    widths = {f"[{m},{m}]" for m in (4 + 1, 5, 5 + 1, 3)}
    for block in blocks:
        reduced = [line for line in block.splitlines() if " all-reduce(" in line]
        if block.startswith("ENTRY"):
            factors = [ln for ln in reduced if any(w in ln for w in widths - {"[5,5]"})]
            # gradients are [4,5] and [5,3]: a square all-reduce would be a factor
            assert not factors, factors
    assert any(
        " all-reduce(" in block and not block.startswith("ENTRY") for block in blocks
    )
