"""The example notebooks of the Equinox repository."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax

from tests.acceptance.checkouts.checkout import (
    KEY,
    Case,
    Client,
    array,
    integers,
    run_cells,
)

REPOSITORY = "patrick-kidger/equinox"
SPLIT = "arrays split off with eqx.partition"
UNWRAPPED = f"{SPLIT}; eqx.filter_value_and_grad taken off the loss"


def case(
    make: Callable[[Any], Any],
    loss: Callable[..., Any],
    args: tuple[Any, ...],
    num_examples: int,
) -> Case:
    """A loss of a model, as a loss of its arrays."""
    # Integers, activations and such are no arrays, and stay as they are.
    model = eqx.filter_eval_shape(make, KEY)
    is_weight = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    params, static = eqx.partition(model, is_weight)

    def of_params(params: Any, *args: Any) -> Any:
        return loss(eqx.combine(params, static), *args)

    return Case(of_params, params, args, num_examples)


def cells(folder: Path, name: str, *numbers: int, **names: Any) -> dict[str, Any]:
    """Runs cells of a notebook, whose losses stay undecorated."""
    with mock.patch.object(eqx, "filter_value_and_grad", lambda loss: loss):
        return run_cells(folder / f"{name}.ipynb", numbers, **names)


def mnist(folder: Path) -> Case:
    """Convolutional network."""
    images, labels = array(64, 1, 28, 28), integers(64)
    zeros = {"dummy_x": jax.numpy.zeros(images.shape)}
    zeros["dummy_y"] = jax.numpy.zeros(64, int)
    found = cells(folder, "mnist", 1, 2, 8, 12, **zeros)
    return case(found["CNN"], found["loss"], (images, labels), 64)


def vision_transformer(folder: Path) -> Case:
    """Vision transformer for CIFAR-10."""
    found = cells(folder, "vision_transformer", 1, 2, 6, 8, 10, 11)
    names = "embedding_dim hidden_dim num_heads num_layers dropout_rate patch_size"
    sizes = {name: found[name] for name in f"{names} num_patches num_classes".split()}
    batch = found["batch_size"]
    keys = array(batch, 2, dtype="uint32")
    args = array(batch, 3, 32, 32), integers(batch), keys

    def make(key: Any) -> Any:
        return found["VisionTransformer"](**sizes, key=key)

    return case(make, found["compute_grads"], args, batch)


def train_rnn(folder: Path) -> Case:
    """GRU that tells spirals apart."""
    found = cells(folder, "train_rnn", 1, 3, 5, 7)
    losses: list[Any] = []

    def keep(loss: Any) -> Any:
        losses.append(loss)
        raise StopIteration

    # The loss is local to main and of nothing else there.
    with mock.patch.object(eqx, "filter_value_and_grad", keep):
        try:
            found["main"](dataset_size=32)
        except StopIteration:
            pass

    def make(key: Any) -> Any:
        return found["RNN"](in_size=2, out_size=1, hidden_size=16, key=key)

    return case(make, losses[0], (array(32, 16, 2), array(32, 1)), 32)


def bert(folder: Path) -> Case:
    """Tiny BERT, fine-tuned to classify sentences."""
    found = cells(folder, "bert", 3, 5, 6, 7, 8, 9, 10, 12, 17)
    tokens = integers(32, 128)
    inputs = {"token_ids": tokens, "segment_ids": tokens, "label": integers(32)}

    def make(key: Any) -> Any:
        return found["BertClassifier"](found["bert_config"], num_classes=2, key=key)

    return case(make, found["compute_loss"], (inputs, KEY), 32)


def diffusion(folder: Path) -> Case:
    """Mixer that predicts noise; layer norms over whole maps."""
    found = cells(folder, "score_based_diffusion", 1, 3, 5)

    def make(key: Any) -> Any:
        sizes = {"patch_size": 4, "hidden_size": 64, "num_blocks": 4, "t1": 10.0}
        mixing = {"mix_patch_size": 512, "mix_hidden_size": 512}
        return found["Mixer2d"]((1, 28, 28), **sizes, **mixing, key=key)

    def loss(model: Any, data: Any, key: Any) -> Any:
        def weight(t: Any) -> Any:
            return 1 - jax.numpy.exp(-t)

        return found["batch_loss_fn"](model, weight, lambda t: t, data, 10.0, key)

    return case(make, loss, (array(256, 1, 28, 28), KEY), 256)


EXAMPLES = {
    "mnist": (mnist, SPLIT),
    "vision_transformer": (vision_transformer, UNWRAPPED),
    "train_rnn": (train_rnn, f"{UNWRAPPED}, from main"),
    "bert": (bert, f"{UNWRAPPED}; annotations, which fail, not evaluated"),
    "diffusion": (diffusion, f"{SPLIT}; weight and int_beta closed over"),
}
CLIENTS = {
    f"equinox_{name}": Client(
        f"Equinox {name}", REPOSITORY, "docs/examples", make, adapted
    )
    for name, (make, adapted) in EXAMPLES.items()
}
