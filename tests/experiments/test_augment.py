"""Augmentation: formulas against numpy, and runs that go on as if never stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import datasets
from experiments.configs import KFACConfig, NetConfig, ScheduleConfig, SGDConfig
from experiments.datasets.augment import chain, crop_and_flip, running_mixup
from experiments.models import make_task
from experiments.optimizers import make_sgd
from experiments.train import train
from tests.experiments.curves import close_curves, curve, interrupted, records_of
from tests.helpers import cases

CLASSES = 4


def batch(seed, dtype=np.uint8, shape=(6, 5, 4, 2)):
    """Images, each of distinct pixels without a zero, and labels."""
    rng = np.random.default_rng(seed)
    pixels = np.tile(1 + np.arange(np.prod(shape[1:])), (shape[0], 1))
    images = rng.permuted(pixels, axis=1).reshape(shape).astype(dtype)
    return images, rng.integers(0, CLASSES, shape[0]).astype(np.int32)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_running_mixup_is_its_formula(dtype):
    alpha, mixup = 0.4, running_mixup(0.4, CLASSES)
    state, apply = mixup.init(batch(0, dtype)), jax.jit(mixup.apply)
    old = 0.0, 0.0
    for number in range(5):
        images, labels = batch(number, dtype)
        key = jax.random.key(number)
        state, mixed = apply(state, (images, labels), key)
        share = np.asarray(jax.random.beta(key, alpha, alpha, (6,)), np.float64)
        share = share if number else np.ones(6)
        by = share.reshape(6, 1, 1, 1)
        old = (
            by * images.astype(np.float64) + (1 - by) * old[0],
            share[:, None] * np.eye(CLASSES)[labels] + (1 - share[:, None]) * old[1],
        )
        for seen, wanted in zip(mixed, old, strict=True):
            assert seen.dtype == jnp.float32
            np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(mixed[1].sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(state.images, mixed[0])
        np.testing.assert_array_equal(state.labels, mixed[1])
    assert int(state.steps) == 5
    assert ((mixed[1] > 0).sum(-1) > 1).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crops_are_windows_of_the_padded_image(dtype):
    padding, crop = 2, crop_and_flip(2)
    images, labels = batch(0, dtype, (64, 5, 4, 1))
    state, (seen, same) = jax.jit(crop.apply)((), (images, labels), jax.random.key(0))
    assert state == () and seen.dtype == dtype and seen.shape == images.shape
    np.testing.assert_array_equal(same, labels)
    padded = np.pad(images, [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])
    found = set()
    for image, source in zip(np.asarray(seen), padded, strict=True):
        windows = {
            (row, column, side): source[row : row + 5, column : column + 4][:, ::side]
            for row in range(2 * padding + 1)
            for column in range(2 * padding + 1)
            for side in (1, -1)
        }
        matches = {k for k, w in windows.items() if np.array_equal(w, image)}
        assert len(matches) == 1
        found |= matches
    for position in range(2):
        assert {key[position] for key in found} == set(range(2 * padding + 1))
    assert {key[2] for key in found} == {1, -1}


def test_a_chain_is_its_parts_with_keys_of_their_own():
    parts = crop_and_flip(1), running_mixup(0.5, CLASSES)
    both, key = chain(*parts), jax.random.key(3)
    first, second = batch(0), batch(1)
    state = both.init(first)
    mixed = parts[1].init(first)
    for given in (first, second):
        state, seen = both.apply(state, given, key)
        _, cropped = parts[0].apply((), given, jax.random.fold_in(key, 0))
        mixed, wanted = parts[1].apply(mixed, cropped, jax.random.fold_in(key, 1))
        jax.tree.map(np.testing.assert_array_equal, seen, wanted)
    assert chain().apply((), first, key) == ((), first)


@pytest.mark.parametrize("model", ["mlp", "mlp_nnx", "resnet"])
def test_soft_labels(model):
    """One-hot labels give the loss of integers; the loss is linear in the labels."""
    data = datasets.load("digits").first(16)
    task = make_task(model, NetConfig(hidden=(5,), blocks=(1,), width=4), data)
    params, state = jax.jit(task.init)(jax.random.key(0))
    loss = jax.jit(lambda labels: task.loss(params, state, data.x_train, labels)[0])
    labels = data.y_train, np.roll(data.y_train, 1)
    hard = [float(loss(y)) for y in labels]
    soft = [jax.nn.one_hot(y, 10) for y in labels]
    np.testing.assert_allclose([loss(y) for y in soft], hard, rtol=1e-5)
    mixed = loss(0.3 * soft[0] + 0.7 * soft[1])
    np.testing.assert_allclose(mixed, 0.3 * hard[0] + 0.7 * hard[1], rtol=1e-5)


RECIPE = {
    "kfac": KFACConfig(
        fisher="mc",
        schedule=ScheduleConfig("polynomial", warmup_steps=2, final_scale=0, power=3),
        tie_momentum=True,
    ),
    "sgd": SGDConfig(schedule=ScheduleConfig("polynomial"), tie_momentum=True),
}


@pytest.mark.parametrize(
    ("optimizer", "killed_after"),
    cases([("kfac", 5), ("sgd", 7)], [("sgd", 7)]),
    ids=["kfac-epoch", "sgd-within"],
)
def test_resume(tiny, console, tmp_path, monkeypatch, optimizer, killed_after):
    """Four steps an epoch; checkpoints at its end and in its middle."""
    whole = tiny(
        optimizers=(optimizer,),
        epochs=2,
        log_every=2,
        augment="crop-flip",
        mixup_alpha=0.4,
        workdir=tmp_path / "whole",
        **RECIPE,
    )
    train(whole, console)
    killed = dataclasses.replace(whole, workdir=tmp_path / "killed")
    interrupted(killed, console, monkeypatch, after=killed_after)
    train(killed, console)
    assert curve(killed, optimizer) == curve(whole, optimizer)
    (note,) = records_of(killed, optimizer, "note")
    assert note["step"] == (4 if killed_after == 5 else 6)
    plain = dataclasses.replace(
        whole, augment="none", mixup_alpha=0.0, workdir=tmp_path / "plain"
    )
    train(plain, console)
    assert curve(plain, optimizer) != curve(whole, optimizer)


def test_augmentation_on_four_devices(tiny, console, tmp_path):
    """The random numbers and the mixed batch are those of one device."""
    values = {"optimizers": ("sgd",), "augment": "crop-flip", "mixup_alpha": 0.4}
    one = tiny(workdir=tmp_path / "one", **values)
    four = tiny(workdir=tmp_path / "four", devices=4, **values)
    for config in (one, four):
        train(config, console)
    close_curves(curve(four, "sgd"), curve(one, "sgd"))


def test_tied_momentum_of_sgd():
    """Against the heavy ball in Python; Nesterov's form looks one decay ahead."""
    config = SGDConfig(
        0.2,
        schedule=ScheduleConfig("polynomial", 2, final_scale=0.0, power=3.0),
        momentum=0.8,
        tie_momentum=True,
    )
    tx = make_sgd(config, total_steps=8)
    state, velocity = tx.init(jnp.zeros(())), 0.0
    for t in range(8):
        scale = t / 2 if t < 2 else (1 - (t - 2) / 6) ** 3
        velocity = 0.8 * scale * velocity + (t + 1)
        ahead = 0.8 * scale * velocity + (t + 1)
        update, state = tx.update(jnp.asarray(t + 1.0), state, jnp.zeros(()))
        np.testing.assert_allclose(update, -0.2 * scale * ahead, rtol=2e-5, atol=1e-7)
    plain = make_sgd(dataclasses.replace(config, tie_momentum=False), 8)
    like = optax.sgd(0.1, momentum=0.8, nesterov=True).init(jnp.zeros(()))
    assert len(jax.tree.leaves(plain.init(jnp.zeros(())))) == 1 + len(
        jax.tree.leaves(like)
    )
