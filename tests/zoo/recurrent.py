"""Recurrent networks in ``scan``: LSTM, GRU, simple cells; the reference unrolls."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import sigmoid

from tests.networks import weight
from tests.zoo import oracle
from tests.zoo.nets import zoo_net
from tests.zoo.parts import F64, Part, head

LENGTH, IN, WIDTH = 3, 2, 3
GATES = {"lstm": 4, "optimized_lstm": 4, "gru": 3, "simple": 1}
LINEN = {
    "lstm": nn.LSTMCell, "optimized_lstm": nn.OptimizedLSTMCell,
    "gru": nn.GRUCell, "simple": nn.SimpleCell,
}  # fmt: skip
NNX = {
    "lstm": nnx.LSTMCell, "optimized_lstm": nnx.OptimizedLSTMCell,
    "gru": nnx.GRUCell, "simple": nnx.SimpleCell,
}  # fmt: skip
HAIKU = {"lstm": hk.LSTM, "gru": hk.GRU, "simple": hk.VanillaRNN}
EQUINOX = {"lstm": eqx.nn.LSTMCell, "gru": eqx.nn.GRUCell}
D, NO_BIAS, SHIFT = oracle.Dense(), oracle.Dense(False), oracle.ScaleShift(scale=False)


# ---------------------------------------------------------------- what is in a cell


def gate_specs(framework, cell):
    """The layers inside a cell."""
    if framework == "equinox":
        if cell == "lstm":
            return {"weight_ih": NO_BIAS, "weight_hh": NO_BIAS, "bias": SHIFT}
        return {"weight_ih": D, "weight_hh": NO_BIAS, "bias_n": SHIFT}
    if framework == "haiku":
        if cell == "gru":
            weights = dict.fromkeys(("w_i", "w_h", "w_h.1"), NO_BIAS)
            return weights | dict.fromkeys(("b", "b.1"), SHIFT)
        return {"linear": D} if cell == "lstm" else {"linear": D, "linear_1": D}
    if framework == "linen" or (framework, cell) == ("nnx", "lstm"):
        forget = "if_" if framework == "nnx" else "if"
        return {
            "simple": {"i": D, "h": NO_BIAS},
            "gru": dict.fromkeys(("ir", "iz", "in", "hn"), D)
            | dict.fromkeys(("hr", "hz"), NO_BIAS),
        }.get(
            cell,
            dict.fromkeys(("hi", "hf", "hg", "ho"), D)
            | dict.fromkeys(("ii", forget, "ig", "io"), NO_BIAS),
        )
    bias_inside = "lstm" in cell
    return {
        "dense_i": NO_BIAS if bias_inside else D,
        "dense_h": D if bias_inside else NO_BIAS,
    }


def gates(r, name, framework, cell, x, h):
    """The gates' pre-activations, those from ``x`` and those from ``h``."""
    if framework == "equinox":
        return equinox_gates(r, name, cell, x, h)
    if framework == "haiku":
        if cell == "lstm":
            joined = r.dense(f"{name}/linear", jnp.concatenate([x, h], -1))
            i, g, f, o = jnp.split(joined, 4, -1)
            return jnp.stack([i, f + 1, g, o]), 0.0
        first = r.dense(f"{name}/linear", x)
        return first[None], r.dense(f"{name}/linear_1", h)[None]
    if r.kernel(f"{name}/dense_i") is not None:
        first, second = r.dense(f"{name}/dense_i", x), r.dense(f"{name}/dense_h", h)
    elif cell == "simple":
        first, second = r.dense(f"{name}/i", x), r.dense(f"{name}/h", h)
    else:
        letters = "rzn" if cell == "gru" else "ifgo"
        forget = "if_" if framework == "nnx" else "if"
        into = [forget if k == "f" else f"i{k}" for k in letters]
        first = jnp.stack([r.dense(f"{name}/{k}", x) for k in into])
        second = jnp.stack([r.dense(f"{name}/h{k}", h) for k in letters])
        return first, second
    number = GATES[cell]
    return (jnp.stack(jnp.split(z, number, -1)) for z in (first, second))


def equinox_gates(r, name, cell, x, h):
    """Equinox keeps all gates in one weight and adds one bias."""
    inner, outer = r.leaves[f"{name}/weight_ih"].T, r.leaves[f"{name}/weight_hh"].T
    bias = r.leaves[f"{name}/bias"]
    if cell == "lstm":
        z = r.hook(f"{name}/weight_ih", x, x @ inner)
        z = z + r.hook(f"{name}/weight_hh", h, h @ outer)
        z = r.hook(f"{name}/bias", z, z + bias)
        return jnp.stack(jnp.split(z, 4, -1)), 0.0
    first = r.hook(f"{name}/weight_ih", x, x @ inner + bias)
    second = r.hook(f"{name}/weight_hh", h, h @ outer)
    reset, update, new = jnp.split(second, 3, -1)
    new = r.hook(f"{name}/bias_n", new, new + r.leaves[f"{name}/bias_n"])
    return jnp.stack(jnp.split(first, 3, -1)), jnp.stack([reset, update, new])


def haiku_gru(r, name, x, h):
    """Haiku's GRU resets the state in front of the product, not behind it."""
    w, b, two = r.leaves[f"{name}/w_h"], r.leaves[f"{name}/b"], 2 * WIDTH
    x_all = r.hook(f"{name}/w_i", x, x @ r.leaves[f"{name}/w_i"])
    joint = x_all[:, :two] + r.hook(f"{name}/w_h", h, h @ w[:, :two])
    z, reset = jnp.split(sigmoid(r.hook(f"{name}/b", joint, joint + b[:two])), 2, -1)
    held = reset * h
    new = x_all[:, two:] + r.hook(f"{name}/w_h.1", held, held @ w[:, two:])
    new = jnp.tanh(r.hook(f"{name}/b.1", new, new + b[two:]))
    return (1 - z) * h + z * new


def advance(cell, first, second, h, c, act=jnp.tanh):
    """The new state from the gates."""
    if cell == "simple":
        return act(first[0] + (second if np.ndim(second) == 0 else second[0])), c
    if cell == "gru":
        reset, update = sigmoid(first[:2] + second[:2])
        new = jnp.tanh(first[2] + reset * second[2])
        return (1 - update) * new + update * h, c
    i, f, g, o = first + second
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


# ---------------------------------------------------------------- the part


@dataclasses.dataclass(frozen=True)
class Recurrent(Part):
    """A cell under the framework's loop over time; all hidden states."""

    cell: str
    framework: str

    @property
    def twofold(self):
        """Whether the state is ``(c, h)``."""
        return "lstm" in self.cell

    def plain(self, rng):
        wide = GATES[self.cell] * WIDTH
        biased = "dense_h" if self.twofold else "dense_i"
        p = {
            "dense_i": {"kernel": weight(rng, IN, wide)},
            "dense_h": {"kernel": weight(rng, WIDTH, wide)},
        }
        p[biased]["bias"] = weight(rng, wide)
        return {"cell": p}

    def apply(self, p, x):
        p = p["cell"]

        def dense(p, x):
            z = jnp.dot(x, p["kernel"])
            return z + p["bias"] if "bias" in p else z

        def step(state, x):
            h, c = state
            z = dense(p["dense_i"], x), dense(p["dense_h"], h)
            number = GATES[self.cell]
            first, second = (jnp.stack(jnp.split(v, number, -1)) for v in z)
            h, c = advance(self.cell, first, second, h, c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], WIDTH), x.dtype)
        states = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1]
        return jnp.swapaxes(states, 0, 1)

    def linen(self, scope, name):
        cell = LINEN[self.cell](WIDTH, param_dtype=F64, parent=None)
        del scope
        return nn.RNN(cell, name=name)

    def nnx(self, rngs):
        options = {"dtype": F64} if self.cell == "simple" else {}
        cell = NNX[self.cell](IN, WIDTH, param_dtype=F64, rngs=rngs, **options)
        return nnx.RNN(cell)

    def equinox(self, key):
        return EQUINOX[self.cell](IN, WIDTH, key=key)

    def haiku(self, name):
        return HAIKU[self.cell](WIDTH, name=name)

    def bind(self, framework, module):
        if framework == "nnx":
            return functools.partial(self.run_nnx, module)
        if framework == "equinox":
            return jax.vmap(functools.partial(self.run_equinox, module))
        if framework == "haiku":
            return lambda x: hk.dynamic_unroll(
                module, x, module.initial_state(x.shape[0]), time_major=False
            )[0]
        return module

    def run_nnx(self, module, x):
        zeros = jnp.zeros((x.shape[0], WIDTH), x.dtype)
        return module(x, initial_carry=(zeros, zeros) if self.twofold else zeros)

    def run_equinox(self, cell, x):
        def step(state, x):
            state = cell(x, state)
            return state, state[0] if self.twofold else state

        zeros = jnp.zeros(WIDTH, x.dtype)
        return jax.lax.scan(step, (zeros, zeros) if self.twofold else zeros, x)[1]

    def inside(self, name):
        """Where the cell's parameters are."""
        nested = self.framework in ("jax", "linen", "nnx")
        return f"{name}/cell" if nested else name

    def specs(self, framework, name):
        found = gate_specs(framework, self.cell)
        return {f"{self.inside(name)}/{k}": spec for k, spec in found.items()}

    def reference(self, r, name, x):
        at, states = self.inside(name), []
        h = c = jnp.zeros((x.shape[0], WIDTH), x.dtype)
        act = jax.nn.relu if self.framework == "haiku" else jnp.tanh
        for t in range(x.shape[1]):
            if (self.framework, self.cell) == ("haiku", "gru"):
                h = haiku_gru(r, at, x[:, t], h)
            else:
                found = gates(r, at, self.framework, self.cell, x[:, t], h)
                h, c = advance(self.cell, *found, h, c, act)
            states.append(h)
        return jnp.stack(states, 1)


def fused_leaves(framework, cell):
    """Layers that are a piece of a parameter, or turned round."""
    if framework == "equinox":

        def both(p):
            rows = [p["rnn/weight_ih"].T]
            return jnp.concatenate(
                [*rows, p["rnn/bias"][None]] if cell == "gru" else rows
            )

        return {
            "rnn/weight_ih": lambda p: both(p)[None],
            "rnn/weight_hh": lambda p: p["rnn/weight_hh"].T[None],
        }
    if (framework, cell) == ("haiku", "gru"):
        two = 2 * WIDTH
        return {
            "rnn/w_i": lambda p: p["rnn/w_i"][None],
            "rnn/w_h": lambda p: p["rnn/w_h"][None, :, :two],
            "rnn/w_h.1": lambda p: p["rnn/w_h"][None, :, two:],
            "rnn/b": lambda p: p["rnn/b"][:two, None],
            "rnn/b.1": lambda p: p["rnn/b"][two:, None],
        }
    return None


def last_state(parts, x):
    """A dense layer on the last hidden state."""
    return parts["head"](parts["rnn"](x)[:, -1])


def all_states(parts, x):
    """A dense layer on every hidden state: a loss term per step."""
    return parts["head"](parts["rnn"](x))


def nets():
    """Every network of this family."""
    known = {
        "jax": ("lstm", "gru", "simple"), "linen": tuple(LINEN), "nnx": tuple(NNX),
        "equinox": tuple(EQUINOX), "haiku": tuple(HAIKU),
    }  # fmt: skip
    found = [
        zoo_net(
            cell, framework, {"rnn": Recurrent(cell, framework), **head(WIDTH)},
            last_state, x_shape=(LENGTH, IN), canonical=fused_leaves(framework, cell),
        )
        for framework, cells in known.items()
        for cell in cells
    ]  # fmt: skip
    per_step = [
        zoo_net(
            "gru_lm", framework, {"rnn": Recurrent("gru", framework), **head(WIDTH)},
            all_states, x_shape=(LENGTH, IN), terms=(LENGTH,),
        )
        for framework in ("jax", "linen")
    ]  # fmt: skip
    return found + per_step
