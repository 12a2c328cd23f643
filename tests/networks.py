"""What the test models are made of: a model, its loss, its data, a layer with a head.

``forward(params, x, hook)`` is written so that the oracle can follow it: plain Python
loops, one ``hook(name, a, z)`` per layer call. ``traced(params, x)`` is the form that
the library sees where it differs: ``scan`` instead of a loop, ``jit``, Flax modules.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from tests import oracles
from tests.oracles import Dense, no_hook


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, its loss, and the layers that ``tag`` has to find."""

    name: str
    init: Callable[[Any], Any]
    forward: Callable[..., Any]
    x_shape: tuple[int, ...]
    layers: dict[str, Any]
    traced: Callable[..., Any] | None = None
    outputs: int = 3
    terms: tuple[int, ...] = ()
    likelihood: str = "categorical"
    variance: float = 1.0
    diagonal: tuple[str, ...] = ()

    def __str__(self):
        """The name, which pytest shows."""
        return self.name

    def params(self, dtype=np.float64, seed=0):
        """Parameters of a fixed seed."""
        values = self.init(np.random.default_rng(seed))
        return jax.tree.map(lambda w: jnp.asarray(w, dtype), values)

    def batch(self, examples, dtype=np.float64, seed=1):
        """Inputs and targets of a fixed seed."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(examples, *self.x_shape))
        shape = (examples, *self.terms)
        if self.likelihood == "categorical":
            y = jnp.asarray(rng.integers(0, self.outputs, shape))
        elif self.likelihood == "bernoulli":
            y = jnp.asarray(rng.integers(0, 2, (*shape, self.outputs)), dtype)
        else:
            y = jnp.asarray(rng.normal(size=(*shape, self.outputs)), dtype)
        return jnp.asarray(x, dtype), y

    def loss(self, params, x, y):
        """Mean negative log-likelihood, with the output marked."""
        return self.plain_loss(params, x, y, self.mark)

    def plain_loss(self, params, x, y, mark=lambda output: output):
        """The same loss without the mark: what ``jax.grad`` is asked about."""
        run = self.traced or functools.partial(self.forward, hook=no_hook)
        output = mark(run(params, x))
        return oracles.mean_loss(self.likelihood, output, y, self.variance)

    def mark(self, output):
        """Mark the network's output with its likelihood."""
        if self.likelihood == "normal":
            return kfac.normal(output, self.variance)
        return getattr(kfac, self.likelihood)(output)

    def tag(self, batch=4, dtype=np.float64, **options):
        """Tag the loss on abstract arguments."""
        args = (self.params(dtype), *self.batch(batch, dtype))
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), args)
        return kfac.tag(self.loss, *shapes, **options)


def weight(rng, *shape):
    """A random weight of about unit gain."""
    return rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1])))


def dense(p, x, hook, name):
    """A dense layer with or without bias."""
    z = x @ p["kernel"]
    if "bias" in p:
        z = z + p["bias"]
    return hook(name, x, z)


def head(rng, width, outputs=3):
    """Parameters of the dense layer at the end of a network."""
    return {"kernel": weight(rng, width, outputs), "bias": weight(rng, outputs)}


def with_head(name, layer, init, width, x_shape, spec, traced=None, pool=True, **more):
    """``layer``, then tanh, mean over the positions, and a dense head."""

    def finish(p, z, hook=no_hook):
        z = jnp.tanh(z)
        if pool:
            z = z.mean(tuple(range(1, z.ndim - 1))) if z.ndim > 2 else z
        else:
            z = z.reshape(z.shape[0], -1)
        return dense(p["head"], z, hook, "head")

    def forward(p, x, hook):
        return finish(p, layer(p["layer"], x, hook), hook)

    def seen(p, x):
        return finish(p, traced(p["layer"], x))

    return Model(
        name,
        lambda rng: {"layer": init(rng), "head": head(rng, width)},
        forward, x_shape, {"layer": spec, "head": Dense()},
        traced=seen if traced else None, **more,
    )  # fmt: skip
