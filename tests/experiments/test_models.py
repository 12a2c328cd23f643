"""The networks: shapes, batch statistics, and Linen against NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import datasets
from experiments.configs import NetConfig
from experiments.datasets.arrays import Dataset
from experiments.errors import ConfigError
from experiments.models import make_task
from experiments.models.task import make_preprocess

NET = NetConfig(hidden=(5,), blocks=(1, 1), width=4, code=(6, 3))


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits").first(200)


def batch(data, size=8):
    return data.x_train[:size], data.y_train[:size]


@pytest.mark.parametrize("model", ["mlp", "mlp_nnx", "resnet", "autoencoder"])
def test_evaluation_sums_over_examples(digits, model):
    task = make_task(model, NET, digits)
    params, state = jax.jit(task.init)(jax.random.key(0))
    images, labels = batch(digits)
    evaluate = jax.jit(task.evaluate)
    whole = evaluate(params, state, images, labels)
    parts = [
        evaluate(params, state, images[i : i + 4], labels[i : i + 4]) for i in (0, 4)
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(value, parts[0][name] + parts[1][name], rtol=1e-5)
    if model != "resnet":  # batch norm trains with the statistics of the batch
        loss, _ = task.loss(params, state, images, labels)
        np.testing.assert_allclose(loss, whole["loss"] / 8, rtol=1e-5)


def test_batch_statistics_move(digits):
    task = make_task("resnet", NET, digits)
    params, state = jax.jit(task.init)(jax.random.key(0))
    _, after = jax.jit(task.loss)(params, state, *batch(digits))
    assert jax.tree.structure(state) == jax.tree.structure(after)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state, after)
    assert all(jax.tree.leaves(moved))


def test_linen_and_nnx_are_the_same_network(digits):
    linen, in_nnx = (make_task(name, NET, digits) for name in ("mlp", "mlp_nnx"))
    params, _ = in_nnx.init(jax.random.key(3))
    assert isinstance(params, nnx.State)
    pure = nnx.to_pure_dict(params)
    renamed = {f"Dense_{i}": pure["layers"][i] for i in range(2)}
    images, labels = batch(digits)
    expected = linen.evaluate(renamed, {}, images, labels)["loss"]
    actual = in_nnx.evaluate(params, {}, images, labels)["loss"]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_autoencoder_has_the_classic_layers():
    data = datasets.load("mnist5k")
    task = make_task("autoencoder", NetConfig(), data)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    shapes = [params[f"Dense_{i}"]["kernel"].shape for i in range(8)]
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert shapes == list(zip(widths[:-1], widths[1:], strict=True))


@pytest.mark.parametrize("standardise", [False, True])
def test_preprocess(digits, standardise):
    x = make_preprocess(digits, standardise)(digits.x_train)
    assert x.dtype == jnp.float32
    if standardise:
        np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-4)
    else:
        assert (x.min(), x.max()) == (0, 1)


def test_constant_channel_does_not_divide_by_zero():
    x = np.zeros((4, 2, 2, 1), np.uint8)
    y = np.zeros(4, np.int32)
    data = Dataset("digits", "Digits", "nowhere", x, y, x, y)
    assert np.isfinite(make_preprocess(data, True)(x)).all()


def test_images_too_small_for_lenet5(digits):
    with pytest.raises(ConfigError, match="at least 12 x 12.*has 8 x 8"):
        make_task("lenet5", NET, digits)
