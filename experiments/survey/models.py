"""The survey's ten networks, in flax Linen; all take any ``[n, h, w, c]``.

None has batch statistics, so that every loss is a mean over examples, and every
parameter is read by a layer with a rule of K-FAC's. Kernels and pools are clipped to
the image, so that a table, ``[n, 1, features, 1]``, is an image of one row.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

HEADS = 2
# Hidden layers of the deep networks.
DEEP = 4


class Dense(nn.Module):
    """Fully connected network."""

    widths: tuple[int, ...]  # of the hidden layers
    classes: int  # width of the output
    activation: Callable[[jax.Array], jax.Array] = nn.relu  # between layers
    norm: bool = False  # whether a layer norm comes before each activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.Dense(width)(x)
            x = nn.LayerNorm()(x) if self.norm else x
            x = self.activation(x)
        return nn.Dense(self.classes)(x)


def clipped(x: jax.Array, side: int) -> tuple[int, int]:
    """A window of ``side`` x ``side``, no larger than the images ``[n, h, w, c]``."""
    return min(side, x.shape[1]), min(side, x.shape[2])


def pool(x: jax.Array) -> jax.Array:
    """Means over windows of 2 x 2."""
    window = clipped(x, 2)
    return nn.avg_pool(x, window, strides=window)


class Conv(nn.Module):
    """Two convolutions with pools, and a dense layer."""

    width: int  # channels
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        for _ in range(2):
            x = pool(nn.relu(nn.Conv(self.width, clipped(x, 3))(x)))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


class LeNet(nn.Module):
    """LeNet-5's order of layers with narrower ones.

    References:
        LeCun, Bottou, Bengio & Haffner, 1998, Proc. IEEE 86(11), Fig. 2.
    """

    width: int  # channels of the second convolution
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        x = pool(nn.tanh(nn.Conv(max(1, self.width // 2), clipped(x, 5))(x)))
        x = nn.Conv(self.width, clipped(x, 5), padding="VALID")(x)
        x = pool(nn.tanh(x)).reshape(len(x), -1)
        for _ in range(2):
            x = nn.tanh(nn.Dense(2 * self.width)(x))
        return nn.Dense(self.classes)(x)


class Residual(nn.Module):
    """Residual convolutions with group norm, a mean over positions, a dense layer.

    References:
        He, Zhang, Ren & Sun, 2015, arXiv:1512.03385; Wu & He, 2018, arXiv:1803.08494
        (one group: all channels of an example).
    """

    width: int  # channels
    depth: int  # blocks of two convolutions
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        x = nn.relu(self.conv(x))
        for _ in range(self.depth):
            y = nn.relu(self.conv(x))
            x = nn.relu(x + self.conv(y))
            x = pool(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))

    def conv(self, x: jax.Array) -> jax.Array:
        """A convolution and its norm."""
        x = nn.Conv(self.width, clipped(x, 3), use_bias=False)(x)
        return nn.GroupNorm(num_groups=1)(x)


class Attention(nn.Module):
    """A transformer over the rows of an image, or over the features of a table.

    References:
        Vaswani et al., 2017, arXiv:1706.03762; Xiong et al., 2020, arXiv:2002.04745
        (the norm before each layer).
    """

    width: int  # features of a token
    depth: int  # layers
    classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[n, h, w, c]`` to logits ``[n, classes]``."""
        n, h, w, _ = x.shape
        x = x.reshape(n, h if h > 1 else w, -1)
        x = nn.Dense(self.width)(x) + positions(x.shape[1], self.width)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
            y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


def positions(length: int, width: int) -> np.ndarray:
    """Sines and cosines of the position, ``[length, width]``; not trained."""
    half = np.arange(width) // 2
    angle = np.arange(length)[:, None] / 100 ** (2 * half / width)
    wave = np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle))
    return wave.astype(np.float32)


def make_model(name: str, width: int, depth: int, classes: int) -> nn.Module:
    """Makes a network.

    Returns:
        The module, from ``[n, h, w, c]`` to logits ``[n, classes]``.
    """
    deep = (width,) * DEEP
    networks: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: Dense((), classes),
        "mlp": lambda: Dense((width,), classes),
        "deep_mlp": lambda: Dense(deep, classes),
        "tanh_mlp": lambda: Dense((width, width), classes, jnp.tanh),
        "deep_linear": lambda: Dense(deep, classes, lambda x: x),
        "norm_mlp": lambda: Dense((width, width), classes, norm=True),
        "conv": lambda: Conv(width, classes),
        "lenet": lambda: LeNet(width, classes),
        "residual": lambda: Residual(width, depth, classes),
        "attention": lambda: Attention(width, depth, classes),
    }
    return networks[name]()
