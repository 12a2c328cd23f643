"""Convolutions: transposed, separable, with gates, with batch norm and its state."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.zoo import oracle
from tests.zoo.nets import Reference, everywhere, net, zoo_net
from tests.zoo.parts import Convolution, Linear, head, mean_pool

IMAGE = {"x_shape": (3, 3, 2)}
EPSILON = 1e-3


def upsampled(parts, x):
    """A transposed convolution."""
    return parts["head"](mean_pool(jnp.tanh(parts["up"](x))))


def separable(parts, x):
    """A convolution per channel, then one across channels."""
    return parts["head"](mean_pool(jnp.tanh(parts["across"](parts["channels"](x)))))


def squeeze_excite(parts, x):
    """Channels weighted by a gate that sees their means."""
    z = jnp.tanh(parts["conv"](x))
    gate = jax.nn.sigmoid(parts["excite"](jax.nn.relu(parts["squeeze"](mean_pool(z)))))
    return parts["head"](mean_pool(z * gate[:, None, None]))


# ---------------------------------------------------------------- batch norm


CONV, HEAD = Convolution(2, 2, bias=False), Linear(2, 3)
FIRST = {"mean": np.zeros(2), "var": np.ones(2)}  # running averages before the step


def last(z):
    """What stands behind the norm, all in one."""
    return mean_pool(jnp.tanh(z))


def in_jax():
    """By hand, the new running averages as the auxiliary output."""
    rng = np.random.default_rng(0)
    params = {
        "conv": CONV.plain(rng),
        "norm": {"scale": np.ones(2), "bias": np.zeros(2)},
        "head": HEAD.plain(rng),
    }

    def apply(p, x):
        z = CONV.apply(p["conv"], x)
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        z = (z - mean) * jax.lax.rsqrt(var + EPSILON)
        z = z * p["norm"]["scale"] + p["norm"]["bias"]
        aux = {"mean": 0.9 * FIRST["mean"] + 0.1 * mean, "var": 0.9 + 0.1 * var}
        return HEAD.apply(p["head"], last(z)), aux

    return params, apply


def in_linen():
    """``nn.BatchNorm`` and its mutable collection."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = CONV.linen(self, "conv")(x)
            norm = nn.BatchNorm(False, epsilon=EPSILON, momentum=0.9, name="norm")
            return HEAD.linen(self, "head")(last(norm(z)))

    module = Body()
    variables = module.init(jax.random.key(0), jnp.zeros((2, *IMAGE["x_shape"])))
    stats = {"batch_stats": variables["batch_stats"]}

    def apply(p, x):
        return module.apply({"params": p, **stats}, x, mutable=["batch_stats"])

    return variables["params"], apply


def in_nnx():
    """``nnx.BatchNorm``, the updated state read off the merged module."""

    class Body(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.head = CONV.nnx(rngs), HEAD.nnx(rngs)
            self.norm = nnx.BatchNorm(2, epsilon=EPSILON, momentum=0.9, rngs=rngs)

        def __call__(self, x):
            return self.head(last(self.norm(self.conv(x))))

    graph, params, stats, rest = nnx.split(
        Body(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...
    )
    stats = jax.tree.map(lambda v: v.astype(jnp.float64), stats)

    def apply(p, x):
        model = nnx.merge(graph, p, stats, rest, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    return params, apply


class EquinoxBody(eqx.Module):
    """A convolution and a stateful norm."""

    conv: Any
    norm: eqx.nn.BatchNorm
    head: Any

    def __init__(self, key):
        self.conv, self.head = CONV.equinox(key), HEAD.equinox(key)
        self.norm = eqx.nn.BatchNorm(
            2, "batch", eps=EPSILON, momentum=0.9, mode="batch", dtype=jnp.float64
        )

    def __call__(self, x, state):
        z, state = self.norm(self.conv(x.transpose(2, 0, 1)), state)
        return self.head(jnp.tanh(z).mean((1, 2))), state


def in_equinox():
    """``eqx.nn.BatchNorm`` under ``vmap`` with a named axis."""
    model, state = eqx.nn.make_with_state(EquinoxBody)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(p, x):
        run = jax.vmap(eqx.combine(p, static), (0, None), (0, None), axis_name="batch")
        return run(x, state)

    return params, apply


def in_haiku():
    """``hk.BatchNorm`` under ``transform_with_state``."""

    def run(x):
        norm = hk.BatchNorm(True, True, 0.9, eps=EPSILON, name="norm")
        z = norm(CONV.haiku("conv")(x), is_training=True)
        return HEAD.haiku("head")(last(z))

    transformed = hk.without_apply_rng(hk.transform_with_state(run))
    params, state = transformed.init(
        jax.random.key(0), jnp.zeros((2, *IMAGE["x_shape"]))
    )
    return params, lambda p, x: transformed.apply(p, state, x)


def normed(r: Reference, x):
    """The reference of all five."""
    z = CONV.reference(r, "conv", x)
    x_hat = (z - z.mean((0, 1, 2))) / jnp.sqrt(z.var((0, 1, 2)) + EPSILON)
    scale, shift = r.find("norm", "scale", "weight"), r.find("norm", "bias", "offset")
    z = x_hat * jnp.reshape(scale, -1) + jnp.reshape(shift, -1)
    z = r.hook("norm", x_hat, z)
    return HEAD.reference(r, "head", last(z))


def batch_norms():
    """Convolution and batch norm with ``has_aux``."""
    layers = {"conv": CONV.spec(), "norm": oracle.ScaleShift(), "head": HEAD.spec()}
    makers = {
        "jax": in_jax, "linen": in_linen, "nnx": in_nnx, "equinox": in_equinox,
        "haiku": in_haiku,
    }  # fmt: skip
    return [
        net(f"conv_batch_norm-{f}", make, normed, layers, aux=True, **IMAGE)
        for f, make in makers.items()
    ]


def transposed(name, up):
    """A transposed convolution; Haiku keeps the outputs in front of the inputs."""

    def canonical(p):
        w = jnp.swapaxes(p["up/w"], -1, -2).reshape(-1, up.n_out)
        return jnp.concatenate([w, p["up/b"][None]])[None]

    parts = {"up": up, **head(up.n_out)}
    others = ("jax", "linen", "nnx", "equinox")
    return [
        *everywhere(name, parts, upsampled, frameworks=others, **IMAGE),
        zoo_net(name, "haiku", parts, upsampled, canonical={"up": canonical}, **IMAGE),
    ]


def nets():
    """Every network of this family."""
    up = Convolution(2, 3, (2, 2), (2, 2), transposed=True)
    overlapping = Convolution(2, 3, (3, 2), (2, 1), transposed=True)
    whole = Convolution(2, 3, (1, 1), padding=0)
    channels = dataclasses.replace(CONV, groups=2)
    gated = {
        "conv": Convolution(2, 4), "squeeze": Linear(4, 2), "excite": Linear(2, 4),
    }  # fmt: skip
    return [
        *transposed("conv_transpose", up),
        *transposed("conv_transpose_overlap", overlapping),
        *everywhere(
            "separable", {"channels": channels, "across": whole, **head(3)}, separable,
            **IMAGE,
        ),
        *everywhere("squeeze_excite", gated | head(4), squeeze_excite, **IMAGE),
        *batch_norms(),
    ]  # fmt: skip
