"""What wraps layers: dropout, rematerialisation, derivatives of one's own, bfloat16."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tests.zoo import oracle
from tests.zoo.nets import everywhere
from tests.zoo.parts import Bare, Linear, Part, head

POLICIES = jax.checkpoint_policies
HALF = jnp.bfloat16


# ---------------------------------------------------------------- dropout


class Dropout(Part):
    """Half of the entries kept, with the key of the batch."""

    def plain(self, rng):
        del rng
        return {}

    def apply(self, p, x, key):
        del p
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0)

    def linen(self, scope, name):
        del scope
        module = nn.Dropout(0.5, deterministic=False, name=name)
        return lambda x, key: module(x, rng=key)

    def nnx(self, rngs):
        del rngs
        return nnx.Dropout(0.5, deterministic=False)

    def equinox(self, key):
        del key
        return eqx.nn.Dropout(0.5)

    def haiku(self, name):
        del name
        return lambda x, key: hk.dropout(key, 0.5, x)

    def bind(self, framework, module):
        if framework == "nnx":
            return lambda x, key: module(x, rngs=key)
        if framework == "equinox":
            return lambda x, key: module(x, key=key)
        return module

    def specs(self, framework, name):
        del framework, name
        return {}

    def reference(self, r, name, x, key):
        del r, name
        kept = jax.random.uniform(key, x.shape) < 0.5
        return 2 * kept * x


def dropped(parts, batch):
    """Dropout between two dense layers."""
    x, key = batch
    return parts["head"](parts["drop"](jnp.tanh(parts["hidden"](x)), key))


# ---------------------------------------------------------------- rematerialisation


@dataclasses.dataclass(frozen=True)
class Remat(Linear):
    """A dense layer recomputed in the backward pass, by a policy."""

    policy: Any = None

    def apply(self, p, x):
        return jax.checkpoint(super().apply, policy=self.policy)(p, x)

    def linen(self, scope, name):
        del scope
        module = nn.remat(nn.Dense, policy=self.policy)
        return module(self.n_out, self.bias, name=name)

    def bind(self, framework, module):
        if framework == "nnx":
            run = nnx.remat(lambda module, x: module(x), policy=self.policy)
            return lambda x: run(module, x)
        if framework == "equinox":
            return jax.vmap(eqx.filter_checkpoint(module, policy=self.policy))
        if framework == "haiku":
            return hk.remat(module, policy=self.policy)
        return module


def two_layers(parts, x):
    """Two dense layers."""
    return parts["head"](jnp.tanh(parts["hidden"](x)))


@dataclasses.dataclass(frozen=True)
class Block(Part):
    """Two dense layers in one checkpoint that keeps a value by its name."""

    inner = {"first": Linear(4, 3), "second": Linear(3, 3, bias=False)}

    def plain(self, rng):
        return {n: part.plain(rng) for n, part in self.inner.items()}

    def apply(self, p, x):
        def block(p, x):
            h = jnp.tanh(self.inner["first"].apply(p["first"], x))
            h = checkpoint_name(h, "kept")
            return jnp.tanh(self.inner["second"].apply(p["second"], h))

        policy = POLICIES.save_only_these_names("kept")
        return jax.checkpoint(block, policy=policy)(p, x)

    def specs(self, framework, name):
        del framework
        return {f"{name}/{n}": part.spec() for n, part in self.inner.items()}

    def reference(self, r, name, x):
        h = jnp.tanh(r.dense(f"{name}/first", x))
        return jnp.tanh(r.dense(f"{name}/second", h))


# ---------------------------------------------------------------- custom derivatives


@jax.custom_vjp
def quantised(w, x):
    """A product with a rounded weight and a straight-through derivative."""
    return x @ (jnp.round(4 * w) / 4)


def quantised_forward(w, x):
    """Keep both."""
    return quantised(w, x), (w, x)


def quantised_backward(kept, c):
    """As if the weight had not been rounded."""
    w, x = kept
    return x.T @ c, c @ w.T


quantised.defvjp(quantised_forward, quantised_backward)


@jax.custom_vjp
def product(w, x):
    """A product with its own, true derivative: a kernel by hand."""
    return x @ w


product.defvjp(
    lambda w, x: (product(w, x), (w, x)),
    lambda kept, c: (kept[1].T @ c, c @ kept[0].T),
)


def by_rule(rule):
    """A bare weight in a function with its own derivative, then a head."""

    def body(parts, x):
        return parts["head"](jnp.tanh(parts["kernel"](rule, x)))

    return body


# ---------------------------------------------------------------- half precision


@dataclasses.dataclass(frozen=True)
class Half(Linear):
    """A dense layer that computes in bfloat16 with float32 parameters."""

    def apply(self, p, x):
        cast = jax.tree.map(lambda w: w.astype(HALF), p)
        return super().apply(cast, x.astype(HALF))

    def linen(self, scope, name):
        del scope
        return nn.Dense(self.n_out, self.bias, dtype=HALF, name=name)

    def nnx(self, rngs):
        return nnx.Linear(self.n_in, self.n_out, dtype=HALF, rngs=rngs)

    def haiku(self, name):
        def cast(getter, value, context):
            del context
            return getter(value).astype(HALF)

        module = hk.Linear(self.n_out, name=name)

        def run(x):
            with hk.custom_getter(cast):
                return module(x.astype(HALF))

        return run

    def bind(self, framework, module):
        if framework != "equinox":
            return module
        cast = lambda w: w.astype(HALF) if eqx.is_array(w) else w  # noqa: E731
        run = jax.vmap(jax.tree.map(cast, module))
        return lambda x: run(x.astype(HALF))


def widened(parts, x):
    """Logits in float32, or wider in the reference."""
    z = parts["head"](jnp.tanh(parts["hidden"](x)))
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def half_nets():
    """Networks in bfloat16; their reference is in full precision."""
    parts = {"hidden": Half(4, 4), "head": Half(4, 3)}
    return everywhere("bfloat16", parts, widened)


def nets():
    """Every other network of this family."""
    drop = {"hidden": Linear(4, 4), "drop": Dropout(), **head(4)}
    everything, dots = Remat(4, 3), Remat(4, 3, policy=POLICIES.dots_saveable)
    hidden, shown = Bare((4, 3)), Bare((4, 3), oracle.Dense(False))
    return [
        *everywhere("dropout", drop, dropped, keyed=True),
        *everywhere("remat", {"hidden": everything, **head(3)}, two_layers),
        *everywhere("checkpoint_policy", {"hidden": dots, **head(3)}, two_layers),
        *everywhere(
            "checkpoint_name", {"hidden": Block(), **head(3)}, two_layers,
            frameworks=("jax",),
        ),
        *everywhere(
            "custom_vjp_hidden", {"kernel": hidden, **head(3)}, by_rule(quantised),
            diagonal=("kernel",),
        ),
        *everywhere(
            "custom_vjp_product", {"kernel": shown, **head(3)}, by_rule(product)
        ),
    ]  # fmt: skip
