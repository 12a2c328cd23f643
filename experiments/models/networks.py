"""The networks, in flax Linen."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Fully connected network with rectified linear units."""

    hidden: Sequence[int]  # widths of the hidden layers
    num_classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``[batch, h, w, c]`` to logits ``[batch, classes]``."""
        del train
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class LeNet5(nn.Module):
    """Two convolutions, three dense layers, tanh and average pooling.

    References:
        LeCun, Bottou, Bengio & Haffner, 1998, Proc. IEEE 86(11), Fig. 2.
    """

    num_classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``[batch, h, w, c]`` to logits ``[batch, classes]``."""
        del train
        x = nn.tanh(nn.Conv(6, (5, 5))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.tanh(nn.Conv(16, (5, 5), padding="VALID")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        x = nn.tanh(nn.Dense(120)(x))
        x = nn.tanh(nn.Dense(84)(x))
        return nn.Dense(self.num_classes)(x)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to their input."""

    channels: int  # output channels
    stride: int  # stride of the first convolution

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps ``[batch, h, w, c]`` to ``[batch, h/stride, w/stride, channels]``."""
        strides = (self.stride, self.stride)
        y = nn.Conv(self.channels, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Residual network for small images; ``6 n + 2`` layers for blocks (n, n, n).

    References:
        He, Zhang, Ren & Sun, 2015, arXiv:1512.03385, Sec. 4.2; the shortcuts that
        change the shape are projections.
    """

    blocks: Sequence[int]  # residual blocks per stage
    width: int  # channels of the first stage, doubled at every stage
    num_classes: int  # width of the output

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``[batch, h, w, c]`` to logits ``[batch, classes]``."""
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(self.width * 2**stage, stride)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes)(x)


class Autoencoder(nn.Module):
    """Deep autoencoder: tanh, a linear code in the middle, logits as output.

    References:
        Hinton & Salakhutdinov, 2006, Science 313(5786); Martens & Grosse, 2015,
        arXiv:1503.05671, Sec. 13.
    """

    code: Sequence[int]  # widths from the first hidden layer down to the code

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps pixels ``[batch, pixels]`` to logits of the same shape."""
        del train
        widths = [*self.code, *reversed(self.code[:-1]), x.shape[-1]]
        linear = (len(self.code) - 1, len(widths) - 1)
        initial = nn.initializers.glorot_uniform()
        for index, width in enumerate(widths):
            x = nn.Dense(width, kernel_init=initial)(x)
            x = x if index in linear else nn.tanh(x)
        return x


class Attention(nn.Module):
    """Causal self-attention with several heads.

    References:
        Vaswani et al., 2017, arXiv:1706.03762, Sec. 3.2.
    """

    heads: int  # number of heads; it divides the width
    out_scale: float  # factor on the initial weights of the output projection

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, time, width]`` to the same shape, looking back only."""
        time, width = x.shape[-2:]
        shape = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(shape)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / shape[-1] ** 0.5
        past = jnp.tril(jnp.ones((time, time), bool))
        scores = jnp.where(past, scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhts,bshd->bthd", nn.softmax(scores), value)
        return residual_output(width, self.out_scale, "out")(mixed.reshape(x.shape))


def residual_output(width: int, scale: float, name: str) -> nn.Dense:
    """A dense layer whose output is added to the residual stream."""
    initial = nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    return nn.Dense(width, kernel_init=initial, name=name)


class Block(nn.Module):
    """Attention, then a network of two layers; each is added to its input."""

    heads: int  # number of attention heads
    out_scale: float  # factor on the initial weights of what is added

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, time, width]`` to the same shape."""
        width = x.shape[-1]
        attention = Attention(self.heads, self.out_scale, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_1")(x))
        y = nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + residual_output(width, self.out_scale, "down")(nn.gelu(y))


class Transformer(nn.Module):
    """Decoder with learned positions and layer norm before each part.

    The initial weights of what is added to the residual stream are smaller by the
    square root of the number of additions.

    References:
        Radford et al., 2019, "Language models are unsupervised multitask learners",
        Sec. 2.3.
    """

    vocabulary: int  # number of tokens
    context: int  # greatest number of positions
    layers: int  # number of blocks
    heads: int  # attention heads per block
    width: int  # width of the residual stream

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Maps tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``."""
        del train
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(tokens)
        initial = nn.initializers.normal(0.02)
        positions = self.param("positions", initial, (self.context, self.width))
        x = x + positions[: tokens.shape[-1]]
        scale = (2 * self.layers) ** -0.5
        for index in range(self.layers):
            x = Block(self.heads, scale, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.vocabulary, name="logits")(x)
