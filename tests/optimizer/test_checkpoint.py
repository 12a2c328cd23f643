"""Saving and restoring, and the two training loops of Flax."""

import copy
import pickle

import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import checkpoints
from flax.training.train_state import TrainState

import kfac_jax_lite as kfac
from tests.helpers import (
    INVERSES,
    batches_of,
    cases,
    close,
    first_pass,
    identical,
    train,
    train_step,
)
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]


def transformation(inverse="cholesky"):
    """A transformation whose state has everything in it."""
    return kfac.kfac(
        first_pass("mlp")[0].layers, 0.05, damping=0.01, inverse=inverse,
        interval=kfac.intervals.staleness(0.3), inverse_interval=2,
    )  # fmt: skip


def resumed(tx, restore):
    """Six steps at once, and three steps, save, restore, three steps."""
    tagged, batches = first_pass("mlp")[0], batches_of(MODEL, 6)
    whole = train(tagged, tx, MODEL.params(), batches)[:2]
    half = train(tagged, tx, MODEL.params(), batches[:3])[:2]
    fresh = (MODEL.params(seed=7), tx.init(MODEL.params(seed=7)))
    params, state = restore(half, fresh)
    identical((params, state), half)
    step = jax.jit(train_step(tagged, tx))
    for batch in batches[3:]:
        params, state, _ = step(params, state, *batch)
    identical((params, state), whole)


@pytest.mark.parametrize("inverse", cases(INVERSES, ["cholesky", "ekfac", "low_rank"]))
def test_flax_serialization_resumes_bit_for_bit(inverse):
    def restore(half, fresh):
        data = flax.serialization.to_bytes(half)
        restored = flax.serialization.from_bytes(fresh, data)
        return jax.tree.map(jnp.asarray, restored)

    resumed(transformation(inverse), restore)


def test_orbax_resumes_bit_for_bit(tmp_path):
    def restore(half, fresh):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", half)
            checkpointer.wait_until_finished()
            return checkpointer.restore(tmp_path / "state", fresh)

    resumed(transformation(), restore)


class KFACTrainState(TrainState):
    """Flax's train state with the statistics passed on to ``tx.update``."""

    def apply_gradients(self, *, grads, statistics, **kwargs):
        """One step; the same as the parent's, with ``statistics``."""
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, statistics=statistics
        )
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **kwargs,
        )


class Network(nn.Module):
    """A Linen network."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, param_dtype=jnp.float64)(x))
        return nn.Dense(3, param_dtype=jnp.float64)(x)


def cross_entropy(logits, y):
    """Mean cross-entropy of marked logits."""
    logits = kfac.categorical(logits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_linen_train_state():
    module, (x, y) = Network(), MODEL.batch(4)
    params = module.init(jax.random.key(0), x)["params"]

    def loss(params, x, y):
        return cross_entropy(module.apply({"params": params}, x), y)

    tagged = kfac.tag(loss, params, x, y, strict=True)
    assert {layer.name for layer in tagged.layers} == {"Dense_0", "Dense_1"}
    assert tagged.layers[0].params == ("['Dense_0']['kernel']", "['Dense_0']['bias']")
    tx = kfac.kfac(tagged.layers, 0.05)
    state = KFACTrainState.create(apply_fn=module.apply, params=params, tx=tx)

    @jax.jit
    def step(state, x, y):
        value, grads, statistics = tagged.value_and_grad(
            state.params, x, y, opt_state=state.opt_state
        )
        return state.apply_gradients(grads=grads, statistics=statistics), value

    batches = batches_of(MODEL, 3)
    for batch in batches:
        state, _ = step(state, *batch)
    close(state.params, train(tagged, tx, params, batches)[0], 1e-10)
    assert int(state.step) == 3


class NnxNetwork(nnx.Module):
    """An NNX network."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, param_dtype=jnp.float64, rngs=rngs)
        self.second = nnx.Linear(5, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def test_nnx_optimizer():
    model = NnxNetwork(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(jnp.copy, params)  # the optimiser changes the model's own

    def loss(params, x, y):
        return cross_entropy(nnx.merge(graph, params)(x), y)

    batches = batches_of(MODEL, 3)
    tagged = kfac.tag(loss, params, *batches[0], strict=True)
    assert {layer.kind for layer in tagged.layers} == {"dense"}
    assert {layer.name for layer in tagged.layers} == {"first", "second"}
    tx = kfac.kfac(tagged.layers, 0.05)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads, statistics = tagged.value_and_grad(
            nnx.state(model, nnx.Param), x, y, opt_state=optimizer.opt_state
        )
        optimizer.update(model, grads, statistics=statistics)
        return value

    losses = [float(step(model, optimizer, *batch)) for batch in batches]
    wanted, _, wanted_losses = train(tagged, tx, params, batches)
    close(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(wanted), 1e-8)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-8)


# ---------------------------------------------------------------- flax's checkpoints


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")
@pytest.mark.parametrize("orbax", cases([False, True], [False]))
def test_flax_checkpoints_keep_the_newest(tmp_path, orbax):
    """``flax.training.checkpoints``, with flax's and with orbax's files."""
    tagged, tx, params = first_pass("mlp")[0], transformation(), MODEL.params()
    flax.config.update("flax_use_orbax_checkpointing", orbax)
    try:
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        saved = []
        for number, batch in enumerate(batches_of(MODEL, 3)):
            _, grads, statistics = tagged.value_and_grad(
                state.params, *batch, opt_state=state.opt_state
            )
            state = KFACTrainState.apply_gradients(
                state, grads=grads, statistics=statistics
            )
            checkpoints.save_checkpoint(tmp_path, state, number, keep=2)
            saved.append(state)
        fresh = TrainState.create(apply_fn=None, params=MODEL.params(seed=7), tx=tx)
        for number, options in ((2, {}), (1, {"step": 1})):
            found = checkpoints.restore_checkpoint(tmp_path, fresh, **options)
            assert int(found.step) == number + 1
            pairs = (s.replace(step=np.zeros(())) for s in (found, saved[number]))
            identical(*pairs)
        with pytest.raises(ValueError, match="0"):
            checkpoints.restore_checkpoint(tmp_path, fresh, step=0)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", False)


def test_large_arrays_are_cut_and_joined(monkeypatch):
    """Flax cuts arrays longer than a limit: here every factor."""
    state = train(first_pass("mlp")[0], transformation(), MODEL.params(),
                  batches_of(MODEL, 2))[1]  # fmt: skip
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 24)
    data = flax.serialization.to_bytes(state)
    assert data.count(b"__msgpack_chunked_array__") > 4
    fresh = transformation().init(MODEL.params(seed=7))
    identical(flax.serialization.from_bytes(fresh, data), state)


@pytest.mark.parametrize("other", ["inverse", "interval", "network"])
def test_bytes_of_another_state_are_refused(other):
    """With the path of the first field that differs."""
    layers, model = first_pass("mlp")[0].layers, MODEL
    options = {"inverse": "eigh"} if other == "inverse" else {}
    if other == "interval":
        options = {"interval": kfac.intervals.every(2)}
    if other == "network":
        model, layers = BY_NAME["heads_out"], first_pass("heads_out")[0].layers
    target = kfac.kfac(layers, 0.05, **options).init(model.params())
    data = flax.serialization.to_bytes(transformation().init(MODEL.params()))
    with pytest.raises(ValueError, match="at path ./kfac"):
        flax.serialization.from_bytes(target, data)


def test_pickle_and_deepcopy():
    state = train(first_pass("mlp")[0], transformation(), MODEL.params(),
                  batches_of(MODEL, 2))[1]  # fmt: skip
    identical(pickle.loads(pickle.dumps(state)), state)
    identical(copy.deepcopy(state), state)


def test_nnx_optimizer_splits_and_merges():
    """An ``nnx.Optimizer`` taken apart and put together goes on."""
    model = NnxNetwork(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    batch = MODEL.batch(4)

    def loss(params, x, y):
        return cross_entropy(nnx.merge(graph, params)(x), y)

    tagged = kfac.tag(loss, params, *batch)
    optimizer = nnx.Optimizer(model, kfac.kfac(tagged.layers, 0.05), wrt=nnx.Param)
    _, grads, statistics = tagged.value_and_grad(
        nnx.state(model, nnx.Param), *batch, opt_state=optimizer.opt_state
    )
    optimizer.update(model, grads, statistics=statistics)
    structure, state = nnx.split(optimizer)
    merged = nnx.merge(structure, state)
    identical(nnx.as_pure(nnx.state(merged)), nnx.as_pure(nnx.state(optimizer)))
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    merged.update(model, grads, statistics=statistics)
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert all(jax.tree.leaves(moved))
