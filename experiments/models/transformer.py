"""A small language model: the decoder of GPT, in flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
