"""Where the examples are: programs with as many steps as examples, in any layout.

The oracle runs one example at a time: ``g_n`` is the gradient of its loss alone, so
that a block of scales or shifts is ``(1/N) Σ_n g_n g_nᵀ`` and a square ``(1/N) Σ_n
g_n²``.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from kfac_jax_lite.tagging.example_axes import (
    Index,
    positions_per_example,
    reshaped,
    settled,
    unify,
)
from tests.helpers import cases, close

N = T = 4
D = 3
SHAPES = {"s": (D,), "b": (D,), "w": (D, D), "v": (D, 2), "e": (6, D), "k": (3, D, D)}


def first(x):
    """Time first."""
    return jnp.swapaxes(x, 0, 1)


def scaled(p, h):
    return jnp.tanh(jnp.tanh(h) * p["s"] + p["b"])


def swapped(p, x):
    return scaled(p, first(x)).sum(0)


def batch_first(p, x):
    return scaled(p, x).sum(1)


def flattened(p, x):
    h = scaled(p, x.reshape(-1, D)) @ p["w"]
    return jnp.sin(h.reshape(x.shape)).sum(1)


def merged_elsewhere(p, x):
    """Width and time in one axis, apart again, examples in the middle."""
    h = jnp.transpose(x, (1, 2, 0)).reshape(T * D, len(x))
    h = jnp.transpose(h.reshape(T, D, len(x)), (0, 2, 1))
    return scaled(p, h).sum(0)


def dense_layer(p, x):
    return jnp.tanh(jnp.tanh(first(x)) @ p["w"] + p["b"]).sum(0)


def experts(p, x):
    """Two experts on one input, time first."""
    w = jnp.stack([p["w"], p["w"]])
    return jnp.tanh(jnp.einsum("tnd,edk->tnek", first(x), w)).sum((0, 2))


def scanned(p, x):
    """A recurrent layer over time, its outputs stacked up."""

    def step(h, x):
        h = jnp.tanh(x + h @ p["w"])
        return h, h

    _, h = lax.scan(step, jnp.zeros((len(x), D)), first(x))
    return scaled(p, h).sum(0)


def recurrent_scale(p, x):
    """The scale itself inside the loop: sums over steps."""

    def step(h, x):
        return jnp.tanh((x + h) * p["s"] + p["b"]), None

    return lax.scan(step, jnp.zeros((len(x), D)), first(x))[0]


def mapped(p, x):
    return jax.vmap(lambda row: scaled(p, row), 1, 0)(x).sum(0)


def branches(p, x):
    h = first(x)
    h = lax.cond(x.sum() > 0, lambda h: jnp.sin(h), lambda h: h * 2, h)
    return scaled(p, h).sum(0)


def called(p, x):
    inner = jax.checkpoint(jax.jit(lambda p, h: scaled(p, h)))
    return inner({k: p[k] for k in ("s", "b")}, first(x)).sum(0)


def padded(p, x):
    """Steps put in front and dropped behind: the time axis is a new one, twice."""
    h = jnp.pad(first(x), ((1, 0), (0, 0), (0, 0)))[:-1]
    h = jnp.concatenate([h[1:], h[:1]])
    return scaled(p, h).sum(0)


def pooled(p, x):
    h = lax.reduce_window(first(x), -jnp.inf, lax.max, (2, 1, 1), (1, 1, 1), "SAME")
    return scaled(p, h).sum(0)


def convolved(p, x):
    """A convolution over time; its result time first."""
    dims = ("NHC", "HIO", "NHC")
    h = lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=dims)
    return scaled(p, first(h)).sum(0)


def pointwise(p, x):
    """A convolution with a kernel of one step; its batch is the time axis."""
    dims = ("NHC", "HIO", "NHC")
    kernel = jnp.eye(D)[None] / 2
    h = lax.conv_general_dilated(first(x), kernel, (1,), "SAME", (1,), (1,), dims)
    return scaled(p, h).sum(0)


def attention(p, x):
    h = first(x)
    scores = jnp.einsum("tnd,snd->nts", h @ p["w"], h)
    h = jnp.einsum("nts,snd->tnd", jax.nn.softmax(scores), h)
    return scaled(p, h).sum(0)


def looked_up(p, x):
    """Token numbers time first, as an embedding sees them."""
    tokens = jnp.abs(first(x)[..., 0] * 10).astype(int) % 6
    return scaled(p, p["e"][tokens]).sum(0)


def picked(p, x):
    """Single steps taken by number from a whole sequence."""
    h = jnp.take(first(x), jnp.array([2, 0, 1, 3]), axis=0)
    best, _ = lax.top_k(h, D)
    return scaled(p, best + jnp.sort(h, 0)).sum(0)


def numbered_axes(p, x):
    """Axes as NumPy's integers."""
    h = scaled(p, first(x))
    h = lax.concatenate([h, h], np.int64(0)) + lax.cumsum(jnp.tile(h, (2, 1, 1)), 0)
    return lax.reduce_sum(h, (np.int64(0),))


def halves(p, x):
    left, right = jnp.split(first(x), 2, axis=0)
    return scaled(p, jnp.tile(left + right, (2, 1, 1))).sum(0)


def loop(p, x):
    h = lax.fori_loop(0, 2, lambda i, h: h * 2, first(x) / 4)
    return scaled(p, lax.stop_gradient(h)).sum(0)


def carried(p, x):
    """A value of three axes in a loop; its examples are mixed (by 1) on the way."""

    def step(h, _):
        return jnp.einsum("tnd,nm->tmd", scaled(p, h), jnp.eye(len(x))), None

    return lax.scan(step, first(x), None, 2)[0].sum(0)


SCALES = [
    swapped, batch_first, flattened, merged_elsewhere, scanned, recurrent_scale, mapped,
    carried, branches, called, padded, pooled, convolved, pointwise, attention,
    looked_up, picked, numbered_axes, halves, loop,
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, marked or not, and the gradients of its examples."""

    network: Callable
    params: dict
    x: jax.Array
    y: jax.Array
    marked: bool = True

    def loss(self, p, x, y):
        z = self.network(p, x) @ p["v"]
        z = kfac.normal(z) if self.marked else z
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))

    def gradients(self):
        """``g_n`` by leaf, one example after the other."""
        one = jax.jit(jax.grad(self.loss))
        rows = range(len(self.x))
        each = [one(self.params, self.x[n, None], self.y[n, None]) for n in rows]
        return {k: np.stack([g[k] for g in each]) for k in self.params}

    def statistics(self, **options):
        tagged = kfac.tag(self.loss, self.params, self.x, self.y, **options)
        found = jax.jit(tagged.value_and_grad)(self.params, self.x, self.y)
        return tagged, found[-1]


def problem(rng, network, marked=True, n=N):
    shapes = dict(SHAPES)
    if network is not looked_up:
        del shapes["e"]
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = rng.normal(size=(n, T, D)), rng.normal(size=(n, 2))
    return Problem(network, params, jnp.asarray(x), jnp.asarray(y), marked)


@pytest.mark.parametrize(
    ("network", "marked", "n"),
    [(f, True, N) for f in SCALES]
    + [(f, False, N) for f in (swapped, scanned, attention)]
    + [(swapped, True, n) for n in (1, 2, 3, 8)],
)
def test_scales_and_shifts(rng, network, marked, n):
    """``F_u = (1/N) Σ_n g_n g_nᵀ`` however the sequence lies."""
    case = problem(rng, network, marked, n)
    tagged, found = case.statistics(fisher="empirical")
    layer = next(x for x in tagged.layers if x.kind == "scale_shift")
    grads = case.gradients()
    keys = [key.strip("[]'") for key in layer.params]
    g = np.stack([grads[k] for k in keys], -1)
    wanted = np.einsum("nuk,nul->ukl", g, g) / n
    assert set(keys) == {"s", "b"}
    close(found[layer.name].blocks, wanted, 1e-9)


FAST = [merged_elsewhere, recurrent_scale, numbered_axes, looked_up, dense_layer]


@pytest.mark.parametrize("network", cases([*SCALES, dense_layer], FAST))
def test_squares(rng, network):
    case = problem(rng, network)
    tagged, found = case.statistics(fisher="empirical", statistics="squares")
    squares = kfac.bayes.squares(tagged.layers, found, case.params)
    for name, g in case.gradients().items():
        close(squares[name], (g**2).mean(0), 1e-9)


@pytest.mark.parametrize("n", [N, 2 * T, 3])
def test_reduce_averages_over_time(rng, n):
    """``A`` of mean inputs, ``G`` of summed cotangents, time first, any length."""
    case = problem(rng, dense_layer, n=n)
    tagged, found = case.statistics(fisher="empirical", weight_sharing="reduce")
    p, x, y = case.params, case.x, case.y

    def loss(offset):
        z = jnp.tanh(jnp.tanh(x) @ p["w"] + p["b"] + offset).sum(1) @ p["v"]
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))

    c = jax.grad(loss)(jnp.zeros_like(x)).sum(1)
    a = jnp.concatenate([jnp.tanh(x).mean(1), jnp.ones((n, 1))], 1)
    (layer,) = [x for x in tagged.layers if x.roles == ("weight", "bias")]
    close(found[layer.name].a, a.T @ a / n, 1e-9)
    close(found[layer.name].g, c.T @ c * n, 1e-9)


def test_reduce_of_a_lookup(rng):
    """Token counts of an example, time first: the diagonal of the mean's square."""

    def network(p, x):
        return jnp.tanh(p["e"][jnp.swapaxes(x, 0, 1)]).sum(0)

    tokens = jnp.asarray(rng.integers(0, 6, (N, T)))
    case = dataclasses.replace(problem(rng, looked_up), network=network, x=tokens)
    _, found = case.statistics(fisher="empirical", weight_sharing="reduce")
    counts = np.stack([np.bincount(row, minlength=6) for row in tokens]) / T
    close(found["e"].a, (counts**2).mean(0), 1e-12)


def test_terms_of_two_axes(rng):
    """A language model's terms: logits batch first, the network time first."""

    def loss(p, x, y):
        h = scaled(p, first(x)) @ p["v"]
        z = kfac.normal(jnp.swapaxes(h, 0, 1))
        return 0.5 * jnp.mean(jnp.sum((z - y[:, None]) ** 2, -1))

    case = problem(rng, swapped, n=3)
    p = {k: case.params[k] for k in ("s", "b", "v")}
    tagged = kfac.tag(loss, p, case.x, case.y, fisher="empirical")
    (layer,) = [x for x in tagged.layers if x.kind == "scale_shift"]
    found = jax.jit(tagged.value_and_grad)(p, case.x, case.y)[-1][layer.name]
    one = jax.jit(jax.grad(loss))
    pairs = [(n, t) for n in range(3) for t in range(T)]
    each = [
        one(p, case.x[n, t][None, None], case.y[n, None]) for n, t in pairs
    ]  # fmt: skip
    keys = [key.strip("[]'") for key in layer.params]
    g = np.stack([np.stack([e[k] for k in keys], -1) for e in each])
    close(found.blocks, np.einsum("nuk,nul->ukl", g, g) / len(pairs), 1e-9)


def picks(p, x):
    """Picked by numbers that depend on the data: the axes are not followed."""
    return scaled(p, x)[jnp.argsort(x[:, 0, 0])].sum(1)


def steps_first(p, x):
    """Flattened time first: an example's rows are not side by side."""
    return scaled(p, first(x).reshape(-1, D)).reshape(T, len(x), D).sum(0)


@pytest.mark.parametrize(
    ("network", "n"), [(picks, N), (steps_first, N), (steps_first, 3)]
)
def test_what_cannot_be_grouped_falls_back(rng, network, n):
    case = problem(rng, network, n=n)
    tagged, _ = case.statistics(fisher="empirical")
    notes = {x.name: x.note for x in tagged.layers if x.kind == "diagonal"}
    assert f"axis of {n} examples" in notes["s"]


@pytest.mark.parametrize(
    ("rows", "examples", "each"),
    [
        ((4,), 4, 1),
        ((12,), 4, None),
        ((4, 3), 4, 3),
        ((4, 3), 12, 1),
        ((1, 4, 3), 4, 3),
        ((4, 4), 4, None),
        ((8, 4), 4, None),
        ((2, 3, 6), 6, None),
        ((5, 4), 1, 20),
        ((), 3, None),
    ],
)
def test_positions_by_shape(rows, examples, each):
    assert positions_per_example(rows, examples) == each


def test_axes_that_meet_are_one():
    """A flattened axis that meets another one splits as that does."""
    time, batch, flat = Index(6), Index(4), Index(24)
    unify((time, batch), (flat,))
    assert settled((flat,)) == (time, batch)
    (both, width) = reshaped(((flat,), (Index(5),)), (24, 5))
    assert settled(both) == (time, batch) and len(width) == 1


def test_long_chains():
    """Thousands of values that meet one after the other, a new one first."""
    value = first = (Index(4),)
    for _ in range(5000):
        value, old = (Index(4),), value
        unify(value, old)
    assert settled(value) == settled(first)


def test_axes_that_split():
    """``[12] -> [3, 4] -> [12]`` is the same axis; ``[3, 4] -> [4, 3]`` is not."""
    (flat,) = axes = ((Index(12),),)
    rows, columns = reshaped(axes, (3, 4))
    assert settled(flat) == (*rows, *columns)
    (again,) = reshaped((rows, columns), (12,))
    assert settled(again) == settled(flat)
    cut = reshaped((rows, columns), (4, 3))
    assert not set(rows + columns) & {i for axis in cut for i in axis}


def test_sizes_that_do_not_divide():
    """6 × 4 against 4 × 6: nothing can be said, nothing is."""
    left, right = (Index(6), Index(4)), (Index(4), Index(6))
    unify(left, right)
    assert settled(left) == left and settled(right) == right
    assert reshaped(((), left), (0, 24)) == ((), left)


def test_a_parameter_repeated_without_data(rng):
    """Repeats are no examples, though there are as many."""

    def loss(p, x, y):
        kernel = jnp.broadcast_to(p["s"], (N, D)).reshape(D, N)
        z = kfac.normal(jnp.tanh(x.sum(1) @ kernel)[:, :2])
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))

    case = problem(rng, swapped)
    tagged = kfac.tag(loss, {"s": case.params["s"]}, case.x, case.y)
    assert [x.kind for x in tagged.layers] == ["diagonal"]
