"""A random program: its parameters, its batch, its loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from tests.fuzz.blocks import apply_all, numbered, shapes_of
from tests.fuzz.runs import Recorder, Run
from tests.fuzz.steps import Dense

NESTINGS = ("nested", "flat", "tuple", "pairs")


@dataclasses.dataclass(frozen=True)
class Head:
    """An output: a dense layer, a likelihood, which terms count.

    ``mark``: ``"marked"``, ``"masked"``, or ``"unmarked"`` (the number of terms is then
    an argument of ``tag``). ``weight``: what the loss multiplies its mean with, and
    whether the mark is ``said`` so; ``pool``: of the mean over positions, a term for
    each example.
    """

    dense: Dense
    likelihood: str
    mark: str = "marked"
    weight: float | None = None
    said: bool = True
    pool: bool = False


def shown(value, indent=0):
    """A program as the Python that makes it, without what is at its default."""
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        inner = [shown(v, indent + 4) for v in value]
        gap = "\n" + " " * (indent + 4)
        return "(" + "".join(gap + text + "," for text in inner) + ")"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    parts = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            parts.append(f"{field.name}={shown(own, indent)}")
    return f"{type(value).__name__}({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Program:
    """Steps from the input to the value that the heads read.

    Attributes:
        batch: Number of examples.
        inputs: Shape of one example's input.
        vocab: Tokens are drawn below it; zero: real inputs.
        steps: The steps.
        heads: The outputs.
        penalties: Parameters whose squares are added to the loss.
        unused: Parameters that nothing reads.
        nesting: How parameters are put into a tree.
        seed: Of the numbers.
    """

    batch: int
    inputs: tuple
    vocab: int
    steps: tuple
    heads: tuple
    penalties: tuple = ()
    unused: tuple = ()
    nesting: str = "nested"
    seed: int = 0

    def __repr__(self):
        return shown(self)

    @property
    def coarse(self):
        """Whether numbers pass through float32 on the way."""
        return "float32" in repr(self) or "cast" in repr(self)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple]:
        """Shapes of the parameters by name, in the order of the tree's leaves."""
        steps = (*self.steps, *(head.dense for head in self.heads))
        found = shapes_of(steps) | {name: (2, 2) for name in self.unused}
        names = jax.tree.leaves(self.tree({k: k for k in sorted(found)}))
        return {k: found[k] for k in names}

    @functools.cached_property
    def index(self):
        """Numbers of the parameters' entries."""
        return numbered(self.shapes)

    def tree(self, leaves):
        """Leaves by name as the pytree that the loss takes."""
        if self.nesting == "flat":
            return dict(leaves)
        if self.nesting == "tuple":
            return tuple(leaves[k] for k in sorted(leaves))
        if self.nesting == "pairs":
            return [{"leaf": (leaves[k],)} for k in sorted(leaves)]
        nested: dict = {}
        for name, leaf in leaves.items():
            part, _, rest = name.partition("_")
            nested.setdefault(part, {})[rest or "main"] = leaf
        return nested

    def leaves(self, tree) -> dict:
        """Leaves by name, of such a pytree."""
        return dict(zip(self.shapes, jax.tree.leaves(tree), strict=True))

    def params(self):
        """Parameters, none zero and no two equal."""
        rng = np.random.default_rng(self.seed)
        return self.tree(
            {k: jnp.asarray(0.7 * rng.normal(size=s)) for k, s in self.shapes.items()}
        )

    @functools.cached_property
    def arguments(self):
        """The inputs, one target for every head and a mask."""
        rng = np.random.default_rng(self.seed + 1)
        shape = (self.batch, *self.inputs)
        x = rng.normal(size=shape)
        if self.vocab:
            x = rng.integers(0, self.vocab, shape)
        zeros = jax.eval_shape(self.outputs, self.params(), jnp.asarray(x))
        targets = []
        for head, z in zip(self.heads, zeros, strict=True):
            y = rng.normal(size=z.shape)
            if head.likelihood == "bernoulli":
                y = (y > 0).astype(float)
            if head.likelihood == "categorical":
                y = rng.integers(0, z.shape[-1], z.shape[:-1])
            targets.append(jnp.asarray(y))
        mask = rng.random(zeros[0].shape[:-1]) < 0.7  # of a single head
        mask.flat[0] = True
        return jnp.asarray(x), tuple(targets), jnp.asarray(mask)

    @functools.cached_property
    def terms(self):
        """Terms that the loss averages over, masked or not."""
        mask = self.arguments[-1]
        return mask.size

    @functools.cached_property
    def head_terms(self):
        """Terms of every head, and their weights in the loss."""
        targets = self.arguments[1]
        sizes = []
        for head, y in zip(self.heads, targets, strict=True):
            sizes.append(y.size if head.likelihood == "categorical" else y[..., 0].size)
        return sizes, [head.weight or 1.0 for head in self.heads]

    @property
    def weighted(self):
        """Whether its heads have weights or numbers of terms of their own."""
        return any(head.weight is not None for head in self.heads)

    @property
    def masked(self):
        return any(head.mark == "masked" for head in self.heads)

    def outputs(self, params, x, run=None):
        """What the heads compute, and the run."""
        run = run or Run(self.leaves(params), self.index, self.batch)
        h = apply_all(self.steps, run, x)
        pooled = h.reshape(h.shape[0], -1, h.shape[-1]).mean(1)
        return [
            head.dense.apply(run, pooled if head.pool else h) for head in self.heads
        ]

    def term_losses(self, outputs, targets):
        """Losses of the terms, head by head."""
        found = []
        for head, z, y in zip(self.heads, outputs, targets, strict=True):
            if head.likelihood == "categorical":
                logp = jax.nn.log_softmax(z)
                each = -jnp.take_along_axis(logp, y[..., None], -1)[..., 0]
            elif head.likelihood == "bernoulli":
                each = (jax.nn.softplus(z) - y * z).sum(-1)
            else:
                each = 0.5 * ((z - y) ** 2).sum(-1)
            found.append(each)
        return found

    def data_loss(self, outputs, targets, mask):
        """The mean of the terms that count, of every head times its weight."""
        found = self.term_losses(outputs, targets)
        if self.masked:
            return jnp.where(mask, found[0], 0).sum() / mask.sum()
        pairs = zip(self.head_terms[1], found, strict=True)
        return sum(weight * each.mean() for weight, each in pairs)

    def loss(self, params, x, targets, mask, marks=True):
        """What the user writes."""
        outputs = self.outputs(params, x)
        if marks:
            pairs = zip(self.heads, outputs, strict=True)
            outputs = [self.marked(*pair, mask) for pair in pairs]
        leaves, total = self.leaves(params), self.data_loss(outputs, targets, mask)
        for name in self.penalties:
            total = total + 0.01 * jnp.sum(leaves[name] ** 2)
        return total

    def plain_loss(self, *args):
        """The same without marks."""
        return self.loss(*args, marks=False)

    def marked(self, head, z, mask):
        """An output under its likelihood."""
        if head.mark == "unmarked":
            return z
        own = mask if head.mark == "masked" else None
        weight = head.weight if head.said else None
        return getattr(kfac, head.likelihood)(z, mask=own, weight=weight)

    def tag(self, **options):
        """The tagged loss."""
        if self.heads[0].mark == "unmarked":
            options["num_examples"] = self.terms
        return kfac.tag(self.loss, self.params(), *self.arguments, **options)


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a recorded run found.

    Attributes:
        uses: Every place where entries of parameters meet data.
        inputs: For every use its ``x``, and whether its branch ran.
        cotangents: By fisher, for every site ``[columns, …]``.
        reach: For every site, which heads depend on it.
    """

    uses: list
    inputs: list
    cotangents: dict
    reach: list


def only(outputs, number):
    """Some cotangent of one of the outputs."""
    return [
        jnp.cos(jnp.arange(z.size)).reshape(z.shape) * (k == number)
        for k, z in enumerate(outputs)
    ]


def record(program, params, exact):
    """A traceable ``() -> arrays``, and what makes a ``Recording`` of them."""
    x, targets, mask = program.arguments
    kept = {}

    def run(offsets):
        leaves = program.leaves(params)
        recorder = Recorder(leaves, program.index, program.batch, offsets)
        outputs = program.outputs(params, x, recorder)
        for name in program.penalties:
            recorder.odd(program.index[name])
        kept["uses"], kept["shapes"] = recorder.uses, recorder.shapes
        taken = [jnp.asarray(use.taken) for use in recorder.uses]
        return outputs, ([use.x for use in recorder.uses], taken)

    def arrays():
        jax.eval_shape(lambda: run(None))
        zeros = [jnp.zeros(s.shape, s.dtype) for s in kept["shapes"]]
        outputs, pull, found = jax.vjp(run, zeros, has_aux=True)
        at = jax.grad(lambda z: program.data_loss(z, targets, mask))(outputs)
        empirical = jax.tree.map(lambda c: c[None], pull(at)[0])
        pulls = jax.vmap(lambda c: pull(c)[0])
        reach = [
            [jnp.any(c != 0) for c in pull(only(outputs, k))[0]]
            for k in range(len(outputs) if program.weighted else 0)
        ]
        columns = pulls(roots(program, outputs)) if exact else None
        return found, empirical, columns, reach

    def finish(found):
        (inputs, taken), empirical, exact, reach = jax.tree.map(np.asarray, found)
        pairs = list(zip(inputs, taken, strict=True))
        cotangents = {"empirical": empirical, "exact": exact}
        heads = [tuple(np.flatnonzero(own)) for own in zip(*reach, strict=True)]
        return Recording(kept["uses"], pairs, cotangents, heads)

    return arrays, finish


def roots(program, outputs):
    """Columns of a square root of the output's Hessian, over the number of terms.

    With ``ω = w_k / N_k`` a row of head k has ``√(ω / N_1)``: as every statistic
    multiplies with ``N_1``, the product is ``ω``.
    """
    columns, first = [], program.head_terms[0][0]
    for number, (head, z) in enumerate(zip(program.heads, outputs, strict=True)):
        size, weight = (own[number] for own in program.head_terms)
        mask = jnp.full(z.shape[:-1], (weight / size / first) ** 0.5)
        if program.masked:
            mask = program.arguments[-1] / program.arguments[-1].sum()
        root = square_root(head.likelihood, z)
        for j in range(z.shape[-1]):
            column = [jnp.zeros_like(other) for other in outputs]
            column[number] = root[..., j] * mask[..., None]
            columns.append(column)
    return [jnp.stack(parts) for parts in zip(*columns, strict=True)]


def square_root(likelihood, z):
    """``S`` with ``S Sᵀ`` the Hessian, as in ``oracles.output_root``, traceable."""
    eye = jnp.eye(z.shape[-1])
    if likelihood == "categorical":
        p = jax.nn.softmax(z)
        root = jnp.sqrt(p)
        return eye * root[..., None, :] - p[..., :, None] * root[..., None, :]
    if likelihood == "bernoulli":
        p = jax.nn.sigmoid(z)
        return eye * jnp.sqrt(p * (1 - p))[..., None, :]
    return jnp.broadcast_to(eye, (*z.shape, z.shape[-1]))
