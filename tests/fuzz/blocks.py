"""Steps made of steps: loops, branches, maps, calls.

A ``Recorder`` runs them by hand, as Python loops over the same steps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.runs import Run


def apply_all(steps, run, h):
    """One after the other."""
    for step in steps:
        h = step.apply(run, h)
    return h


def shapes_of(steps) -> dict[str, tuple]:
    """Shapes of the parameters of all of them."""
    found: dict[str, tuple] = {}
    for step in steps:
        for name, shape in step.shapes().items():
            assert found.setdefault(name, shape) == shape, name
    return found


@dataclasses.dataclass(frozen=True)
class Inside:
    """``h + f(h)``, ``jit(f)``, ``checkpoint(f)`` and other calls of steps."""

    form: str
    steps: tuple

    def shapes(self):
        return shapes_of(self.steps)

    def apply(self, run, h):
        names = tuple(self.shapes())

        def body(params, h):
            return apply_all(self.steps, run.under(params, {}), h)

        params = {k: run.params[k] for k in names}
        if self.form == "residual":
            return h + body(params, h)
        if self.form == "gated":
            return h * jnp.tanh(body(params, h))
        if run.recording or self.form == "plain":
            return body(params, h)
        if self.form == "jit":
            return jax.jit(body)(params, h)
        if self.form == "jit_closed":
            return jax.jit(lambda h: body(params, h))(h)
        if self.form == "checkpoint":
            return jax.checkpoint(body)(params, h)
        if self.form == "examples":
            return jax.vmap(body, (None, 0))(params, h)
        raise ValueError(self.form)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The same steps again and again, with parameters of their own or not."""

    form: str  # "scan" | "remat" | "unrolled" | "reverse" | "fori" | "python"
    steps: tuple
    length: int
    stacked: bool

    def shapes(self):
        inner, lead = shapes_of(self.steps), (self.length,) if self.stacked else ()
        return {k: (*lead, *shape) for k, shape in inner.items()}

    def apply(self, run, h):
        names = tuple(self.shapes())
        params = {k: run.params[k] for k in names}
        index = {k: run.index[k] for k in names if run.recording}

        def body(h, params, index=None):
            return apply_all(self.steps, run.under(params, index or {}), h)

        if run.recording or self.form == "python":
            order = range(self.length)
            for k in reversed(order) if self.form == "reverse" else order:
                if self.stacked:
                    own = ({n: v[k] for n, v in d.items()} for d in (params, index))
                    h = body(h, *own)
                else:
                    h = body(h, params, index)
            return h
        if self.form == "fori" and not self.stacked:
            return lax.fori_loop(0, self.length, lambda _, h: body(h, params), h)
        inner = jax.checkpoint(body) if self.form == "remat" else body

        def step(h, sliced):
            return inner(h, sliced if self.stacked else params), None

        xs = params if self.stacked else None
        unroll = 2 if self.form == "unrolled" else 1
        return lax.scan(
            step, h, xs, self.length, reverse=self.form == "reverse", unroll=unroll
        )[0]


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Steps over time: ``s_t = f(s_{t-1} + h_t)`` by ``scan`` over positions."""

    steps: tuple

    def shapes(self):
        return shapes_of(self.steps)

    def apply(self, run, h):
        params = {k: run.params[k] for k in self.shapes()}

        def cell(state, x):
            state = apply_all(self.steps, run.under(params, {}), state + x)
            return state, state

        first = jnp.zeros_like(h[:, 0])
        if run.recording:
            states, state = [], first
            for t in range(h.shape[1]):
                state, _ = cell(state, h[:, t])
                states.append(state)
            return jnp.stack(states, 1)
        return jnp.moveaxis(lax.scan(cell, first, jnp.moveaxis(h, 1, 0))[1], 0, 1)


@dataclasses.dataclass(frozen=True)
class Branches:
    """``cond`` on the data; either branch may have parameters of its own."""

    form: str  # "cond" | "switch" | "where"
    branches: tuple

    def shapes(self):
        return shapes_of([s for steps in self.branches for s in steps])

    def apply(self, run, h):
        params = {k: run.params[k] for k in self.shapes()}
        which = jnp.where(h.ravel()[0] > 0.1, 1, 0)
        bodies = [
            lambda h, steps=steps: apply_all(steps, run.under(params, {}), h)
            for steps in self.branches
        ]
        if self.form == "where":
            a, b = (body(h) for body in bodies)
            return jnp.where(h > 0, a, b)
        if run.recording:
            results = []
            for k, body in enumerate(bodies):
                with run.inside(which == k):
                    results.append(body(h))
            return jnp.where(which == 0, *results)
        if self.form == "switch":
            return lax.switch(which, bodies, h)
        return lax.cond(which == 1, bodies[1], bodies[0], h)


@dataclasses.dataclass(frozen=True)
class Bounded:
    """At most ``length`` turns, of which as many are taken as the data say."""

    steps: tuple
    length: int
    stacked: bool

    def shapes(self):
        return Loop("scan", self.steps, self.length, self.stacked).shapes()

    def apply(self, run, h):
        names = tuple(self.shapes())
        params = {k: run.params[k] for k in names}
        index = {k: run.index[k] for k in names if run.recording}
        limit = jnp.where(h.ravel()[0] > 0.1, self.length - 1, 1)

        def body(h, params, index=None):
            return apply_all(self.steps, run.under(params, index or {}), h)

        if run.recording:
            for k in range(self.length):
                own = params, index
                if self.stacked:
                    own = tuple({n: v[k] for n, v in d.items()} for d in own)
                with run.inside(k < limit):
                    h = jnp.where(k < limit, body(h, *own), h)
            return h

        def turn(h, sliced):
            k, own = sliced
            own = own if self.stacked else params
            return lax.cond(k < limit, lambda h: body(h, own), lambda h: h, h), None

        xs = jnp.arange(self.length), params if self.stacked else None
        return lax.scan(turn, h, xs)[0]


@dataclasses.dataclass(frozen=True)
class Dead:
    """Steps whose result nothing reads that has a derivative: no uses at all."""

    form: str  # "unread" | "stopped" | "compared" | "carried"
    steps: tuple

    def shapes(self):
        return shapes_of(self.steps)

    def apply(self, run, h):
        params = {k: run.params[k] for k in self.shapes()}
        blind = Run(run.params, run.index, run.batch)

        def body(h):
            return apply_all(self.steps, blind.under(params, {}), h)

        if self.form == "stopped":
            return h + 0.1 * lax.stop_gradient(body(h))
        if self.form == "compared":
            return h * jnp.where(body(h) > 0, 1.0, 0.7)
        if self.form == "unread":
            body(h)
            return h

        def turn(carried, _):
            return (jnp.tanh(carried[0]), body(carried[1])), None

        return lax.scan(turn, (h, h), length=2)[0][0]


@dataclasses.dataclass(frozen=True)
class Once:
    """Steps on a vector that is the same for all examples; they meet the result.

    A ``Recorder`` makes them for every example.
    """

    form: str  # "add" | "multiply" | "late"
    steps: tuple
    width: int

    def shapes(self):
        return shapes_of(self.steps)

    def apply(self, run, h):
        params = {k: run.params[k] for k in self.shapes()}
        inner = run.under(params, {})
        v = jnp.linspace(0.5, -0.8, self.width).astype(h.dtype)
        if run.recording:
            with run.once():
                rows = jnp.broadcast_to(v, (run.batch, self.width))
                u = apply_all(self.steps, inner, rows)
            u = u.reshape(run.batch, *(1,) * (h.ndim - 2), -1)
        else:
            u = apply_all(self.steps, inner, v)
        if self.form == "multiply":
            return h * u
        if self.form == "late":
            return jnp.tanh(h + jnp.sin(u)) * u
        return h + u


@dataclasses.dataclass(frozen=True)
class Members:
    """Steps mapped over parts of the value, with parameters stacked or shared."""

    steps: tuple
    members: int
    stacked: bool

    def shapes(self):
        inner, lead = shapes_of(self.steps), (self.members,) if self.stacked else ()
        return {k: (*lead, *shape) for k, shape in inner.items()}

    def apply(self, run, h):
        names = tuple(self.shapes())
        params = {k: run.params[k] for k in names}
        index = {k: run.index[k] for k in names}
        parts = h.reshape(*h.shape[:-1], self.members, -1)
        parts = jnp.moveaxis(parts, -2, 0)

        def body(params, h, index=None):
            return apply_all(self.steps, run.under(params, index or {}), h)

        if run.recording:
            results = []
            for m in range(self.members):
                own = (params, index)
                if self.stacked:
                    own = tuple({n: v[m] for n, v in d.items()} for d in own)
                results.append(body(own[0], parts[m], own[1]))
            out = jnp.stack(results)
        else:
            out = jax.vmap(body, (0 if self.stacked else None, 0))(params, parts)
        out = jnp.moveaxis(out, 0, -2)
        return out.reshape(*out.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class Context:
    """Steps on the mean over positions, added to every position."""

    steps: tuple

    def shapes(self):
        return shapes_of(self.steps)

    def apply(self, run, h):
        flat = h.reshape(h.shape[0], -1, h.shape[-1])
        context = apply_all(self.steps, run, flat.mean(1))
        return h + context.reshape(h.shape[0], *(1,) * (h.ndim - 2), -1)


def numbered(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Numbers of all entries, leaf by leaf."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = np.arange(start, start + size).reshape(shape)
        start += size
    return found
