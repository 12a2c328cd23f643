"""Language models, as their papers describe them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class GPTBlock(nn.Module):
    """Pre-norm block of causal attention and a feed-forward part.

    Attributes:
        heads: of the attention.
    """

    heads: int

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
    """The block as the body of a scan.

    Attributes:
        heads: of the attention.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps ``[batch, time, width]`` to the same shape, and nothing to stack."""
        return GPTBlock(self.heads, name="block")(x), None


class GPT(nn.Module):
    """Causal transformer with learned positions; the output shares the embedding.

    Attributes:
        depth: number of blocks.
        width: features of a token.
        heads: of the attention.
        vocabulary: number of tokens.
        context: number of positions.
        scan: whether the blocks are one scan over stacked parameters.
        remat: whether the blocks are recomputed in the backward pass.

    References:
        Radford et al., 2019, "Language models are unsupervised multitask learners".
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    context: int = 1024
    scan: bool = False
    remat: bool = False

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

    Attributes:
        vocabulary: number of tokens.
        width: of the embedding and of every LSTM.
        depth: number of LSTMs.
        fused: whether the cell concatenates its kernels.

    References:
        Zaremba et al., 2014, "Recurrent neural network regularization",
        arXiv:1409.2329 (its medium size), without dropout.
    """

    vocabulary: int = 33278
    width: int = 650
    depth: int = 2
    fused: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``[batch, time]`` to logits of the next ones."""
        x: Any = nn.Embed(self.vocabulary, self.width, name="embedding")(tokens)
        cell = nn.OptimizedLSTMCell if self.fused else nn.LSTMCell
        for number in range(self.depth):
            lstm = nn.RNN(cell(self.width, name=f"cell_{number}"))
            x = lstm(x)
        return nn.Dense(self.vocabulary, name="head")(x)
