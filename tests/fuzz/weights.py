"""Where the matrix of a dense layer comes from: storage, and arithmetic on it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

# How the parameter holds the matrix: selections, which hold every entry once.
STORES = (
    "plain", "transposed", "flat", "padded", "reversed", "beside", "indexed",
    "turned_flat", "strided",
)  # fmt: skip
# What is done to the numbers; the last ones leave no layer.
PROPER = ("none", "half", "gain", "norm", "cast", "divided", "mean_free")
ODD = ("square", "exp", "sum", "outer_gain")
ARITHMETIC = (*PROPER, *ODD, "frozen")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix ``[n_in, n_out]`` made of parameters.

    ``tie`` turns it: the same parameter is stored for another layer the other way
    round.
    """

    name: str
    n_in: int
    n_out: int
    store: str = "plain"
    arithmetic: str = "none"
    tie: bool = False

    @property
    def sizes(self):
        """Sizes of the matrix as stored."""
        return (self.n_out, self.n_in) if self.tie else (self.n_in, self.n_out)

    def shapes(self) -> dict[str, tuple]:
        """Shapes of the parameters."""
        i, o = self.sizes
        shape = {
            "plain": (i, o),
            "transposed": (o, i),
            "flat": (i * o,),
            "padded": (i + 1, o + 1),
            "reversed": (i, o),
            "beside": (i, 1),
            "indexed": (2, i, o),
            "turned_flat": (o * i,),
            "strided": (2 * i, o),
        }[self.store]
        found = {self.name: shape}
        if self.store == "beside":
            found[self.name + "_more"] = (i, o - 1)
        if self.arithmetic == "gain":
            found[self.name + "_gain"] = (self.n_out,)
        if self.arithmetic == "outer_gain":
            found[self.name + "_gain"] = (self.n_in, self.n_out)
        if self.arithmetic == "sum":
            found[self.name + "_other"] = (self.n_in, self.n_out)
        return found

    def select(self, xp, leaves):
        """The matrix's entries, of parameters or of their entries' numbers."""
        i, o = self.sizes
        w = leaves[self.name]
        if self.store == "transposed":
            w = w.T
        elif self.store == "flat":
            w = w.reshape(i, o)
        elif self.store == "padded":
            w = w[1:, :o]
        elif self.store == "reversed":
            w = w[::-1]
        elif self.store == "beside":
            w = xp.concatenate([w, leaves[self.name + "_more"]], 1)
        elif self.store == "indexed":
            w = w[1]
        elif self.store == "turned_flat":
            w = w.reshape(o, i).T
        elif self.store == "strided":
            w = w[::2]
        return w.T if self.tie else w

    def read(self, run):
        """The matrix, the numbers of its entries, what it is multiplied by.

        Returns:
            ``(matrix, index, (left, right))``; no index where this is no layer.
        """
        w = self.select(jnp, run.params)
        # In a plain run the numbers of stacked entries are not taken apart.
        index = self.select(np, run.index) if run.recording else None
        one, kind = (1.0, 1.0), self.arithmetic
        if kind == "none":
            return w, index, one
        if kind == "half":
            return 0.5 * w, index, (0.5, 1.0)
        if kind == "divided":
            return w / math.sqrt(self.n_in), index, (1 / math.sqrt(self.n_in), 1.0)
        if kind == "cast":
            return w.astype(jnp.float32).astype(w.dtype), index, one
        if kind == "gain":
            gain = run.params[self.name + "_gain"]
            run.odd(run.index[self.name + "_gain"])
            return w * gain, index, (1.0, gain)
        if kind == "mean_free":
            run.odd(index)
            return w - w.mean(0), index, one
        if kind == "norm":
            run.odd(index)
            size = jnp.sqrt(jnp.sum(w * w, 0) + 0.1)
            return w / size, index, (1.0, 1 / size)
        if kind == "frozen":
            return jax.lax.stop_gradient(w), None, one
        return self.odd_matrix(run, w, index), None, one

    def odd_matrix(self, run, w, index):
        """Functions of the parameter that leave no layer of it."""
        run.odd(index)
        if self.arithmetic == "square":
            return w * w
        if self.arithmetic == "exp":
            return jnp.exp(0.5 * w)
        more = {"sum": "_other", "outer_gain": "_gain"}[self.arithmetic]
        run.odd(run.index[self.name + more])
        other = run.params[self.name + more]
        return w + other if self.arithmetic == "sum" else w * other
