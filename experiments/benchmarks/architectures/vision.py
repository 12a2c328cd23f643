"""Image classifiers, as their papers describe them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions; the 3×3 one has the stride.

    Attributes:
        channels: of the two first convolutions; the block has four times as many.
        stride: of the block.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to the same with new sizes."""
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9
        )
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.channels, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.channels, (3, 3), strides)(y)))
        y = conv(4 * self.channels, (1, 1))(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm(name="norm_proj")(
                conv(4 * self.channels, (1, 1), strides, name="conv_proj")(x)
            )
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Residual network with bottleneck blocks and batch normalisation.

    Attributes:
        blocks: number of blocks of each stage.
        width: channels of the first stage.
        classes: number of classes.

    References:
        He et al., 2016, "Deep residual learning for image recognition",
        arXiv:1512.03385; the stride as in Goyal et al., 2017, arXiv:1706.02677.
    """

    blocks: tuple[int, ...]
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Maps images to logits; in evaluation with the running averages."""
        norm = nn.BatchNorm(not train, momentum=0.9, name="norm_init")
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, name="conv_init")(x)
        x = norm(x)
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding="SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, stride)(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


class MLPBlock(nn.Module):
    """Two dense layers with a GELU between them.

    Attributes:
        hidden: width between the layers.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., features]`` to the same shape."""
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(x)))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block.

    Attributes:
        heads: of the attention.
        hidden: width of the feed-forward part.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, features]`` to the same shape."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        return x + MLPBlock(self.hidden)(nn.LayerNorm()(x))


class ViT(nn.Module):
    """Vision transformer with a class token and learned positions.

    Attributes:
        depth: number of blocks.
        width: features of a token.
        heads: of the attention.
        hidden: width of the feed-forward part.
        patch: side of a patch.
        classes: number of classes.

    References:
        Dosovitskiy et al., 2021, arXiv:2010.11929.
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        positions = nn.initializers.normal(0.02)
        x = x + self.param("positions", positions, (1, *x.shape[1:]))
        for _ in range(self.depth):
            x = EncoderBlock(self.heads, self.hidden)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x)[:, 0])


class MixerBlock(nn.Module):
    """Mixes tokens, then channels.

    Attributes:
        tokens_hidden: width of the mixing of tokens.
        channels_hidden: width of the mixing of channels.
    """

    tokens_hidden: int
    channels_hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, channels]`` to the same shape."""
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(MLPBlock(self.tokens_hidden)(y), 1, 2)
        return x + MLPBlock(self.channels_hidden)(nn.LayerNorm()(x))


class Mixer(nn.Module):
    """MLP-Mixer.

    Attributes:
        depth: number of blocks.
        width: channels.
        tokens_hidden: width of the mixing of tokens.
        channels_hidden: width of the mixing of channels.
        patch: side of a patch.
        classes: number of classes.

    References:
        Tolstikhin et al., 2021, arXiv:2105.01601.
    """

    depth: int = 12
    width: int = 768
    tokens_hidden: int = 384
    channels_hidden: int = 3072
    patch: int = 16
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="stem")(images)
        x = x.reshape(len(x), -1, self.width)
        for _ in range(self.depth):
            x = MixerBlock(self.tokens_hidden, self.channels_hidden)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))
