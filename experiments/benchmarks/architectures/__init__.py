"""Full-size architectures of the literature, with a standard loss, as shapes only."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn

from experiments.benchmarks.architectures.language import GPT, LSTMLanguageModel
from experiments.benchmarks.architectures.problem import (
    Problem,
    Shape,
    autoencoder,
    classifier,
    language_model,
    normalised_classifier,
)
from experiments.benchmarks.architectures.vision import Mixer, ResNet, ViT
from experiments.benchmarks.networks import SPECS

__all__ = ["ARCHITECTURES", "SMALL", "Architecture", "Problem"]

IMAGES = (32, 224, 224, 3)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An entry of the catalogue.

    Attributes:
        title: what tables call it.
        model: makes the network.
        problem: makes its loss and its shapes.
        shape: of its inputs.
        wanted: least share of the parameters that must be under blocks.
    """

    title: str
    model: Callable[[], nn.Module]
    problem: Callable[[nn.Module, Shape], Problem]
    shape: Shape
    wanted: float = 0.99

    def make(self) -> Problem:
        """Makes the loss and its shapes."""
        return self.problem(self.model(), self.shape)

    @property
    def rows(self) -> int:
        """``N``: the number of terms of the mean loss."""
        images = self.problem is not language_model
        return self.shape[0] if images else math.prod(self.shape)


ARCHITECTURES: dict[str, Architecture] = {
    "resnet50": Architecture(
        "ResNet-50", lambda: ResNet((3, 4, 6, 3)), normalised_classifier, IMAGES
    ),
    "resnet152": Architecture(
        "ResNet-152", lambda: ResNet((3, 8, 36, 3)), normalised_classifier, IMAGES
    ),
    "vit_b16": Architecture("ViT-B/16", ViT, classifier, IMAGES),
    "mixer_b16": Architecture("MLP-Mixer B/16", Mixer, classifier, IMAGES),
    "gpt2_small": Architecture("GPT-2 small", GPT, language_model, (8, 1024)),
    "gpt2_small_scan": Architecture(
        "GPT-2 small, scanned", lambda: GPT(scan=True), language_model, (8, 1024)
    ),
    "gpt2_xl": Architecture(
        "GPT-2 XL, 48 layers",
        lambda: GPT(depth=48, width=1600, heads=25),
        language_model,
        (8, 1024),
    ),
    "gpt2_xl_scan": Architecture(
        "GPT-2 XL, scanned, recomputed",
        lambda: GPT(depth=48, width=1600, heads=25, scan=True, remat=True),
        language_model,
        (8, 1024),
    ),
    "lstm": Architecture(
        "LSTM language model", LSTMLanguageModel, language_model, (20, 35)
    ),
}

# The networks of the step times.
SMALL: dict[str, Architecture] = {
    name: Architecture(
        name, spec.module, autoencoder if spec.bernoulli else classifier, spec.shape
    )
    for name, spec in SPECS.items()
}
