"""A network of the zoo: one architecture in one framework.

An architecture is a dict of parts and a ``body(parts, x)`` in plain JAX. A framework
turns every part into its own module; the reference turns it into a few lines of
``jax.numpy`` that read the same parameters and call the oracle's hook.
"""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import oracles
from tests.networks import Model
from tests.zoo import oracle

FRAMEWORKS = ("jax", "linen", "nnx", "equinox", "haiku")


def by_path(tree):
    """Leaves by their path, ``a/b/c``; NNX's ``value`` and Haiku's ``~`` left out."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name.removeprefix("~/")] = leaf
    return leaves


class Reference:
    """The parameters of a framework as plain arrays, and the oracle's hook."""

    def __init__(self, params, hook=oracles.no_hook):
        """Read every leaf by path."""
        self.leaves, self.hook = by_path(params), hook

    def find(self, name, *ends):
        """The leaf ``name/end`` of the first end that exists, or None."""
        found = (self.leaves.get(f"{name}/{end}") for end in ends)
        return next((leaf for leaf in found if leaf is not None), None)

    def kernel(self, name):
        """Weights with the inputs in front of the outputs (Equinox turned round)."""
        torch = self.find(name, "weight")
        if torch is None:
            return self.find(name, "kernel", "w")
        if torch.ndim == 4:
            return torch.transpose(2, 3, 1, 0)
        return jnp.swapaxes(torch, -1, -2)

    def bias(self, name):
        """The bias, or None."""
        bias = self.find(name, "bias", "b")
        if bias is not None and bias.ndim == 3 and bias.shape[1:] == (1, 1):
            return bias[:, 0, 0]
        return bias

    def dense(self, name, x, in_axes=1, layer=None):
        """A dense layer."""
        w, b = self.kernel(name), self.bias(name)
        return self.hook(layer or name, x, plain_dense(x, w, b, in_axes))


def plain_dense(x, w, b=None, in_axes=1):
    """``x w + b`` over the last ``in_axes`` axes."""
    z = jnp.tensordot(x, w, in_axes)
    return z if b is None else z + b


@dataclasses.dataclass(frozen=True, eq=False)
class Net(Model):
    """A model of the zoo.

    Attributes:
        vocab: Tokens are drawn below it; zero: real inputs.
        keyed: The input is ``(x, key)``.
        aux: ``traced`` returns ``(output, aux)``.
        canonical: By layer, its part of a parameter-like tree as ``oracle.gradient``
            gives it, where that cannot be told from the names.
        names: The library's name of a part where it is not the part's own.
    """

    vocab: int = 0
    keyed: bool = False
    aux: bool = False
    canonical: Any = None
    names: Any = None

    __hash__ = object.__hash__  # tests cache by network

    def params(self, dtype=np.float64, seed=0):
        """The framework's parameters, no zeros and no equal ones among them."""
        rng = np.random.default_rng(seed)

        def moved(leaf):
            leaf = np.asarray(leaf, np.float64)
            return jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), dtype)

        return jax.tree.map(moved, self.init(rng))

    def batch(self, examples, dtype=np.float64, seed=1) -> tuple[Any, Any]:
        """Tokens, reals, or either with a key."""
        x, y = super().batch(examples, dtype, seed)
        if self.vocab:
            rng = np.random.default_rng(seed)
            x = jnp.asarray(rng.integers(0, self.vocab, (examples, *self.x_shape)))
        return ((x, jax.random.key(seed)) if self.keyed else x), y

    def plain_loss(self, params, x, y, mark=lambda output: output):
        """The loss without the mark, with the auxiliary output where there is one."""
        assert self.traced is not None
        output, aux = self.traced(params, x), None
        if self.aux:
            output, aux = output
        loss = oracles.mean_loss(self.likelihood, mark(output), y, self.variance)
        return (loss, aux) if self.aux else loss

    def tag(self, batch=4, dtype=np.float64, **options):
        """Tag the loss on abstract arguments."""
        return super().tag(batch, dtype, has_aux=self.aux, **options)


def net(name, make, forward, layers, x_shape=(4,), **more):
    """A ``Net`` from ``make() -> (params, apply)`` and ``forward(reference, x)``."""
    made = functools.cache(make)
    return Net(
        name,
        lambda rng: made()[0],
        lambda p, x, hook: forward(Reference(p, hook), x),
        x_shape, layers, traced=lambda p, x: made()[1](p, x), **more,
    )  # fmt: skip


# ---------------------------------------------------------------- frameworks


def in_jax(parts, body, x):
    """Parameters in dicts."""
    del x
    rng = np.random.default_rng(0)
    params = {name: part.plain(rng) for name, part in parts.items()}

    def apply(p, x):
        bound = {n: functools.partial(part.apply, p[n]) for n, part in parts.items()}
        return body(bound, x)

    return params, apply


def in_linen(parts, body, x):
    """One compact Linen module."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            made = {n: part.linen(self, n) for n, part in parts.items()}
            return body({n: parts[n].bind("linen", m) for n, m in made.items()}, x)

    module = Body()
    variables = module.init(jax.random.key(0), x)
    rest = {k: ones(v) for k, v in variables.items() if k != "params"}
    run = functools.partial(module.apply, mutable=list(rest)) if rest else module.apply

    def apply(p, x):
        out = run({"params": p, **rest}, x)
        return out[0] if rest else out

    return variables["params"], apply


def in_nnx(parts, body, x, param=nnx.Param):
    """One NNX module, split into parameters and the rest."""
    del x

    class Body(nnx.Module):
        def __init__(self, rngs):
            for name, part in parts.items():
                setattr(self, name, part.nnx(rngs))

        def __call__(self, x):
            made = {n: part.bind("nnx", getattr(self, n)) for n, part in parts.items()}
            return body(made, x)

    split = nnx.split(Body(nnx.Rngs(0)), param, nnx.BatchStat, ...)
    graph, params, stats, rest = split
    stats = ones(stats)
    return params, lambda p, x: nnx.merge(graph, p, stats, rest, copy=True)(x)


def in_equinox(parts, body, x):
    """A dict of Equinox modules, partitioned into real arrays and the rest."""
    del x
    keys = jax.random.split(jax.random.key(0), len(parts))
    model = {
        n: part.equinox(k) for (n, part), k in zip(parts.items(), keys, strict=True)
    }
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(p, x):
        whole = eqx.combine(p, static)
        return body({n: parts[n].bind("equinox", m) for n, m in whole.items()}, x)

    return params, apply


def in_haiku(parts, body, x):
    """A transformed function; states of layers are constants."""

    def run(x):
        made = {n: part.haiku(n) for n, part in parts.items()}
        return body({n: parts[n].bind("haiku", m) for n, m in made.items()}, x)

    transformed = hk.without_apply_rng(hk.transform_with_state(run))
    params, state = transformed.init(jax.random.key(0), x)
    return params, lambda p, x: transformed.apply(p, ones(state), x)[0]


def ones(state):
    """States of layers, of no random value."""
    return jax.tree.map(jnp.ones_like, state)


MAKERS = {
    "jax": in_jax, "linen": in_linen, "nnx": in_nnx, "equinox": in_equinox,
    "haiku": in_haiku,
}  # fmt: skip


def zoo_net(name, framework, parts, body, x_shape=(4,), layers=None, **more):
    """An architecture of parts in a framework."""
    if layers is None:
        layers = {}
        for n, part in parts.items():
            layers |= part.specs(framework, n)
    names = {n: part.layer_name(framework, n, parts) for n, part in parts.items()}
    layers = {names.get(k, k): v for k, v in layers.items()}
    more["diagonal"] = tuple(names.get(k, k) for k in more.get("diagonal", ()))

    def example():
        shape = (2, *x_shape)
        x = jnp.zeros(shape, int if more.get("vocab") else float)
        return (x, jax.random.key(0)) if more.get("keyed") else x

    def forward(r, x):
        hook = r.hook
        r.hook = lambda n, a, z: hook(names.get(n, n), a, z)
        bound = {
            n: functools.partial(part.reference, r, n) for n, part in parts.items()
        }
        return body(bound, x)

    return net(
        f"{name}-{framework}",
        lambda: MAKERS[framework](parts, body, example()),
        forward, layers, x_shape, names=names, **more,
    )  # fmt: skip


def everywhere(name, parts, body, x_shape=(4,), frameworks=FRAMEWORKS, **more):
    """The same architecture in several frameworks."""
    return [zoo_net(name, f, parts, body, x_shape, **more) for f in frameworks]


# ---------------------------------------------------------------- gradients


def canonical(net, name, tree):
    """A layer's part of a parameter-like tree, as ``oracle.gradient`` gives it."""
    if net.canonical and name in net.canonical:
        return np.asarray(net.canonical[name](by_path(tree)))
    inverse = {v: k for k, v in (net.names or {}).items()}
    r, spec = Reference(tree), net.layers[name]
    name = inverse.get(name, name)
    stacked = isinstance(spec, oracle.Stacked)
    spec = spec.inner if stacked else spec
    if isinstance(spec, oracle.Embedding):
        table = r.leaves.get(name)
        ends = ("embedding", "embeddings", "weight", "table")
        return np.asarray(r.find(name, *ends) if table is None else table)
    if isinstance(spec, oracle.ScaleShift):
        return scale_shift_leaves(r, name, spec, stacked)
    w, b = r.leaves.get(name, r.kernel(name)), r.bias(name)
    assert (b is not None) == spec.bias, f"{name}: a bias where none is said"
    lead = w.shape[:1] if stacked or isinstance(spec, oracle.Blocks) else ()
    outs = getattr(spec, "out_axes", 1)
    width = int(np.prod(w.shape[w.ndim - outs :]))
    w = np.asarray(w).reshape(*lead, -1, width)
    if b is not None:
        w = np.concatenate([w, np.reshape(b, (*lead, 1, width))], -2)
    groups = getattr(spec, "groups", 1)
    if isinstance(spec, oracle.Blocks):
        return w
    if groups > 1:
        return np.stack(np.split(w, groups, -1))
    return np.expand_dims(w, len(lead))


def scale_shift_leaves(r, name, spec, stacked):
    """Scale and shift as ``[units, k]``."""
    ends = [("scale", "weight")] * spec.scale + [
        ("bias", "offset", "shift")
    ] * spec.shift
    found = [r.find(name, *e) for e in ends]
    if found == [None]:
        found = [r.leaves[name]]
    flat = [np.reshape(v, (len(v), -1) if stacked else -1) for v in found]
    return np.stack(flat, -1)
