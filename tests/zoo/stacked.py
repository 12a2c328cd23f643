"""Parameters with a leading axis: experts, ensembles, scans over layers."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from haiku.experimental import layer_stack

from tests.networks import weight
from tests.zoo import oracle
from tests.zoo.nets import everywhere
from tests.zoo.parts import F64, Linear, Norm, Part, head

MEMBERS, LAYERS = 2, 3


def each(x, kernel, bias):
    """``x W_e + b_e`` for every expert ``e``; ``x`` may have an expert axis."""
    letters = "bi" if x.ndim == 2 else "ebi"
    z = jnp.einsum(f"{letters},eio->ebo", x, kernel)
    return z if bias is None else z + bias[:, None]


@dataclasses.dataclass(frozen=True)
class Experts(Part):
    """All experts in one einsum."""

    n_in: int
    n_out: int
    bias: bool = True

    @property
    def shapes(self):
        """Parameters' shapes."""
        kernel = (MEMBERS, self.n_in, self.n_out)
        return {"kernel": kernel} | (
            {"bias": (MEMBERS, self.n_out)} if self.bias else {}
        )

    def plain(self, rng):
        return {k: weight(rng, *shape) for k, shape in self.shapes.items()}

    def apply(self, p, x):
        return each(x, p["kernel"], p.get("bias"))

    def linen(self, scope, name):
        part = self

        class Module(nn.Module):
            @nn.compact
            def __call__(self, x):
                init = nn.initializers.normal()
                made = {
                    k: self.param(k, init, shape, F64)
                    for k, shape in part.shapes.items()
                }
                return part.apply(made, x)

        return Module(name=name)

    def nnx(self, rngs):
        part = self

        class Module(nnx.Module):
            def __init__(self):
                for k, shape in part.shapes.items():
                    value = jax.random.normal(rngs.params(), shape, F64)
                    setattr(self, k, nnx.Param(value))

            def __call__(self, x):
                made = {k: getattr(self, k)[...] for k in part.shapes}
                return part.apply(made, x)

        return Module()

    def equinox(self, key):
        return {
            k: jax.random.normal(key, shape, F64) for k, shape in self.shapes.items()
        }

    def haiku(self, name):
        part = self

        class Module(hk.Module):
            def __call__(self, x):
                init = hk.initializers.RandomNormal()
                made = {
                    k: hk.get_parameter(k, shape, F64, init)
                    for k, shape in part.shapes.items()
                }
                return part.apply(made, x)

        return Module(name=name)

    def bind(self, framework, module):
        return (lambda x: self.apply(module, x)) if framework == "equinox" else module

    def spec(self):
        return oracle.Blocks(self.bias)

    def reference(self, r, name, x):
        w, b = r.kernel(name), r.bias(name)
        a = [x] * MEMBERS if x.ndim == 2 else list(x)
        z = [a[e] @ w[e] + (b[e] if b is not None else 0.0) for e in range(MEMBERS)]
        return r.hook(name, jnp.stack(a), jnp.stack(z))


def mixture(parts, x):
    """Every expert runs; a softmax gate weights their outputs."""
    gate = jax.nn.softmax(parts["gate"](x))
    out = parts["second"](jnp.tanh(parts["first"](x)))
    return parts["head"](jnp.tanh(jnp.einsum("be,ebo->bo", gate, out)))


# ---------------------------------------------------------------- ensembles


class LinenMember(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(jnp.tanh(nn.Dense(2, name="hidden")(x)))


class NNXMember(nnx.Module):
    """Two dense layers."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 2, rngs=rngs)
        self.out = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


class EquinoxMember(eqx.Module):
    """Two dense layers."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.hidden = eqx.nn.Linear(4, 2, key=one)
        self.out = eqx.nn.Linear(2, 3, key=two)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


class Ensemble(Part):
    """Members with stacked parameters under the framework's ``vmap``."""

    def plain(self, rng):
        return {n: Experts(i, o).plain(rng) for n, i, o in self.sizes}

    sizes = (("hidden", 4, 2), ("out", 2, 3))

    def apply(self, p, x):
        def member(p, x):
            h = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
            return h @ p["out"]["kernel"] + p["out"]["bias"]

        return jax.vmap(member, (0, None))(p, x)

    def linen(self, scope, name):
        del scope
        lifted = nn.vmap(
            LinenMember, in_axes=None, axis_size=MEMBERS,
            variable_axes={"params": 0}, split_rngs={"params": True},
        )  # fmt: skip
        return lifted(name=name)

    def nnx(self, rngs):
        return nnx.vmap(NNXMember)(rngs.split(MEMBERS))

    def equinox(self, key):
        return eqx.filter_vmap(EquinoxMember)(jax.random.split(key, MEMBERS))

    def bind(self, framework, module):
        if framework == "nnx":
            run = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))
            return lambda x: run(module, x)
        if framework == "equinox":
            axes = (eqx.if_array(0), None)
            run = eqx.filter_vmap(lambda member, x: jax.vmap(member)(x), in_axes=axes)
            return lambda x: run(module, x)
        return module

    def specs(self, framework, name):
        return {f"{name}/{n}": oracle.Blocks() for n, _, _ in self.sizes}

    def reference(self, r, name, x):
        for n, i, o in self.sizes:
            x = Experts(i, o).reference(r, f"{name}/{n}", x)
            x = jnp.tanh(x) if n == "hidden" else x
        return x


def averaged(parts, x):
    """The mean of the members' logits."""
    return parts["members"](x).mean(0)


# ---------------------------------------------------------------- scans over layers


@dataclasses.dataclass(frozen=True)
class Stack(Part):
    """Residual layers with stacked parameters under ``scan``; with or without norm."""

    normed: bool = False

    def step(self, parts, x):
        """One layer."""
        h = parts["norm"](x) if self.normed else x
        return x + jnp.tanh(parts["dense"](h))

    @property
    def inner(self):
        """The parts of one layer."""
        return {"dense": Linear(4, 4)} | ({"norm": Norm(4)} if self.normed else {})

    def bound(self, framework, made):
        """Parts of one layer as functions."""
        return {n: part.bind(framework, made[n]) for n, part in self.inner.items()}

    def plain(self, rng):
        layers = [
            {n: part.plain(rng) for n, part in self.inner.items()}
            for _ in range(LAYERS)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    def apply(self, p, x):
        def step(x, p):
            made = {
                n: (lambda x, n=n, part=part: part.apply(p[n], x))
                for n, part in self.inner.items()
            }
            return self.step(made, x), None

        return jax.lax.scan(step, x, p)[0]

    def linen(self, scope, name):
        del scope
        part = self

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                made = {n: p.linen(self, n) for n, p in part.inner.items()}
                return part.step(made, x), None

        lifted = nn.scan(
            Layer, length=LAYERS, variable_axes={"params": 0},
            split_rngs={"params": True},
        )  # fmt: skip
        return lifted(name=name)

    def nnx(self, rngs):
        part = self

        class Layer(nnx.Module):
            def __init__(self, rngs):
                for n, p in part.inner.items():
                    setattr(self, n, p.nnx(rngs))

            def __call__(self, x):
                return part.step({n: getattr(self, n) for n in part.inner}, x)

        return nnx.vmap(Layer)(rngs.split(LAYERS))

    def equinox(self, key):
        def layer(key):
            return {n: part.equinox(key) for n, part in self.inner.items()}

        return eqx.filter_vmap(layer)(jax.random.split(key, LAYERS))

    def haiku(self, name):
        def layer(x):
            return self.step({n: p.haiku(n) for n, p in self.inner.items()}, x)

        return layer_stack(LAYERS, name=name)(layer)

    def bind(self, framework, module):
        if framework == "linen":
            return lambda x: module(x, None)[0]
        if framework == "nnx":
            run = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return lambda x: run(x, module)
        if framework == "equinox":
            stacked, static = eqx.partition(module, eqx.is_array)

            def step(x, layer):
                made = eqx.combine(layer, static)
                return self.step(self.bound("equinox", made), x), None

            return lambda x: jax.lax.scan(step, x, stacked)[0]
        return module

    def specs(self, framework, name):
        del framework
        parts = self.inner.items()
        return {f"{name}/{n}": oracle.Stacked(part.spec()) for n, part in parts}

    def reference(self, r, name, x):
        whole, hook = r.leaves, r.hook
        for i in range(LAYERS):
            chosen = {
                k: v[i] if k.startswith(f"{name}/") else v for k, v in whole.items()
            }
            made = {}
            for n, part in self.inner.items():
                r.leaves = chosen
                made[n] = lambda x, n=n, p=part: p.reference(r, f"{name}/{n}", x)
            x = self.step(made, x)
        r.leaves, r.hook = whole, hook
        return x


def deep(parts, x):
    """The stack, then a dense layer."""
    return parts["head"](parts["blocks"](x))


def nets():
    """Every network of this family."""
    experts = {
        "gate": Linear(4, MEMBERS), "first": Experts(4, 3),
        "second": Experts(3, 2, bias=False), **head(2),
    }  # fmt: skip
    lifted = ("jax", "linen", "nnx", "equinox")
    return [
        *everywhere("experts", experts, mixture),
        *everywhere("ensemble", {"members": Ensemble()}, averaged, frameworks=lifted),
        *everywhere("layers_scan", {"blocks": Stack(), **head(4)}, deep),
        *everywhere("layers_scan_norm", {"blocks": Stack(True), **head(4)}, deep),
    ]  # fmt: skip
