"""Networks on synthetic data, for measuring the time per step.

None has batch statistics, so that every optimiser sees a plain ``loss(params, batch)``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.models.networks import MLP, Autoencoder

BATCHES = 8


class LeNet5(nn.Module):
    """Two convolutions and three dense layers, for images ``[batch, 32, 32, 3]``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in (6, 16):
            x = nn.relu(nn.Conv(channels, (5, 5), padding="VALID")(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for width in (120, 84):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class ResNet8(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels, without normalisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            strides = (stride, stride)
            y = nn.relu(nn.Conv(channels, (3, 3), strides)(x))
            y = nn.Conv(channels, (3, 3))(y)
            if x.shape != y.shape:
                x = nn.Conv(channels, (1, 1), strides)(x)
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network with a loss and synthetic batches."""

    name: str  # name on the command line
    apply: Callable[[Any, jax.Array], jax.Array]  # ``(params, inputs) -> logits``
    params: Any  # initial parameters
    batches: list[tuple[jax.Array, jax.Array]]  # pairs of inputs and targets
    # Whether the targets are the inputs, each a probability; else they are labels.
    bernoulli: bool

    def loss(self, mark: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable:
        """Returns the mean loss, as a function of parameters and batch."""

        def loss(params, batch):
            x, targets = batch
            logits = mark(self.apply(params, x), targets)
            if self.bernoulli:
                terms = optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
            else:
                terms = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return terms.mean()

        return loss

    def plain_loss(self) -> Callable:
        """The loss as it is, for first-order optimisers."""
        return self.loss(lambda logits, targets: logits)

    def marked_loss(self) -> Callable:
        """The loss with the output marked for kfac_jax_lite."""
        mark = kfac.bernoulli if self.bernoulli else kfac.categorical
        return self.loss(lambda logits, targets: mark(logits))

    def peer_loss(self, kfac_jax: Any) -> Callable:
        """The loss with the output registered for kfac-jax."""

        def mark(logits, targets):
            if self.bernoulli:
                kfac_jax.register_sigmoid_cross_entropy_loss(logits, targets)
            else:
                kfac_jax.register_softmax_cross_entropy_loss(logits, targets)
            return logits

        return self.loss(mark)


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to build a problem."""

    module: Callable[[], nn.Module]  # makes the network
    shape: tuple[int, ...]  # shape of a batch of inputs
    bernoulli: bool = False  # see `Problem`


SPECS = {
    "mlp": Spec(lambda: MLP((1000, 1000), 10), (512, 784)),
    "autoencoder": Spec(lambda: Autoencoder((1000, 500, 250, 30)), (512, 784), True),
    "lenet5": Spec(LeNet5, (128, 32, 32, 3)),
    "resnet": Spec(ResNet8, (64, 32, 32, 3)),
}


def make_problem(name: str, spec: Spec | None = None) -> Problem:
    """Builds a problem with random images and labels."""
    spec = SPECS[name] if spec is None else spec
    module, rng = spec.module(), np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        x = jnp.asarray(rng.random(spec.shape), jnp.float32)
        labels = jnp.asarray(rng.integers(0, 10, spec.shape[0]), jnp.int32)
        batches.append((x, x if spec.bernoulli else labels))
    params = module.init(jax.random.key(0), batches[0][0])["params"]

    def apply(params: Any, x: jax.Array) -> Any:
        return module.apply({"params": params}, x)

    return Problem(name, apply, params, batches, spec.bernoulli)
