"""Parts that every framework has: dense, table, convolution, norm, bare parameter."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.networks import weight
from tests.zoo import oracle

F64 = jnp.float64


class Part:
    """A layer in every framework, and what the oracle says about it."""

    def bind(self, framework, module):
        """What the body calls."""
        del framework
        return module

    def layer_name(self, framework, name, parts):
        """The name that the library gives the layer."""
        del framework, parts
        return name

    def spec(self) -> Any:
        """What the oracle needs to know."""
        raise NotImplementedError

    def specs(self, framework, name):
        """Layers by name."""
        del framework
        return {name: self.spec()}


def over_rows(layer, rank=1):
    """An Equinox layer of single examples, mapped over all leading axes."""

    def run(x):
        mapped = layer
        for _ in range(x.ndim - rank):
            mapped = jax.vmap(mapped)
        return mapped(x)

    return run


@dataclasses.dataclass(frozen=True)
class Linear(Part):
    """``x W + b``."""

    n_in: int
    n_out: int
    bias: bool = True

    def plain(self, rng):
        p = {"kernel": weight(rng, self.n_in, self.n_out)}
        return p | ({"bias": weight(rng, self.n_out)} if self.bias else {})

    def apply(self, p, x):
        z = jnp.einsum("...i,io->...o", x, p["kernel"])
        return z + p["bias"] if self.bias else z

    def linen(self, scope, name):
        del scope
        return nn.Dense(self.n_out, self.bias, name=name)

    def nnx(self, rngs):
        return nnx.Linear(self.n_in, self.n_out, use_bias=self.bias, rngs=rngs)

    def equinox(self, key):
        return eqx.nn.Linear(self.n_in, self.n_out, self.bias, key=key)

    def haiku(self, name):
        return hk.Linear(self.n_out, self.bias, name=name)

    def bind(self, framework, module):
        return over_rows(module) if framework == "equinox" else module

    def spec(self):
        return oracle.Dense(self.bias)

    def reference(self, r, name, x):
        return r.dense(name, x)


class Lookup:
    """A table bound to a framework: rows of it, or products with all of it."""

    def __init__(self, take, table):
        """Two functions of no state."""
        self.take, self.table = take, table

    def __call__(self, ids):
        """Look up."""
        return self.take(ids)

    def attend(self, h):
        """``h @ table.T``."""
        return self.table(h)


@dataclasses.dataclass(frozen=True)
class Table(Part):
    """An embedding, looked up; ``tied``: used as output weights as well."""

    vocab: int
    width: int
    tied: bool = False
    one_hot: bool = False

    def plain(self, rng):
        return {"table": rng.normal(size=(self.vocab, self.width))}

    def apply(self, p, ids):
        return self.take(p["table"], ids)

    def take(self, table, ids):
        if self.one_hot:
            return jax.nn.one_hot(ids, self.vocab, dtype=table.dtype) @ table
        return table[ids]

    def linen(self, scope, name):
        del scope
        return nn.Embed(self.vocab, self.width, name=name)

    def nnx(self, rngs):
        return nnx.Embed(self.vocab, self.width, param_dtype=F64, rngs=rngs)

    def equinox(self, key):
        return eqx.nn.Embedding(self.vocab, self.width, key=key)

    def haiku(self, name):
        style = hk.EmbedLookupStyle
        style = style.ONE_HOT if self.one_hot else style.ARRAY_INDEX
        return hk.Embed(self.vocab, self.width, lookup_style=style, name=name)

    def bind(self, framework, module):
        if framework == "equinox":
            return Lookup(over_rows(module, 0), lambda h: h @ module.weight.T)
        if framework == "haiku":
            return Lookup(module, lambda h: h @ module.embeddings.T)
        return module

    def spec(self):
        return (oracle.Tied if self.tied else oracle.Embedding)(self.vocab)

    def reference(self, r, name, ids):
        table = r.find(name, "table", "embedding", "embeddings", "weight")
        onto = jnp.zeros((*ids.shape, self.vocab))
        rows = jnp.where(jnp.arange(self.vocab) == ids[..., None], 1.0, onto)
        return r.hook(name, ids, jnp.einsum("...v,vd->...d", rows, table))


@dataclasses.dataclass(frozen=True)
class Convolution(Part):
    """A two-dimensional convolution, channels last; ``transposed``: upsampling."""

    n_in: int
    n_out: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: int = 1
    groups: int = 1
    bias: bool = True
    transposed: bool = False

    @property
    def pads(self):
        """Padding of the (transposed: dilated) input."""
        pad = [(self.padding, self.padding)] * 2
        if self.transposed:  # what ``padding="VALID"`` of a transposed one means
            pad = [(k - 1, k - 1) for k in self.kernel]
        return tuple(pad)

    def plain(self, rng):
        p = {"kernel": weight(rng, *self.kernel, self.n_in // self.groups, self.n_out)}
        return p | ({"bias": weight(rng, self.n_out)} if self.bias else {})

    def apply(self, p, x):
        names = ("NHWC", "HWIO", "NHWC")
        if self.transposed:
            z = jax.lax.conv_transpose(
                x, p["kernel"], self.strides, "VALID", dimension_numbers=names
            )
        else:
            z = jax.lax.conv_general_dilated(
                x, p["kernel"], self.strides, self.pads,
                dimension_numbers=names, feature_group_count=self.groups,
            )  # fmt: skip
        return z + p["bias"] if self.bias else z

    def linen(self, scope, name):
        del scope
        common = {"use_bias": self.bias, "name": name, "strides": self.strides}
        if self.transposed:
            return nn.ConvTranspose(self.n_out, self.kernel, padding="VALID", **common)
        return nn.Conv(
            self.n_out, self.kernel, padding=self.pads,
            feature_group_count=self.groups, **common,
        )  # fmt: skip

    def nnx(self, rngs):
        sizes = (self.n_in, self.n_out, self.kernel)
        common = {"use_bias": self.bias, "strides": self.strides, "rngs": rngs}
        if self.transposed:
            return nnx.ConvTranspose(*sizes, padding="VALID", **common)
        return nnx.Conv(
            *sizes, padding=self.pads, feature_group_count=self.groups, **common
        )

    def equinox(self, key):
        sizes = (self.n_in, self.n_out, self.kernel, self.strides)
        common = {"use_bias": self.bias, "key": key, "groups": self.groups}
        if self.transposed:
            return eqx.nn.ConvTranspose2d(*sizes, padding=0, **common)
        return eqx.nn.Conv2d(*sizes, padding=self.pads, **common)

    def haiku(self, name):
        common = {"with_bias": self.bias, "name": name, "stride": self.strides}
        if self.transposed:
            return hk.Conv2DTranspose(
                self.n_out, self.kernel, padding="VALID", **common
            )
        return hk.Conv2D(
            self.n_out, self.kernel, padding=self.pads,
            feature_group_count=self.groups, **common,
        )  # fmt: skip

    def bind(self, framework, module):
        if framework != "equinox":
            return module
        channels_last = lambda x: module(x.transpose(2, 0, 1)).transpose(1, 2, 0)  # noqa: E731
        return jax.vmap(channels_last)

    def spec(self):
        one = (1, 1)
        strides, dilation = self.strides, one
        if self.transposed:
            strides, dilation = one, self.strides
        return oracle.Conv(
            self.kernel, strides, self.pads, dilation, one, self.groups, self.bias
        )

    def reference(self, r, name, x):
        w, b, spec = r.kernel(name), r.bias(name), self.spec()
        if self.transposed and r.find(name, "w") is not None:
            w = jnp.swapaxes(w, -1, -2)  # Haiku's
        z = jax.lax.conv_general_dilated(
            x, w, spec.strides, spec.padding, lhs_dilation=spec.lhs_dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.groups,
        )  # fmt: skip
        return r.hook(name, x, z if b is None else z + b)


@dataclasses.dataclass(frozen=True)
class Norm(Part):
    """Layer norm over the last axis."""

    width: int

    def plain(self, rng):
        del rng
        return {"scale": np.ones(self.width), "bias": np.zeros(self.width)}

    def apply(self, p, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)
        return x * p["scale"] + p["bias"]

    def linen(self, scope, name):
        del scope
        return nn.LayerNorm(epsilon=1e-3, name=name)

    def nnx(self, rngs):
        return nnx.LayerNorm(self.width, epsilon=1e-3, rngs=rngs)

    def equinox(self, key):
        del key
        return eqx.nn.LayerNorm(self.width, eps=1e-3)

    def haiku(self, name):
        return hk.LayerNorm(-1, True, True, eps=1e-3, name=name)

    def bind(self, framework, module):
        return over_rows(module) if framework == "equinox" else module

    def spec(self):
        return oracle.ScaleShift()

    def reference(self, r, name, x):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        x_hat = centred / jnp.sqrt(variance + 1e-3)
        scale = r.find(name, "scale", "weight")
        shift = r.find(name, "bias", "offset")
        return r.hook(name, x_hat, x_hat * scale + shift)


@dataclasses.dataclass(frozen=True)
class Bare(Part):
    """A parameter that belongs to no module; the body gets the array itself.

    The body calls ``parts[name](use, x)`` with ``use(array, x)`` what it does with the
    array. The reference hooks that as one layer, unless ``layer`` is None.
    """

    shape: tuple[int, ...]
    layer: Any = None

    def plain(self, rng):
        return weight(rng, *self.shape) if self.shape else np.array(1.0)

    def apply(self, p, use, x):
        return use(p, x)

    def linen(self, scope, name):
        return scope.param(name, nn.initializers.normal(), self.shape, F64)

    def nnx(self, rngs):
        return nnx.Param(jax.random.normal(rngs.params(), self.shape, F64))

    def equinox(self, key):
        return jax.random.normal(key, self.shape, F64)

    def haiku(self, name):
        init = hk.initializers.RandomNormal()
        return hk.get_parameter(name, self.shape, F64, init)

    def bind(self, framework, module):
        array = module[...] if framework == "nnx" else module
        return lambda use, x: use(array, x)

    def layer_name(self, framework, name, parts):
        bare = [p for p in parts.values() if isinstance(p, Bare)]
        if framework != "haiku":
            return name
        return "~" if len(bare) == 1 and self.layer else f"~/{name}"

    def specs(self, framework, name):
        return {name: self.layer} if self.layer else {}

    def reference(self, r, name, use, x):
        z = use(r.leaves[name], x)
        return r.hook(name, x, z) if self.layer else z


def head(n_in, n_out=3):
    """The dense layer that ends most networks."""
    return {"head": Linear(n_in, n_out)}


def mean_pool(x):
    """The mean over all axes between the first and the last."""
    return x.mean(tuple(range(1, x.ndim - 1)))
