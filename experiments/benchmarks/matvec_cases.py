"""The operators whose products are timed, and their weights for PyTorch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.datasets import Dataset
from experiments.models.networks import MLP, LeNet5
from kfac_jax_lite import curvature
from kfac_jax_lite.curvature.laws import samples
from kfac_jax_lite.curvature.operator import Kept, Operator
from kfac_jax_lite.outputs import marked_loss

HIDDEN = 512
CLASSES = 10
MC = "MC Fisher"
EMPIRICAL = "empirical Fisher"
KFAC = {"K-FAC, GGN": "type-2", "K-FAC, empirical": "empirical"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weights PyTorch keeps in another order."""

    name: str  # of its parameters in flax
    # Height, width and channels that were flattened before a dense layer; PyTorch
    # flattens channels first.
    image: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that both libraries have."""

    module: nn.Module  # the flax module
    layers: tuple[Layer, ...]  # in the order of the PyTorch module


def mlp(width: int) -> Network:
    """Two hidden layers of this width, rectified linear units."""
    layers = tuple(Layer(f"Dense_{i}") for i in range(3))
    return Network(MLP((width, width), CLASSES), layers)


def lenet5(width: int) -> Network:
    """LeNet-5 on images of 28 x 28 pixels; its widths are its own."""
    del width
    convolutions = Layer("Conv_0"), Layer("Conv_1")
    dense = Layer("Dense_0", (5, 5, 16)), Layer("Dense_1"), Layer("Dense_2")
    return Network(LeNet5(CLASSES), (*convolutions, *dense))


NETWORKS = {"mlp": mlp, "lenet5": lenet5}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network with its loss, at a point, on a data set."""

    name: str  # of the network
    network: Network  # its module and layers
    tagged: kfac.TaggedLoss  # the tagged loss
    params: Any  # the point
    # Images ``[batch, 28, 28, 1]`` in [0, 1], and labels.
    batches: list[tuple[jax.Array, jax.Array]]
    key: jax.Array  # PRNG key of the labels that the MC Fisher draws


def make_problem(
    name: str, data: Dataset, batch_size: int, width: int = HIDDEN
) -> Problem:
    """Builds a network at its initial weights."""
    network = NETWORKS[name](width)
    images = data.x_train.astype(np.float32) / np.float32(data.maximum)
    starts = range(0, len(images), batch_size)
    batches = [
        (
            jnp.asarray(images[i : i + batch_size]),
            jnp.asarray(data.y_train[i:][:batch_size]),
        )
        for i in starts
    ]
    params = network.module.init(jax.random.key(0), batches[0][0][:1])["params"]

    def loss(params, x, y):
        logits: Any = network.module.apply({"params": params}, x)
        logits = kfac.categorical(logits)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tagged = kfac.tag(loss, params, *batches[0])
    return Problem(name, network, tagged, params, batches, jax.random.key(1))


def our_operators(problem: Problem) -> dict[str, Callable[[], Operator]]:
    """Functions that make this package's operators, by matrix."""
    at = problem.tagged, problem.params, problem.batches
    return {
        "Hessian": lambda: curvature.hessian(*at),
        "GGN": lambda: curvature.ggn(*at),
        MC: lambda: curvature.mc_fisher(*at, key=problem.key),
        EMPIRICAL: lambda: curvature.empirical_fisher(*at),
        "K-FAC, GGN": lambda: ready(curvature.ggn(*at, "kronecker")),
        "K-FAC, empirical": lambda: ready(curvature.empirical_fisher(*at, "kronecker")),
    }


def ready(operator: Operator) -> Operator:
    """Waits for the factors of an operator."""
    assert isinstance(operator.form, Kept)
    jax.block_until_ready(operator.form.parts)
    return operator


def drawn_labels(operator: Operator) -> list[np.ndarray]:
    """The labels that our MC Fisher with one sample has drawn, batch by batch."""
    stream = operator.stream
    found = []
    for number, batch in enumerate(stream.batches):
        model = marked_loss(stream.tagged, stream.params, batch)
        outputs = model.outputs(model.values(stream.params)[1])
        key = stream.batch_key(number)
        ((gradient,),) = samples(stream.law, model, stream.params, outputs, key)
        # The gradient is p - e_y: negative at the label only.
        found.append(np.asarray(jnp.argmin(gradient, -1)))
    return found


def with_labels(problem: Problem, labels: Sequence[np.ndarray]) -> Problem:
    """The same problem with other labels."""
    pairs = zip(problem.batches, labels, strict=True)
    batches = [(x, jnp.asarray(y, jnp.int32)) for (x, _), y in pairs]
    return dataclasses.replace(problem, batches=batches)


def normal_vectors(problem: Problem, seed: int, several: int | None = None) -> Any:
    """Standard normal vectors shaped like the parameters."""
    leaves, structure = jax.tree.flatten(problem.params)
    lead = () if several is None else (several,)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    drawn = [jax.random.normal(k, (*lead, *x.shape), x.dtype) for k, x in pairs]
    return jax.tree.unflatten(structure, drawn)


def carried(tree: Any, network: Network, several: bool = False) -> list[np.ndarray]:
    """A tree like our parameters in the shapes and the order of PyTorch's.

    Args:
        tree: kernels ``[in, out]`` or ``[h, w, in, out]``, and biases.
        network: the network.
        several: whether every leaf has a leading axis; it becomes the last.

    Returns:
        Weights ``[out, in]`` or ``[out, in, h, w]`` and biases, layer by layer.
    """
    arrays = []
    for layer in network.layers:
        for part in ("kernel", "bias"):
            x = np.asarray(tree[layer.name][part])
            x = x if several else x[None]
            x = np.moveaxis(turned(x, layer) if part == "kernel" else x, 0, -1)
            arrays.append(np.array(x if several else x[..., 0], order="C"))
    return arrays


def turned(kernels: np.ndarray, layer: Layer) -> np.ndarray:
    """Kernels with a leading axis, output channels first, then input channels."""
    if kernels.ndim == 5:
        return kernels.transpose(0, 4, 3, 1, 2)
    if layer.image is None:
        return kernels.swapaxes(1, 2)
    count, size, width = kernels.shape
    images = kernels.reshape(count, *layer.image, width)
    return images.transpose(0, 4, 3, 1, 2).reshape(count, width, size)
