"""Random programs, small first: what hypothesis shrinks a failure to reads easily."""

import dataclasses
import itertools

from hypothesis import strategies as st

from tests.fuzz import blocks, layers, steps
from tests.fuzz.program import NESTINGS, Head, Program
from tests.fuzz.weights import ODD, PROPER, STORES, Weight

LIKELIHOODS = ("normal", "categorical", "bernoulli")
WIDTHS = st.integers(2, 4)


class Draws:
    """What is drawn so far: the names used, and the matrices that can be shared.

    Attributes:
        draw: Hypothesis's draw.
        owned: Weights that later steps of the same level may use again.
        mapped: Whether steps are applied to each example by itself.
    """

    def __init__(self, draw):
        self.draw, self.names, self.owned = draw, itertools.count(), []
        self.sequence = self.mapped = False

    def one(self, *values):
        """One of the values; the first is the simplest."""
        return self.draw(st.sampled_from(values))

    def often(self, common, rare):
        """Mostly a common value."""
        return (
            self.one(*common) if self.draw(st.integers(0, 3)) < 3 else self.one(*rare)
        )

    def maybe(self):
        """True or false."""
        return self.draw(st.booleans())

    def name(self, letter):
        """A new name."""
        return f"{letter}{next(self.names)}"

    def weight(self, n_in, n_out):
        """A new matrix, or one that a step before has used, perhaps turned."""
        same = [w for w in self.owned if (w.n_in, w.n_out) == (n_in, n_out)]
        turned = [w for w in self.owned if (w.n_out, w.n_in) == (n_in, n_out)]
        again = same + [
            Weight(w.name, n_in, n_out, w.store, "none", not w.tie) for w in turned
        ]
        if again and self.draw(st.integers(0, 2)) == 2:
            return self.one(*again)
        arithmetic = self.often(("none",), (*PROPER, *ODD, "frozen"))
        store = self.often(("plain", "transposed"), STORES)
        weight = Weight(self.name("w"), n_in, n_out, store, arithmetic)
        if arithmetic not in ("gain", "norm", "sum", "outer_gain"):
            self.owned.append(weight)
        return weight

    def dense(self, n_in, n_out, inside=False):
        """A dense layer."""
        forms = [f for f in steps.DENSE_FORMS if not (inside and f == "flattened")]
        bias = self.often(("plus", "none"), steps.BIASES)
        order = tuple(self.draw(st.permutations((0, 1, 2, 3))))
        form = self.often(("matmul", "einsum"), forms)
        name = "" if bias == "none" else self.name("b")
        order = order if form == "einsum" else (0, 1, 2, 3)
        return steps.Dense(self.weight(n_in, n_out), form, bias, order, name)

    def scale(self, shape, inside=False):
        """A scale, a shift or both."""
        forms = [f for f in steps.SCALES if not (inside and f == "positions")]
        form = self.one(*forms)
        # Shapes alone cannot tell the terms of a sequence from the units of a context.
        vague = form == "scalar" and self.sequence and len(shape) < 2
        if vague or (form == "positions" and len(shape) < 2):
            form = "plain"
        own = {"scalar": (), "positions": shape}.get(form, shape[-1:])
        choices = (("scale", "shift"), ("scale",), ("shift",))
        return steps.Scale(self.name("n"), own, form, self.one(*choices))

    def function(self):
        """An elementwise function."""
        return steps.Function(self.often(("tanh", "sin"), tuple(steps.FUNCTIONS)))

    def body(self, shape, depth, inside=False, least=1):
        """Steps that keep the shape ``(*positions, width)`` of an example."""
        found = []
        for _ in range(self.draw(st.integers(least, 2))):
            found += self.same_shape(shape, depth, inside)
        return tuple(found)

    def same_shape(self, shape, depth, inside=False):
        """One or two steps that keep the shape."""
        width = shape[-1]
        kinds = ["dense", "function", "scale"]
        if depth:
            kinds += ["inside", "loop", "branches", "dead", "once", "complex"]
            kinds += ["bounded"] * (not self.mapped)
            kinds += ["members"] * (not inside and width == 4)
            kinds += ["mix", "context"] * (len(shape) > 1 and not inside)
            kinds += ["unrolled"] * (len(shape) == 2 and not inside)
        kind = self.one(*kinds)
        if kind == "dense":
            return [self.dense(width, width, inside), self.function()]
        if kind == "function":
            return [self.function()]
        if kind == "scale":
            return [self.scale(shape, inside)]
        if kind == "mix":
            return [steps.Mix(self.one("attend", "cumulative"))]
        if kind == "complex":
            return [self.complex(width), self.function()]
        return [self.nested(kind, shape, depth - 1, inside)]

    def simple(self, n_in, n_out):
        """A dense layer in one of the forms that take single vectors, too."""
        form = self.one("matmul", "einsum", "weight_first", "jitted", "tensordot")
        bias = self.one("none", "plus")
        name = "" if bias == "none" else self.name("b")
        return steps.Dense(self.weight(n_in, n_out), form, bias, bias_name=name)

    def complex(self, width):
        """A dense layer of complex values."""
        dense = dataclasses.replace(self.simple(width, width), bias="none")
        form = self.one("square", "parts", "turned")
        return steps.Complex(dataclasses.replace(dense, bias_name=""), form)

    def once(self, width):
        """Layers of a vector that is no example's."""
        size = self.draw(WIDTHS)
        found = [self.simple(size, width)]
        if self.maybe():
            found += [self.function(), self.simple(width, width)]
        return blocks.Once(self.one("add", "multiply", "late"), tuple(found), size)

    def nested(self, kind, shape, depth, inside):
        """A step made of steps."""
        if kind == "once":
            return self.once(shape[-1])
        if kind == "dead":
            form = self.one("unread", "stopped", "compared", "carried")
            return blocks.Dead(form, self.body(shape, depth, inside))
        if kind == "bounded":
            stacked = self.maybe()
            owned, self.owned = self.owned, [] if stacked else list(self.owned)
            body = self.body(shape, depth, inside)
            self.owned = owned
            return blocks.Bounded(body, self.one(3, 2), stacked)
        if kind == "inside":
            forms = ["residual", "jit", "checkpoint", "jit_closed", "gated", "plain"]
            forms += ["examples"] * (not inside)
            form = self.one(*forms)
            outer, self.mapped = self.mapped, self.mapped or form == "examples"
            body = self.body(shape, depth, inside or self.mapped)
            self.mapped = outer
            return blocks.Inside(form, body)
        if kind == "loop":
            form = self.one("scan", "remat", "unrolled", "reverse", "fori", "python")
            stacked = self.maybe() and form != "fori"
            owned, self.owned = self.owned, [] if stacked else list(self.owned)
            body = self.body(shape, depth, inside)
            self.owned = owned
            return blocks.Loop(form, body, self.one(2, 3), stacked)
        if kind == "branches":
            pair = self.body(shape, depth, inside), self.body(shape, depth, inside)
            # Each example would take a branch of its own: the oracle takes one for all.
            forms = ["where"] if self.mapped else ["cond", "switch", "where"]
            return blocks.Branches(self.one(*forms), pair)
        owned, self.owned = self.owned, []
        try:
            if kind == "members":
                part = (*shape[:-1], shape[-1] // 2)
                body = self.body(part, min(depth, 1), True)
                return blocks.Members(body, 2, self.maybe())
            if kind == "context":
                return blocks.Context(self.body(shape[-1:], depth, inside))
            return blocks.Unrolled(self.body(shape[-1:], depth, inside))
        finally:
            self.owned = owned

    def several(self, width):
        """A step with several matrices, and the width after it."""
        name = self.name("e")
        if self.maybe():
            back, heads, inside = self.maybe(), 2, self.one(1, 2)
            step = layers.Heads(name, width, heads, inside, self.maybe(), back)
            return step, width if back else heads * inside
        shared = self.maybe() or width % 2 == 1
        inner = self.one(2, 3)
        step = layers.Experts(name, width, 2, inner, shared, self.maybe(), self.maybe())
        return step, 2 * inner

    def conv(self, size, width):
        """A convolution that leaves positions, and the shape after it."""
        n, groups = len(size), self.one(*([1, 1, 2] if width % 2 == 0 else [1]))
        n_out = self.one(2, 4) if groups == 2 else self.draw(WIDTHS)
        axes = lambda *values: tuple(self.one(*values) for _ in range(n))  # noqa: E731
        orders = [tuple(self.draw(st.permutations(range(n + 2)))) for _ in range(3)]
        step = layers.Conv(
            self.name("k"), width, n_out, axes(2, 1, 3), axes(1, 2),
            tuple((self.one(0, 1), self.one(0, 1, 2, -1)) for _ in range(n)),
            axes(1, 1, 2), axes(1, 1, 2), groups, self.maybe(), *orders,
        )  # fmt: skip
        after = layers.windows(step, size)
        if min(after) < 1 or max(after) > 5:
            return [], (*size, width)
        return [step, self.function()], (*after, n_out)

    def first(self):
        """Input, first steps, and the shape of an example after them."""
        kind = self.one("vector", "sequence", "tokens", "signal", "image")
        width = self.draw(WIDTHS)
        if kind == "vector":
            return (width,), 0, [], (width,)
        length, self.sequence = self.one(2, 3), True
        if kind == "sequence":
            return (length, width), 0, [], (length, width)
        if kind == "tokens":
            place = self.one(*layers.POSITIONS)
            name, form = self.name("t"), self.one(*layers.LOOKUPS)
            step = layers.Embed(name, 5, width, form, length, place)
            if form not in ("columns", "scaled"):
                self.owned.append(Weight(name, 5, width))
            return (length,), 5, [step], (length, width)
        size = (self.one(4, 5),) if kind == "signal" else (3, self.one(3, 4))
        found, shape = self.conv(size, width)
        if self.maybe():
            more, shape = self.conv(shape[:-1], shape[-1])
            found = found + more
        return (*size, width), 0, found, shape

    def head(self, shape, mark, weight=None, said=True):
        """An output."""
        likelihood = self.one(*LIKELIHOODS)
        sizes = {w.n_in for w in self.owned if w.n_out == shape[-1]}
        size = self.one(3, 2, *sorted(sizes))
        pool = weight is not None and len(shape) > 1 and self.maybe()
        dense = self.dense(shape[-1], size)
        return Head(dense, likelihood, mark, weight, said, pool)


@st.composite
def programs(draw, depth=2):
    """Random programs."""
    d = Draws(draw)
    batch = d.one(3, 2, 4)
    inputs, vocab, found, shape = d.first()
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.integers(0, 3)) == 3:
            step, width = d.several(shape[-1])
            found += [step, d.function()]
            shape = (*shape[:-1], width)
        elif draw(st.integers(0, 3)) == 3:
            width = draw(WIDTHS)
            found += [d.dense(shape[-1], width), d.function()]
            shape = (*shape[:-1], width)
        else:
            found += d.same_shape(shape, depth)
    if len(shape) > 2 or (len(shape) > 1 and d.maybe()):
        found, shape = [*found, steps.Mix("pool")], shape[-1:]
    mark = d.one("marked", "marked", "masked", "unmarked")
    count = 1 if mark == "masked" else d.one(1, 1, 2)
    weights, said = [None] * count, d.maybe()
    if mark == "marked" and count == 2 and d.maybe():
        weights = [d.one(1.0, 0.5, 3.0) for _ in range(count)]
    heads = tuple(d.head(shape, mark, weight, said) for weight in weights)
    program = Program(
        batch, inputs, vocab, tuple(found), heads, nesting=d.one(*NESTINGS)
    )
    return finished(d, program)


def finished(d, program):
    """Penalties, unused parameters and a seed."""
    names = sorted(program.shapes)
    penalties = (d.one(*names),) if d.draw(st.integers(0, 4)) == 4 else ()
    unused = ("unused",) if d.draw(st.integers(0, 6)) == 6 else ()
    seed = d.draw(st.integers(0, 3))
    return Program(
        program.batch, program.inputs, program.vocab, program.steps, program.heads,
        penalties, unused, program.nesting, seed,
    )  # fmt: skip
