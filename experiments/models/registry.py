"""From the name of a model to its task."""

from typing import Any

import flax.linen as nn
import jax

from experiments.configs import NetConfig
from experiments.configs.checks import check_choice
from experiments.configs.train import MODELS, TEXTS
from experiments.datasets import Dataset, TextDataset
from experiments.errors import ConfigError
from experiments.models import networks
from experiments.models.nnxmlp import nnx_task
from experiments.models.task import Task, classifier, language_model, reconstruction
from experiments.models.transformer import Transformer

LENET_SMALLEST = 12


def make_task(model: str, net: NetConfig, data: Dataset | TextDataset) -> Task:
    """Builds the task of a model on a data set."""
    check_choice("model", model, MODELS)
    if isinstance(data, TextDataset):
        if model != "lm":
            raise ConfigError(
                f"{model} wants images; {data.title} is a text. Use --model lm."
            )
        return language_model(*linen_functions(transformer(net, data)), data)
    if model == "lm":
        raise ConfigError(
            f"lm wants a text; {data.title} has images. Use --dataset "
            f"{' or '.join(TEXTS)}."
        )
    if model == "lenet5" and min(data.image_shape[:2]) < LENET_SMALLEST:
        height, width, _ = data.image_shape
        raise ConfigError(
            f"lenet5 wants images of at least {LENET_SMALLEST} x {LENET_SMALLEST} "
            f"pixels; {data.title} has {height} x {width}. Use --model mlp or resnet."
        )
    if model == "mlp_nnx":
        return nnx_task(net.hidden, data)
    functions = linen_functions(linen_module(model, net, data))
    if model == "autoencoder":
        return reconstruction(*functions, data)
    return classifier(*functions, data)


def linen_module(model: str, net: NetConfig, data: Dataset | TextDataset) -> nn.Module:
    """The network of a model, before any task is made of it."""
    if isinstance(data, TextDataset):
        return transformer(net, data)
    modules: dict[str, nn.Module] = {
        "autoencoder": networks.Autoencoder(net.code),
        "mlp": networks.MLP(net.hidden, data.num_classes),
        "lenet5": networks.LeNet5(data.num_classes),
        "resnet": networks.ResNet(net.blocks, net.width, data.num_classes),
    }
    return modules[model]


def transformer(net: NetConfig, data: TextDataset) -> Transformer:
    """Returns the language model of the given sizes for a text."""
    return Transformer(
        vocabulary=len(data.vocabulary),
        context=data.context,
        layers=net.layers,
        heads=net.heads,
        width=net.features,
    )


def linen_functions(module: nn.Module):
    """Returns the pure functions `init` and `apply` of a Linen module."""

    def init(key: jax.Array, inputs: jax.Array) -> tuple[Any, Any]:
        variables = dict(module.init(key, inputs))
        return variables.pop("params"), variables

    def apply(params: Any, model_state: Any, inputs: jax.Array, train: bool) -> Any:
        variables = {"params": params, **model_state}
        if not train or not model_state:
            return module.apply(variables, inputs, train=train), model_state
        mutable = list(model_state)
        return module.apply(variables, inputs, train=train, mutable=mutable)

    return init, apply
