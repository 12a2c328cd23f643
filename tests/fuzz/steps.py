"""Steps of a random program that use parameters, and those that use none.

A value is ``[examples, *positions, width]`` between steps, whatever order of axes a
step takes inside. ``shapes()`` names a step's parameters; ``apply(run, h)`` runs it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.runs import elementwise_use, matrix_use
from tests.fuzz.weights import Weight

LETTERS = "bstu"


@jax.custom_vjp
def own_product(x, w):
    """``x @ w`` with a derivative of its own."""
    return x @ w


own_product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, c: (
        c @ kept[1].T,
        jnp.tensordot(kept[0], c, (tuple(range(c.ndim - 1)),) * 2),
    ),
)


@jax.custom_vjp
def own_softsign(x):
    """An activation with a derivative of its own."""
    return x / (1 + jnp.abs(x))


own_softsign.defvjp(
    lambda x: (x / (1 + jnp.abs(x)), x), lambda x, c: (c / (1 + jnp.abs(x)) ** 2,)
)


@jax.custom_jvp
def own_cube(x):
    """Another, by its tangent."""
    return 0.1 * x**3


@own_cube.defjvp
def own_cube_jvp(primals, tangents):
    """Its tangent."""
    (x,), (t,) = primals, tangents
    return own_cube(x), 0.3 * x**2 * t


FUNCTIONS = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "own_softsign": own_softsign,
    "own_cube": own_cube,
    "jitted": jax.jit(jnp.tanh),
    "checkpointed": jax.checkpoint(lambda x: jnp.sin(x) * x),
    "gate": lambda h: h * jax.nn.sigmoid(h),
    "float32": lambda h: jnp.tanh(h.astype(jnp.float32)).astype(h.dtype),
}


@dataclasses.dataclass(frozen=True)
class Function:
    """An elementwise function."""

    name: str

    def shapes(self):
        return {}

    def apply(self, run, h):
        return FUNCTIONS[self.name](h)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixes the positions of an example: attention, a sum up to here, the mean."""

    name: str

    def shapes(self):
        return {}

    def apply(self, run, h):
        flat = h.reshape(h.shape[0], -1, h.shape[-1])
        if self.name == "pool":
            return flat.mean(1)
        if self.name == "cumulative":
            return jnp.cumsum(flat, 1).reshape(h.shape)
        scores = jnp.einsum("bti,bsi->bts", flat, flat)
        return jnp.einsum("bts,bsi->bti", jax.nn.softmax(scores), flat).reshape(h.shape)


DENSE_FORMS = (
    "matmul", "einsum", "weight_first", "flattened", "vmapped", "own_product", "jitted",
    "tensordot",
)  # fmt: skip
BIASES = (
    "none", "plus", "front", "late", "broadcast", "minus", "half", "column", "negated",
    "twice", "after", "read_twice",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dense:
    """``h W + b``; ``order`` shuffles the axes that an einsum sees."""

    weight: Weight
    form: str = "matmul"
    bias: str = "none"
    order: tuple = (0, 1, 2, 3)
    bias_name: str = ""

    def shapes(self):
        shape = (
            (self.weight.n_out, 1) if self.bias == "column" else (self.weight.n_out,)
        )
        own = {} if self.bias == "none" else {self.bias_name: shape}
        return self.weight.shapes() | own

    def apply(self, run, h):
        w, index, scales = self.weight.read(run)
        z = self.product(h, w)

        def uses():
            if index is None:
                return []
            return [matrix_use(index, h, scales=scales)]

        if self.form == "flattened" and self.bias in ("plus", "front"):
            z = run.site(z, uses).reshape(-1, z.shape[-1])
            b = run.params[self.bias_name]
            z = (z + b if self.bias == "plus" else b + z).reshape(*h.shape[:-1], -1)
            return run.site(z, lambda: [self.bias_use(run, z.shape)])
        return self.biased(run, run.site(z, uses))

    def product(self, h, w):
        """``h W``."""
        if self.form == "einsum":
            return self.einsum(h, w)
        if self.form == "weight_first":
            z = lax.dot_general(w, h, (((0,), (h.ndim - 1,)), ((), ())))
            return jnp.moveaxis(z, 0, -1)
        if self.form == "flattened":
            z = h.reshape(-1, h.shape[-1]) @ w
            return z.reshape(*h.shape[:-1], -1)
        if self.form == "vmapped":
            row = lambda x: w.T @ x  # noqa: E731
            for _ in h.shape[:-1]:
                row = jax.vmap(row)
            return row(h)
        if self.form == "own_product":
            return own_product(h, w)
        if self.form == "jitted":
            return jax.jit(jnp.dot)(h, w)
        if self.form == "tensordot":
            return jnp.tensordot(h, w, ((h.ndim - 1,), (0,)))
        return h @ w

    def einsum(self, h, w):
        """Operands with their axes shuffled, and the result shuffled back."""
        axes = [i for i in self.order if i < h.ndim]
        letters = [*LETTERS[: h.ndim - 1], "i"]
        left = "".join(letters[i] for i in axes)
        right, matrix = ("oi", w.T) if self.order[0] % 2 else ("io", w)
        out = left[::-1].replace("i", "o")
        z = jnp.einsum(f"{left},{right}->{out}", h.transpose(axes), matrix)
        back = [out.index(c) for c in [*letters[:-1], "o"]]
        return z.transpose(back)

    def bias_use(self, run, shape, x=1.0):
        index = run.index[self.bias_name].reshape(-1)
        return elementwise_use("shift", index, x, shape)

    def biased(self, run, z):
        """The product plus the bias, in many ways."""
        if self.bias == "none":
            return z
        b, sign = run.params[self.bias_name], 1.0
        if self.bias == "front":
            y = b + z
        elif self.bias == "late":
            y = (z[..., None, :] + b)[..., 0, :]
        elif self.bias == "broadcast":
            y = z + jnp.broadcast_to(b, z.shape)
        elif self.bias == "column":
            y = z + b[:, 0]
        elif self.bias == "half":
            y, sign = z + 0.5 * b, 0.5
        elif self.bias == "minus":
            y, sign = z - b, -1.0
        elif self.bias == "negated":
            y, sign = b - z, 1.0
        elif self.bias == "after":
            y = jnp.tanh(z) + b
        else:
            y = z + b
        y = run.site(y, lambda: [self.bias_use(run, y.shape, sign)])
        if self.bias == "twice":
            again = jnp.tanh(y) + b
            y = run.site(again, lambda: [self.bias_use(run, y.shape)])
        return jnp.tanh(y) + z if self.bias == "read_twice" else y


@dataclasses.dataclass(frozen=True)
class Complex:
    """A real weight on complex values; their real and imaginary parts are two rows."""

    dense: Dense
    form: str  # "square" | "parts" | "turned"

    def shapes(self):
        return self.dense.shapes()

    def apply(self, run, h):
        pair = h, jnp.roll(h, 1, -1) * 0.8
        if run.recording:
            re, im = (self.dense.apply(run, x) for x in pair)
        else:
            z = self.dense.apply(run, lax.complex(*pair))
            if self.form == "square":
                return jnp.abs(z) ** 2
            if self.form == "turned":
                z = jnp.exp(0.5j) * z
                return z.real * z.imag
            re, im = z.real, z.imag
        if self.form == "square":
            return re**2 + im**2
        if self.form == "turned":
            c, s = jnp.cos(0.5), jnp.sin(0.5)
            return (c * re - s * im) * (s * re + c * im)
        return re * jnp.sin(im)


SCALES = ("plain", "rms", "layer", "grouped", "one_plus", "front", "scalar",
          "positions", "channel_first", "divided")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """``x̂ γ + β`` with ``x̂`` normalised or not; ``parts`` are those that there are."""

    name: str
    shape: tuple
    form: str = "plain"
    parts: tuple = ("scale", "shift")

    def shapes(self):
        return {f"{self.name}_{part}": self.shape for part in self.parts}

    def apply(self, run, h):
        x = self.normalised(h)
        if "scale" in self.parts:
            name = self.name + "_scale"
            g, y = run.params[name], None
            if self.form == "one_plus":
                y = x * (1 + g)
            elif self.form == "front":
                y = g * x
            elif self.form == "grouped":
                y = (h - h.mean(-1, keepdims=True)) * (self.rate(h) * g)
            elif self.form == "channel_first":
                ones = (1,) * (x.ndim - 1)
                y = jnp.moveaxis(jnp.moveaxis(x, -1, 0) * g.reshape(-1, *ones), 0, -1)
            elif self.form == "divided":
                y = x / (2 + g * g)
            else:
                y = x * g
            if self.form == "divided":
                run.odd(run.index[name])
            else:
                index = run.index[name]
                y = run.site(y, lambda: [elementwise_use("scale", index, x, h.shape)])
            return self.shifted(run, y)
        return self.shifted(run, x)

    def shifted(self, run, x):
        """Plus the shift, if there is one."""
        if "shift" in self.parts:
            name = self.name + "_shift"
            y, index = x + run.params[name], run.index[name]
            x = run.site(y, lambda: [elementwise_use("shift", index, 1.0, y.shape)])
        return x

    def rate(self, h):
        return lax.rsqrt(h.var(-1, keepdims=True) + 0.1)

    def normalised(self, h):
        if self.form in ("layer", "grouped"):
            return (h - h.mean(-1, keepdims=True)) * self.rate(h)
        if self.form == "rms":
            return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 0.1)
        return h
