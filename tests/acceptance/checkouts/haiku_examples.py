"""The examples of the Haiku repository."""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import haiku as hk
import jax
import numpy as np

from tests.acceptance.checkouts.checkout import (
    CAUGHT,
    KEY,
    Case,
    Client,
    array,
    handed_over,
    integers,
    load,
)

REPOSITORY = "google-deepmind/dm-haiku"
MAIN = f"{CAUGHT}, of main on zeros"


def mnist(folder: Path) -> Case:
    """LeNet-300-100 with an L2 penalty in the loss."""
    del folder
    module = load("examples.mnist")

    def data(split: str, *, shuffle: bool, batch_size: int) -> Any:
        del split, shuffle, batch_size
        images = np.zeros((1000, 28, 28, 1), np.uint8)
        return itertools.repeat(module.Batch(images, np.zeros(1000, np.int32)))

    with mock.patch.object(module, "load_dataset", data):
        handed = handed_over(lambda: module.main(None))
    network = hk.without_apply_rng(hk.transform(module.net_fn))
    batch = module.Batch(array(1000, 28, 28, 1, dtype="uint8"), integers(1000))
    params = jax.eval_shape(network.init, KEY, batch.image)
    return Case(handed.loss, params, (batch,), 1000)


def vae(folder: Path) -> Case:
    """Variational autoencoder on binarised images."""
    del folder
    module = load("examples.vae")
    size = module.Config().batch_size

    def data(split: str, batch_size: int, seed: int) -> Any:
        del split, batch_size, seed
        return itertools.repeat(module.Batch(np.zeros((size, 28, 28, 1), np.uint8)))

    with mock.patch.object(module, "load_dataset", data):
        handed = handed_over(lambda: module.main(None))
    params = jax.eval_shape(lambda tree: tree, handed.args[0])
    batch = module.Batch(array(size, 28, 28, 1, dtype="uint8"))
    return Case(handed.loss, params, (KEY, batch), size)


def rnn(folder: Path) -> Case:
    """Two LSTMs on characters, time first."""
    del folder
    train = load("examples.rnn.train")
    init, loss = hk.without_apply_rng(hk.transform(train.sequence_loss))
    shape = train.SEQUENCE_LENGTH.value, train.TRAIN_BATCH_SIZE.value
    batch = {"input": integers(*shape), "target": integers(*shape)}
    return Case(loss, jax.eval_shape(init, KEY, batch), (batch,), shape[0] * shape[1])


def transformer(folder: Path) -> Case:
    """Transformer on characters, with a table of positions."""
    del folder
    train = load("examples.transformer.train")
    shape = train.BATCH_SIZE, train.SEQUENCE_LENGTH
    batch = train.dataset.Batch(integers(*shape), integers(*shape))
    params = jax.eval_shape(train.loss_fn.init, KEY, batch)
    return Case(train.loss_fn.apply, params, (KEY, batch), shape[0] * shape[1])


def imagenet(folder: Path) -> Case:
    """ResNet-50 v2 with an L2 penalty in the loss."""
    del folder
    train = load("examples.imagenet.train")
    size = train.FLAGS.train_device_batch_size
    batch = {"images": array(size, 224, 224, 3), "labels": integers(size)}

    def loss(params: Any, state: Any, batch: Any) -> Any:
        return train.loss_fn(params, state, train.get_initial_loss_scale(), batch)

    params, state = jax.eval_shape(
        lambda key, batch: train.forward.init(key, batch, is_training=True), KEY, batch
    )
    return Case(loss, params, (state, batch), size, has_aux=True)


EXAMPLES = {
    "mnist": (mnist, MAIN),
    "vae": (vae, MAIN),
    "rnn": (rnn, "transformed as in main"),
    "transformer": (transformer, ""),
    "imagenet": (imagenet, "loss scale, a constant, closed over"),
}
CLIENTS = {
    f"haiku_{name}": Client(f"Haiku {name}", REPOSITORY, ".", make, adapted)
    for name, (make, adapted) in EXAMPLES.items()
}
