"""Steps with more structure: tables, convolutions, several matrices at once."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests import oracles
from tests.fuzz.runs import Use, elementwise_use, matrix_use

LOOKUPS = (
    "index", "take", "one_hot", "columns", "scaled", "scaled_after", "clipped",
    "flat_ids",
)  # fmt: skip
POSITIONS = ("none", "added", "looked_up", "sliced")


@dataclasses.dataclass(frozen=True)
class Embed:
    """Rows of a table by token, and of another by position."""

    name: str
    vocab: int
    width: int
    form: str = "index"
    length: int = 0
    positions: str = "none"

    def shapes(self):
        turned = self.form == "columns"
        table = (self.width, self.vocab) if turned else (self.vocab, self.width)
        longer = self.length + (self.positions == "sliced")
        more = {} if self.positions == "none" else {"_positions": (longer, self.width)}
        return {self.name: table} | {self.name + k: v for k, v in more.items()}

    def looked_up(self, table, ids):
        """The rows."""
        if self.form == "take":
            return jnp.take(table, ids, axis=0)
        if self.form == "clipped":
            return jnp.take(table, ids, axis=0, mode="clip")
        if self.form == "one_hot":
            return jax.nn.one_hot(ids, self.vocab, dtype=table.dtype) @ table
        if self.form == "columns":
            return jnp.moveaxis(table[:, ids], 0, -1)
        if self.form == "scaled":
            return (math.sqrt(self.width) * table)[ids]
        if self.form == "flat_ids":
            return table[ids.ravel()].reshape(*ids.shape, -1)
        return table[ids]

    def apply(self, run, ids):
        index = run.index[self.name]
        index = index.T if self.form == "columns" else index
        scale = math.sqrt(self.width) if self.form == "scaled" else 1.0

        def uses():
            rows = jax.nn.one_hot(ids, self.vocab, dtype=jnp.float64)
            scales = (scale, 1.0)
            return [matrix_use(index, rows, scales=scales, layer="embedding")]

        z = run.site(self.looked_up(run.params[self.name], ids), uses)
        z = math.sqrt(self.width) * z if self.form == "scaled_after" else z
        if self.positions == "none":
            return z
        table, index = (d[self.name + "_positions"] for d in (run.params, run.index))
        if self.positions == "looked_up":
            rows = jnp.broadcast_to(jnp.eye(self.length), (*ids.shape, self.length))
            use = lambda: [matrix_use(index, rows, layer="embedding")]  # noqa: E731
            return run.site(z + table[jnp.arange(self.length)], use)
        if self.positions == "sliced":
            table, index = table[: self.length], index[: self.length]
        y = z + table
        return run.site(y, lambda: [elementwise_use("shift", index, 1.0, y.shape)])


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of ``[examples, *space, channels]``; permutations name its layouts.

    ``kernel_order`` brings ``[*kernel, in, out]`` to how the parameter is stored.
    """

    name: str
    n_in: int
    n_out: int
    kernel: tuple
    strides: tuple
    padding: tuple
    dilation: tuple
    spread: tuple
    groups: int = 1
    bias: bool = False
    kernel_order: tuple = ()
    input_order: tuple = ()
    output_order: tuple = ()

    def shapes(self):
        natural = (*self.kernel, self.n_in // self.groups, self.n_out)
        found = {self.name: tuple(natural[i] for i in self.kernel_order)}
        return found | ({self.name + "_bias": (self.n_out,)} if self.bias else {})

    def apply(self, run, h):
        space = len(self.kernel)
        back = np.argsort(self.kernel_order)
        inverse_in, inverse_out = map(np.argsort, (self.input_order, self.output_order))
        numbers = lax.ConvDimensionNumbers(
            tuple(map(int, inverse_in[[0, space + 1, *range(1, space + 1)]])),
            tuple(map(int, back[[space + 1, space, *range(space)]])),
            tuple(map(int, inverse_out[[0, space + 1, *range(1, space + 1)]])),
        )
        z = lax.conv_general_dilated(
            h.transpose(self.input_order),
            run.params[self.name],
            self.strides,
            self.padding,
            self.spread,
            self.dilation,
            numbers,
            self.groups,
        ).transpose([int(i) for i in inverse_out])
        groups = range(self.groups)
        index = run.index[self.name].transpose(back)
        index = index.reshape(-1, self.groups, self.n_out // self.groups)
        z = run.site(
            z, lambda: [self.use(run, index[:, g], h, z.shape, g) for g in groups]
        )
        if not self.bias:
            return z
        y = z + run.params[self.name + "_bias"]
        bias = run.index[self.name + "_bias"]
        return run.site(y, lambda: [elementwise_use("shift", bias, 1.0, y.shape)])

    def use(self, run, index, h, shape, group):
        """The use of one group's kernel: patches and channels of that group."""
        spec = oracles.Conv(
            self.kernel, self.strides, self.padding, self.spread, self.dilation,
            self.groups,
        )  # fmt: skip
        width = self.n_out // self.groups

        def cut(c, v):
            part = np.asarray(c, np.float64)[..., group * width : (group + 1) * width]
            return part.reshape(-1, width)

        return Use(
            "matrix",
            index,
            h,
            rows_of=lambda v: spec.rows(np.asarray(v))[group].reshape(-1, len(index)),
            cut=cut,
            rows=tuple(shape[:-1]),
            layer="conv",
        )


def windows(self, size):
    """Output sizes of a convolution along its axes; for the strategy."""
    found = []
    for i, n in enumerate(size):
        n = (n - 1) * self.spread[i] + 1 + sum(self.padding[i])
        reach = (self.kernel[i] - 1) * self.dilation[i] + 1
        found.append((n - reach) // self.strides[i] + 1)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Heads:
    """``[in, heads, width]``: one matrix; then ``[heads, width, out]`` back."""

    name: str
    n_in: int
    heads: int
    width: int
    bias: bool
    back: bool

    def shapes(self):
        found = {self.name: (self.n_in, self.heads, self.width)}
        if self.bias:
            found[self.name + "_bias"] = (self.heads, self.width)
        if self.back:
            found[self.name + "_back"] = (self.heads, self.width, self.n_in)
        return found

    def apply(self, run, h):
        z = jnp.einsum("...i,ihk->...hk", h, run.params[self.name])
        index = run.index[self.name].reshape(self.n_in, -1)
        z = run.site(z, lambda: [flattened(matrix_use(index, h), h)])
        if self.bias:
            z = z + run.params[self.name + "_bias"]
            bias = run.index[self.name + "_bias"]
            z = run.site(z, lambda: [elementwise_use("shift", bias, 1.0, z.shape)])
        flat = z.reshape(*h.shape[:-1], -1)
        if not self.back:
            return flat
        y = jnp.einsum("...hk,hko->...o", jnp.tanh(z), run.params[self.name + "_back"])
        index = run.index[self.name + "_back"].reshape(-1, self.n_in)
        return run.site(y, lambda: [matrix_use(index, jnp.tanh(flat))])


def flattened(use, h):
    """The use of a matrix whose outputs are several axes of the result."""
    cut = use.cut
    use.cut = lambda c, v: cut(np.asarray(c).reshape(*h.shape[:-1], -1), v)
    return use


@dataclasses.dataclass(frozen=True)
class Experts:
    """``[experts, in, out]``: a matrix for each, of shared inputs or each its own."""

    name: str
    n_in: int
    experts: int
    width: int
    shared: bool
    turned: bool
    bias: bool

    def shapes(self):
        inside = self.n_in if self.shared else self.n_in // self.experts
        last = (self.width, inside) if self.turned else (inside, self.width)
        found = {self.name: (self.experts, *last)}
        if self.bias:
            found[self.name + "_bias"] = (self.experts, self.width)
        return found

    def apply(self, run, h):
        w, index = run.params[self.name], run.index[self.name]
        letters = "eoi" if self.turned else "eio"
        index = index.swapaxes(1, 2) if self.turned else index
        if self.shared:
            z = jnp.einsum(f"...i,{letters}->...eo", h, w)
            parts = [h] * self.experts
        else:
            x = h.reshape(*h.shape[:-1], self.experts, -1)
            z = jnp.einsum(f"...ei,{letters}->...eo", x, w)
            parts = [x[..., e, :] for e in range(self.experts)]
        experts = range(self.experts)
        z = run.site(z, lambda: [self.use(run, index[e], parts[e], e) for e in experts])
        if self.bias:
            z = z + run.params[self.name + "_bias"]
            bias = run.index[self.name + "_bias"]
            z = run.site(z, lambda: [elementwise_use("shift", bias, 1.0, z.shape)])
        return z.reshape(*h.shape[:-1], -1)

    def use(self, run, index, x, e):
        """One expert's."""
        use = matrix_use(index, x)
        cut = use.cut
        use.cut = lambda c, v: cut(np.asarray(c)[..., e, :], v)
        return use
