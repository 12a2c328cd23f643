"""Self-attention: fused, by each framework's module, grouped queries; adapters."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.networks import weight
from tests.zoo import oracle
from tests.zoo.embeddings import SHIFT, TiedTable
from tests.zoo.nets import everywhere, in_nnx, net
from tests.zoo.parts import Linear, Norm, Part, head, mean_pool

LENGTH, WIDTH, HEADS = 3, 4, 2
SEQUENCE = {"x_shape": (LENGTH, WIDTH)}


def mix(q, k, v):
    """Attention over ``[batch, length, heads, width]``; fewer heads of ``k``, ``v``."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def split_heads(x, heads):
    """``[batch, length, heads, width]``."""
    return x.reshape(*x.shape[:2], heads, -1)


# ---------------------------------------------------------------- architectures


def fused(parts, x):
    """One product for queries, keys and values."""
    q, k, v = (split_heads(z, HEADS) for z in jnp.split(parts["qkv"](x), 3, -1))
    mixed = mix(q, k, v).reshape(x.shape)
    return parts["head"](mean_pool(jnp.tanh(parts["out"](mixed))))


def pooled(parts, x):
    """A layer over sequences, pooled."""
    return parts["head"](mean_pool(jnp.tanh(parts["layer"](x))))


def grouped(parts, x):
    """Four query heads over two heads of keys and values."""
    q, k, v = (parts[name](x) for name in ("query", "key", "value"))
    if q.ndim == 3:
        q, k, v = split_heads(q, 4), split_heads(k, 2), split_heads(v, 2)
        return parts["head"](mean_pool(jnp.tanh(mix(q, k, v).reshape(*x.shape[:2], 8))))
    return parts["head"](mean_pool(jnp.tanh(parts["out"](mix(q, k, v)))))


FROZEN = np.linspace(-1.0, 1.0, 12).reshape(4, 3)


def adapter(parts, x):
    """A frozen matrix and two small ones beside it, then a dense layer."""
    low_rank = parts["b"](parts["a"](x))
    return parts["head"](jnp.tanh(x @ jnp.asarray(FROZEN, x.dtype) + low_rank))


def causal(q, k, v):
    """Attention to what came before."""
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    past = np.tril(np.ones(scores.shape[1:], bool))
    return jax.nn.softmax(jnp.where(past, scores, -1e9)) @ v


def transformer(parts, ids):
    """One block in front of which is a norm, positions, one table at both ends."""
    x = parts["positions"](lambda p, x: x + p, parts["embed"](ids))
    q, k, v = jnp.split(parts["qkv"](parts["norm"](x)), 3, -1)
    x = x + parts["out"](causal(q, k, v))
    x = x + parts["down"](jax.nn.gelu(parts["up"](parts["norm_up"](x))))
    return parts["embed"](parts["norm_out"](x), out=True)


def transformers():
    """A small language model, all layer kinds in one."""
    parts = {
        "embed": TiedTable(5, WIDTH), "positions": SHIFT,
        "norm": Norm(WIDTH), "qkv": Linear(WIDTH, 3 * WIDTH),
        "out": Linear(WIDTH, WIDTH), "norm_up": Norm(WIDTH),
        "up": Linear(WIDTH, 6), "down": Linear(6, WIDTH), "norm_out": Norm(WIDTH),
    }  # fmt: skip
    return everywhere(
        "transformer", parts, transformer, frameworks=("jax", "linen", "equinox"),
        x_shape=(LENGTH,), vocab=5, outputs=5, terms=(LENGTH,),
    )  # fmt: skip


# ---------------------------------------------------------------- parts


@dataclasses.dataclass(frozen=True)
class General(Part):
    """Dense from several axes to several axes."""

    n_in: tuple[int, ...]
    n_out: tuple[int, ...]

    @property
    def axis(self):
        """The contracted axes, counted from the end."""
        return tuple(range(-len(self.n_in), 0))

    def plain(self, rng):
        return {
            "kernel": weight(rng, *self.n_in, *self.n_out),
            "bias": weight(rng, *self.n_out),
        }

    def apply(self, p, x):
        ins, outs = "ij"[: len(self.n_in)], "hk"[: len(self.n_out)]
        return jnp.einsum(f"bt{ins},{ins}{outs}->bt{outs}", x, p["kernel"]) + p["bias"]

    def linen(self, scope, name):
        del scope
        return nn.DenseGeneral(self.n_out, axis=self.axis, name=name)

    def nnx(self, rngs):
        return nnx.LinearGeneral(self.n_in, self.n_out, axis=self.axis, rngs=rngs)

    def spec(self):
        return oracle.Dense(in_axes=len(self.n_in), out_axes=len(self.n_out))

    def reference(self, r, name, x):
        return r.dense(name, x, len(self.n_in))


@dataclasses.dataclass(frozen=True)
class Attention(Part):
    """Multi-head self-attention as each framework's own module."""

    names = {
        "jax": ("query", "key", "value", "out"),
        "linen": ("query", "key", "value", "out"),
        "nnx": ("query", "key", "value", "out"),
        "equinox": ("query_proj", "key_proj", "value_proj", "output_proj"),
        "haiku": ("query", "key", "value", "linear"),
    }

    def plain(self, rng):
        into, out = General((WIDTH,), (HEADS, 2)), General((HEADS, 2), (WIDTH,))
        parts = (into, into, into, out)
        names = self.names["jax"]
        return {n: part.plain(rng) for n, part in zip(names, parts, strict=True)}

    def apply(self, p, x):
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", x, p[n]["kernel"]) + p[n]["bias"]
            for n in ("query", "key", "value")
        )
        z = jnp.einsum("bthk,hkd->btd", mix(q, k, v), p["out"]["kernel"])
        return z + p["out"]["bias"]

    def linen(self, scope, name):
        del scope
        return nn.MultiHeadDotProductAttention(HEADS, name=name)

    def nnx(self, rngs):
        # NNX's own attention function takes its softmax in float32.
        return nnx.MultiHeadAttention(
            HEADS, WIDTH, WIDTH, decode=False, rngs=rngs,
            attention_fn=lambda q, k, v, **_: mix(q, k, v),
        )  # fmt: skip

    def equinox(self, key):
        biases = ("query", "key", "value", "output")
        options = {f"use_{name}_bias": True for name in biases}
        return eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key, **options)

    def haiku(self, name):
        init = hk.initializers.VarianceScaling()
        return hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init, name=name)

    def bind(self, framework, module):
        if framework == "equinox":
            return jax.vmap(lambda x: module(x, x, x))
        if framework == "haiku":
            return lambda x: module(x, x, x)
        return module

    def specs(self, framework, name):
        whole = framework in ("jax", "linen", "nnx")
        into = oracle.Dense(out_axes=2 if whole else 1)
        out = oracle.Dense(in_axes=2 if whole else 1)
        *first, last = (f"{name}/{n}" for n in self.names[framework])
        return dict.fromkeys(first, into) | {last: out}

    def reference(self, r, name, x):
        known = (
            names for names in self.names.values()
            if r.kernel(f"{name}/{names[0]}") is not None
            and r.kernel(f"{name}/{names[-1]}") is not None
        )  # fmt: skip
        *first, last = next(known)
        q, k, v = (
            split_heads(r.dense(f"{name}/{n}", x).reshape(*x.shape[:2], -1), HEADS)
            for n in first
        )
        mixed = mix(q, k, v)
        if r.kernel(f"{name}/{last}").ndim == 2:
            return r.dense(f"{name}/{last}", mixed.reshape(*x.shape[:2], -1))
        return r.dense(f"{name}/{last}", mixed, 2)


# ---------------------------------------------------------------- adapters


def low_rank(r, a, b, x, base):
    """``x W + x A B`` with ``W`` frozen."""
    h = r.hook(a, x, x @ r.leaves[a])
    return base(x) + r.hook(b, h, h @ r.leaves[b])


class Adapter(Part):
    """``nnx.LoRA`` around a frozen ``nnx.Linear``."""

    def nnx(self, rngs):
        base = nnx.Linear(4, 3, rngs=rngs)
        return nnx.LoRA(4, 2, 3, base_module=base, rngs=rngs)


def nnx_adapter():
    """``nnx.LoRA``, of which only the ``LoRAParam`` are parameters."""
    body = lambda parts, x: parts["lora"](x)  # noqa: E731
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))  # the first that the module makes too
    names = ("lora/lora_a", "lora/lora_b")
    return net(
        "adapter_module-nnx",
        lambda: in_nnx({"lora": Adapter()}, body, None, nnx.LoRAParam),
        lambda r, x: low_rank(r, *names, x, base),
        dict.fromkeys(names, oracle.Dense(False)),
    )  # fmt: skip


def equinox_adapter():
    """A filter of the user's that leaves the base out of the parameters."""

    class Lora(eqx.Module):
        base: eqx.nn.Linear
        a: jax.Array
        b: jax.Array

        def __call__(self, x):
            return self.base(x) + x @ self.a @ self.b

    key = jax.random.key(0)

    def make():
        a, b = jax.random.normal(key, (4, 2)), jax.random.normal(key, (2, 3))
        model = Lora(eqx.nn.Linear(4, 3, key=key), a, b)
        wanted = jax.tree.map(lambda _: False, model)
        wanted = eqx.tree_at(lambda m: (m.a, m.b), wanted, (True, True))
        params, frozen = eqx.partition(model, wanted)
        return params, lambda p, x: jax.vmap(eqx.combine(p, frozen))(x)

    return net(
        "adapter_module-equinox", make,
        lambda r, x: low_rank(
            r, "a", "b", x, jax.vmap(eqx.nn.Linear(4, 3, key=key))
        ),
        dict.fromkeys(("a", "b"), oracle.Dense(False)),
    )  # fmt: skip


def nets():
    """Every network of this family."""
    qkv = {"qkv": Linear(4, 12), "out": Linear(4, 4, False), **head(4)}
    by_head = {
        "query": General((4,), (4, 2)), "key": General((4,), (2, 2)),
        "value": General((4,), (2, 2)), "out": General((4, 2), (4,)),
    }  # fmt: skip
    flat = {"query": Linear(4, 8), "key": Linear(4, 4), "value": Linear(4, 4)}
    general = {"layer": General((2, 2), (3, 2)), **head(2)}
    three = ("jax", "linen", "nnx")
    small = {"a": Linear(4, 2, False), "b": Linear(2, 3, False), **head(3)}
    return [
        *everywhere("fused_qkv", qkv, fused, **SEQUENCE),
        *everywhere("attention", {"layer": Attention(), **head(4)}, pooled, **SEQUENCE),
        *everywhere("grouped_query_flat", flat | head(8), grouped, **SEQUENCE),
        *everywhere(
            "grouped_query", by_head | head(4), grouped, frameworks=three, **SEQUENCE
        ),
        *everywhere(
            "dense_general", general, pooled, frameworks=three, x_shape=(3, 2, 2)
        ),
        *transformers(),
        *everywhere("adapter", small, adapter),
        nnx_adapter(),
        equinox_adapter(),
    ]  # fmt: skip
