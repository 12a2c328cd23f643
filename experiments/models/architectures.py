"""Full-size architectures of the literature, with a standard loss, as shapes only."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.networks import SPECS


class Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions; the 3×3 one has the stride."""

    channels: int  # of the two first convolutions; the block has four times as many
    stride: int  # of the block

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


class ImageNetResNet(nn.Module):
    """Residual network with bottleneck blocks and batch normalisation.

    References:
        He et al., 2016, "Deep residual learning for image recognition",
        arXiv:1512.03385; the stride as in Goyal et al., 2017, arXiv:1706.02677.
    """

    blocks: tuple[int, ...]  # number of blocks of each stage
    width: int = 64  # channels of the first stage
    classes: int = 1000  # number of classes

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
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
    """Two dense layers with a GELU between them."""

    hidden: int  # width between the layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., features]`` to the same shape."""
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(x)))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    heads: int  # of the attention
    hidden: int  # width of the feed-forward part

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, features]`` to the same shape."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        return x + MLPBlock(self.hidden)(nn.LayerNorm()(x))


class ViT(nn.Module):
    """Vision transformer with a class token and learned positions.

    References:
        Dosovitskiy et al., 2021, arXiv:2010.11929.
    """

    depth: int = 12  # number of blocks
    width: int = 768  # features of a token
    heads: int = 12  # of the attention
    hidden: int = 3072  # width of the feed-forward part
    patch: int = 16  # side of a patch
    classes: int = 1000  # number of classes

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
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
    """Mixes tokens, then channels."""

    tokens_hidden: int  # width of the mixing of tokens
    channels_hidden: int  # width of the mixing of channels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, channels]`` to the same shape."""
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(MLPBlock(self.tokens_hidden)(y), 1, 2)
        return x + MLPBlock(self.channels_hidden)(nn.LayerNorm()(x))


class Mixer(nn.Module):
    """MLP-Mixer.

    References:
        Tolstikhin et al., 2021, arXiv:2105.01601.
    """

    depth: int = 12  # number of blocks
    width: int = 768  # channels
    tokens_hidden: int = 384  # width of the mixing of tokens
    channels_hidden: int = 3072  # width of the mixing of channels
    patch: int = 16  # side of a patch
    classes: int = 1000  # number of classes

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, padding="VALID", name="stem")(images)
        x = x.reshape(len(x), -1, self.width)
        for _ in range(self.depth):
            x = MixerBlock(self.tokens_hidden, self.channels_hidden)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


class GPTBlock(nn.Module):
    """Pre-norm block of causal attention and a feed-forward part."""

    heads: int  # of the attention

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, time, width]`` to the same shape."""
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, name="attention_in")(nn.LayerNorm(name="norm_1")(x))
        heads = (*x.shape[:-1], self.heads, width // self.heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.Dense(width, name="attention_out")(mixed.reshape(x.shape))
        y = nn.Dense(4 * width, name="hidden")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(width, name="out")(nn.gelu(y))


class ScannedBlock(nn.Module):
    """The block as the body of a scan."""

    heads: int  # of the attention

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps ``[batch, time, width]`` to the same shape, and nothing to stack."""
        return GPTBlock(self.heads, name="block")(x), None


class GPT(nn.Module):
    """Causal transformer with learned positions; the output shares the embedding.

    References:
        Radford et al., 2019, "Language models are unsupervised multitask learners".
    """

    depth: int = 12  # number of blocks
    width: int = 768  # features of a token
    heads: int = 12  # of the attention
    vocabulary: int = 50257  # number of tokens
    context: int = 1024  # number of positions
    scan: bool = False  # whether the blocks are one scan over stacked parameters
    remat: bool = False  # whether the blocks are recomputed in the backward pass

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``[batch, time]`` to logits of the next ones."""
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        places = nn.Embed(self.context, self.width, name="positions")
        x = embed(tokens) + places(jnp.arange(tokens.shape[1]))
        if self.scan:
            body = nn.remat(ScannedBlock) if self.remat else ScannedBlock
            layers = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = layers(self.heads, name="blocks")(x, None)
        else:
            block = nn.remat(GPTBlock) if self.remat else GPTBlock
            for number in range(self.depth):
                x = block(self.heads, name=f"block_{number}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked LSTMs, and an output layer of its own.

    References:
        Zaremba et al., 2014, "Recurrent neural network regularization",
        arXiv:1409.2329 (its medium size), without dropout.
    """

    vocabulary: int = 33278  # number of tokens
    width: int = 650  # of the embedding and of every LSTM
    depth: int = 2  # number of LSTMs
    fused: bool = True  # whether the cell concatenates its kernels

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``[batch, time]`` to logits of the next ones."""
        x: Any = nn.Embed(self.vocabulary, self.width, name="embedding")(tokens)
        cell = nn.OptimizedLSTMCell if self.fused else nn.LSTMCell
        for number in range(self.depth):
            lstm = nn.RNN(cell(self.width, name=f"cell_{number}"))
            x = lstm(x)
        return nn.Dense(self.vocabulary, name="head")(x)


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and the shapes of everything it takes."""

    # ``(params, *args) -> loss`` or ``(loss, aux)``; the output is marked.
    loss: Callable[..., Any]
    params: Any  # parameters, as shapes
    args: tuple[Any, ...]  # further arguments, as shapes
    has_aux: bool = False  # whether the loss returns more than its value

    @property
    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits ``[..., classes]``, which are marked."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        kfac.categorical(logits), labels
    )
    return losses.mean()


def shapes_of(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The variables of a Linen module, as shapes."""
    return dict(jax.eval_shape(model.init, jax.random.key(0), inputs))


def classifier(model: nn.Module, shape: Shape) -> Problem:
    """An image classifier without state.

    Args:
        model: maps images to logits.
        shape: of the images, ``[batch, height, width, channels]``.
    """

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return cross_entropy(logits, labels)

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return Problem(loss, shapes_of(model, images)["params"], (images, labels))


def normalised_classifier(model: nn.Module, shape: Shape) -> Problem:
    """An image classifier with running batch statistics.

    Args:
        model: maps images to logits and updates the collection ``batch_stats``.
        shape: of the images, ``[batch, height, width, channels]``.
    """

    def loss(params: Any, averages: Any, images: jax.Array, labels: jax.Array):
        logits, new = model.apply(
            {"params": params, "batch_stats": averages}, images, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels), new["batch_stats"]

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    variables = shapes_of(model, images)
    args = variables["batch_stats"], images, labels
    return Problem(loss, variables["params"], args, has_aux=True)


def autoencoder(model: nn.Module, shape: Shape) -> Problem:
    """A model of its own inputs, each a probability.

    Args:
        model: maps inputs to logits.
        shape: of the inputs, ``[batch, entries]``.
    """

    def loss(params: Any, inputs: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, inputs)
        terms = optax.sigmoid_binary_cross_entropy(kfac.bernoulli(logits), inputs)
        return terms.sum(-1).mean()

    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Problem(loss, shapes_of(model, inputs)["params"], (inputs,))


def language_model(model: nn.Module, shape: Shape) -> Problem:
    """A model of the next token.

    Args:
        model: maps tokens to logits.
        shape: of the tokens, ``[batch, time]``.
    """

    def loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens)
        return cross_entropy(logits, targets)

    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return Problem(loss, shapes_of(model, tokens)["params"], (tokens, tokens))


__all__ = ["ARCHITECTURES", "SMALL", "Architecture", "Problem"]

IMAGES = (32, 224, 224, 3)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An entry of the catalogue."""

    title: str  # what tables call it
    model: Callable[[], nn.Module]  # makes the network
    problem: Callable[[nn.Module, Shape], Problem]  # makes its loss and its shapes
    shape: Shape  # of its inputs
    wanted: float = 0.99  # least share of the parameters that must be under blocks

    def make(self) -> Problem:
        return self.problem(self.model(), self.shape)

    @property
    def rows(self) -> int:
        """``N``: the number of terms of the mean loss."""
        images = self.problem is not language_model
        return self.shape[0] if images else math.prod(self.shape)


ARCHITECTURES: dict[str, Architecture] = {
    "resnet50": Architecture(
        "ResNet-50", lambda: ImageNetResNet((3, 4, 6, 3)), normalised_classifier, IMAGES
    ),
    "resnet152": Architecture(
        "ResNet-152",
        lambda: ImageNetResNet((3, 8, 36, 3)),
        normalised_classifier,
        IMAGES,
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
