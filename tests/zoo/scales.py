"""Weights times a function of the parameters; learned temperatures.

A weight's scale is absorbed: per output into the cotangents, a scalar into the inputs.
The oracle holds it constant, as the library's factors do; gradients do not.
"""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.networks import weight
from tests.zoo import oracle
from tests.zoo.nets import FRAMEWORKS, everywhere, zoo_net
from tests.zoo.parts import Bare, Linear, Part, head

SHIFT = oracle.ScaleShift(scale=False)
held = jax.lax.stop_gradient


def column_norm(v):
    """The norm of every output's weights."""
    return jnp.sqrt((v**2).sum(0))


@dataclasses.dataclass(frozen=True)
class WeightNorm(Part):
    """``x (v g / |v|)``, the norm per output, with or without a bias."""

    framework: str
    bias: bool = False

    def plain(self, rng):
        p = {"v": weight(rng, 4, 3), "g": np.ones(3)}
        return p | ({"bias": weight(rng, 3)} if self.bias else {})

    def apply(self, p, x):
        z = x @ (p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=0)))
        return z + p["bias"] if self.bias else z

    def linen(self, scope, name):
        del scope
        dense = nn.Dense(3, self.bias, name=name)
        return nn.WeightNorm(dense, variable_filter={"kernel"}, name="norm")

    def nnx(self, rngs):
        dense = nnx.Linear(4, 3, use_bias=self.bias, rngs=rngs)
        return nnx.WeightNorm(dense, rngs=rngs)

    def equinox(self, key):
        return eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, self.bias, key=key))

    def bind(self, framework, module):
        return jax.vmap(module) if framework == "equinox" else module

    def paths(self, name):
        """Kernel, bias and scale; NNX keeps its scale outside the parameters."""
        return {
            "jax": (f"{name}/v", f"{name}/bias", f"{name}/g"),
            "linen": (f"{name}/kernel", f"{name}/bias", f"norm/{name}/kernel/scale"),
            "nnx": (
                f"{name}/layer_instance/kernel", f"{name}/layer_instance/bias", None,
            ),
            "equinox": (f"{name}/layer/weight", f"{name}/layer/bias", f"{name}/g"),
        }[self.framework]  # fmt: skip

    def specs(self, framework, name):
        del framework
        kernel, bias, _ = self.paths(name)
        lone = kernel.rpartition("/")[0]
        found = {kernel if self.bias else lone: oracle.Dense(False)}
        return found | ({bias: SHIFT} if self.bias else {})

    def reference(self, r, name, x):
        kernel, bias, scale = self.paths(name)
        first = next(iter(self.specs(self.framework, name)))
        v = r.leaves[kernel]
        v = v.T if self.framework == "equinox" else v
        g = r.leaves[scale].reshape(-1) if scale else 1.0
        z = r.hook(first, x, x @ v) * held(g / column_norm(v))
        return r.hook(bias, z, z + r.leaves[bias]) if self.bias else z


class HaikuSpectral(hk.Module):
    """A dense layer with a normalised weight."""

    def __call__(self, x):
        w = hk.get_parameter("w", (4, 3), x.dtype, hk.initializers.RandomNormal())
        b = hk.get_parameter("b", (3,), x.dtype, jnp.zeros)
        return x @ hk.SpectralNorm(eps=1e-12)(w) + b


@functools.cache
def equinox_spectral():
    """Equinox's module and its state."""
    keys = jax.random.split(jax.random.key(0))
    linear = eqx.nn.Linear(4, 3, key=keys[0])
    make = eqx.nn.make_with_state(eqx.nn.SpectralNorm)
    return make(linear, "weight", key=keys[1])


@dataclasses.dataclass(frozen=True)
class SpectralNorm(Part):
    """``x W / sigma`` with ``sigma`` from one step of the power iteration."""

    framework: str

    def plain(self, rng):
        return Linear(4, 3).plain(rng)

    def apply(self, p, x):
        w = p["kernel"]
        v = w @ jnp.ones(3)
        v = held(v / jnp.linalg.norm(v))
        u = v @ w
        u = held(u / jnp.linalg.norm(u))
        return x @ (w / (v @ w @ u)) + p["bias"]

    def linen(self, scope, name):
        del scope
        dense = nn.Dense(3, name=name)
        norm = nn.SpectralNorm(dense, name="norm", param_dtype=jnp.float64)
        return lambda x: norm(x, update_stats=True)

    def nnx(self, rngs):
        dense = nnx.Linear(4, 3, rngs=rngs)
        return nnx.SpectralNorm(dense, param_dtype=jnp.float64, rngs=rngs)

    def equinox(self, key):
        del key
        return equinox_spectral()[0]

    def haiku(self, name):
        return HaikuSpectral(name=name)

    def bind(self, framework, module):
        if framework != "equinox":
            return module
        state = equinox_spectral()[1]
        return lambda x: jax.vmap(module, (0, None), (0, None))(x, state)[0]

    def inside(self, name):
        """Where the parameters are."""
        deeper = {"nnx": f"{name}/layer_instance", "equinox": f"{name}/layer"}
        return deeper.get(self.framework, name)

    def specs(self, framework, name):
        return {self.inside(name): oracle.Dense()}

    def reference(self, r, name, x):
        name = self.inside(name)
        w, b, u = r.kernel(name), r.bias(name), jnp.ones(3)
        if self.framework == "equinox":  # it starts from the other vector
            module, state = equinox_spectral()
            u = state.get(module.uv_index)[1] @ w
        v = w @ (u / jnp.linalg.norm(u))
        v = v / jnp.linalg.norm(v)
        if self.framework != "equinox":
            u = v @ w
        u = u / jnp.linalg.norm(u)
        x = x / held(v @ w @ u)
        return r.hook(name, x, x @ w + b)


@dataclasses.dataclass(frozen=True)
class Exponential(Bare):
    """A scalar under an exponential: its derivative is the result."""

    def reference(self, r, name, use, x):
        z = use(r.leaves[name], x)
        return r.hook(name, z, z)


def normalised(parts, x):
    """The layer and a head."""
    return parts["head"](jnp.tanh(parts["layer"](x)))


def linear_temperature(parts, x):
    """Logits times a learned scalar."""
    return parts["temperature"](lambda t, z: z * t, parts["head"](x))


def log_temperature(parts, x):
    """Logits times the exponential of one."""
    return parts["temperature"](lambda t, z: z * jnp.exp(t), parts["head"](x))


def kernel_of(path, framework):
    """Reads a bare kernel."""
    if framework == "equinox":
        return lambda p: p[path].T[None]
    return lambda p: p[path][None]


def weight_norms():
    """Weight norm in the frameworks that have it."""
    found = []
    for framework in ("jax", "linen", "nnx", "equinox"):
        for bias in (False, True):
            part = WeightNorm(framework, bias)
            kernel, _, scale = part.paths("layer")
            first = next(iter(part.specs(framework, "layer")))
            found.append(
                zoo_net(
                    "weight_norm_bias" if bias else "weight_norm", framework,
                    {"layer": part, **head(3)}, normalised,
                    diagonal=(scale,) if scale else (),
                    canonical={first: kernel_of(kernel, framework)},
                )
            )  # fmt: skip
    return found


def nets():
    """Every network of this family."""
    scale = oracle.ScaleShift(shift=False, axes=0)
    scalar, logged = Bare((), scale), Exponential((), scale)
    return [
        *weight_norms(),
        *[
            zoo_net(
                "spectral_norm", f, {"layer": SpectralNorm(f), **head(3)}, normalised,
            )
            for f in FRAMEWORKS
        ],
        *everywhere(
            "temperature", {"temperature": scalar, **head(4)}, linear_temperature
        ),
        *everywhere(
            "log_temperature", {"temperature": logged, **head(4)}, log_temperature
        ),
    ]  # fmt: skip
