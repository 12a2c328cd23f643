"""The mlp once more, in flax NNX."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from experiments.datasets import Dataset
from experiments.models.task import Task, classifier


class MLP(nnx.Module):
    """Fully connected network with rectified linear units."""

    def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
        """Makes the layers."""
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[batch, h, w, c]`` to logits ``[batch, classes]``."""
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def nnx_task(hidden: Sequence[int], data: Dataset) -> Task:
    """Builds the task of the NNX network.

    The module is split once into its graph and its parameters, an `nnx.State`, which is
    a pytree like any other.
    """
    height, width, channels = data.image_shape
    widths = (height * width * channels, *hidden, data.num_classes)
    graph = nnx.graphdef(nnx.eval_shape(lambda: MLP(widths, nnx.Rngs(0))))

    def init(key: jax.Array, inputs: jax.Array) -> tuple[Any, Any]:
        del inputs
        return nnx.state(MLP(widths, nnx.Rngs(key)), nnx.Param), {}

    def apply(params: Any, model_state: Any, x: jax.Array, train: bool):
        del train
        return nnx.merge(graph, params)(x), model_state

    return classifier(init, apply, data)
