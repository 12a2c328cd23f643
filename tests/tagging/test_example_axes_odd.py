"""Programs that mislead about where the examples are: right, or it is said.

Each of the networks is compared with the gradients of one example at a time (see
``tests.tagging.test_example_axes``). Those under ``FOUND`` must not fall back.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import close
from tests.tagging.test_example_axes import D, N, T, first, problem, scaled


def halves(p, x):
    """A part of the batch is no axis of examples."""
    parts = x.reshape(len(x) // 2 or 1, -1, *x.shape[1:])
    return lax.scan(lambda c, a: (c, scaled(p, a).sum(1)), None, parts)[1].reshape(
        -1, D
    )


def two_uses(p, x):
    """One use of the scales can be grouped, the other one not."""
    flat = scaled(p, first(x).reshape(-1, D) * 2).reshape(-1, len(x), D)
    return scaled(p, x).sum(1) + flat.sum(0)


def with_a_constant(p, x):
    return scaled(p, x).sum(1) + scaled(
        p, jnp.arange(1.0, 1 + T * D).reshape(T, D)
    ).sum(0)


def dispatched(p, x):
    """Rows sorted by a score and written back, as to experts."""
    flat = x.reshape(-1, D)
    order = jnp.argsort(flat[:, 0])
    h = scaled(p, flat[order])
    return jnp.zeros_like(flat).at[order].set(h).reshape(x.shape).sum(1)


def backwards(p, x):
    return (scaled(p, x) + scaled(p, 2 * x[::-1])[::-1]).sum(1)


def opaque(p, x):
    """A call whose body is not followed transposes."""
    h = scaled(p, first(x))
    turn = jax.custom_derivatives.linear_call
    return turn(lambda _, a: first(a), lambda _, a: first(a), (), h).sum(1)


DOUBTFUL = [halves, two_uses, with_a_constant, dispatched, backwards, opaque]


def printed(p, x):
    jax.debug.callback(lambda v: None, x.sum())
    return scaled(p, first(x)).sum(0)


def outer(p, x):
    """Operands with axes of length one meet."""
    h = scaled(p, first(x))[:, :, None] * jnp.arange(1.0, 3)[None, None, :, None]
    return h.sum((0, 2))


def stacked(p, x):
    h = scaled(p, first(x))
    return jnp.stack([h[0], h[1], h.sum(0)], 1).sum(1)


def into_a_buffer(p, x):
    h = scaled(p, first(x))
    return lax.dynamic_update_slice(jnp.ones((T + 1, len(x), D)), h, (1, 0, 0)).sum(0)


def spectral(p, x):
    h = jnp.fft.fft(jnp.cumsum(first(x), 0)).real
    return scaled(p, lax.reduce(h, 0.0, lax.add, (0,)))


def apart(p, x):
    return sum(jnp.unstack(scaled(p, first(x)), axis=0))


def last_step(p, x):
    h = scaled(p, x.reshape(-1, D)).reshape(x.shape)
    return h[jnp.arange(len(x)), -1]


def last_step_time_first(p, x):
    last = jnp.full(len(x), T - 1)
    return scaled(p, first(x))[last, jnp.arange(len(x))]


def every_step_by_number(p, x):
    return scaled(p, x)[jnp.arange(len(x))[:, None], jnp.arange(T)[None]].sum(1)


def reshaped_in_another_order(p, x):
    """``reshape`` with an order of axes, as it makes of ``order="F"``."""
    h = scaled(p, lax.reshape(x, (T, len(x), D), dimensions=(1, 0, 2)))
    return h.sum(0)


def summed_under_vmap(p, x):
    """A mean over a mapped axis by its name."""
    mean = lambda row: scaled(p, row - lax.pmean(row, "time"))  # noqa: E731
    return jax.vmap(mean, 0, 0, axis_name="time")(first(x)).sum(0)


def factorised(p, x):
    """Scales before every kind of factorisation, one matrix an example."""

    def one(h):
        m = h @ h.T + jnp.eye(T)
        z = jnp.linalg.solve(m, h).sum(0) + jnp.linalg.cholesky(m).sum()
        z += jnp.linalg.slogdet(m)[1] + jnp.linalg.eigvalsh(m)[1:].sum()
        return z + jnp.linalg.svd(h, compute_uv=False).sum()

    return jax.vmap(lambda h: one(scaled(p, h)))(x)


def sorted_and_written(p, x):
    """Every example's steps in an order of its own, written back in place."""

    def one(h):
        order = jnp.argsort(h[:, 0])
        return jnp.zeros((T, D)).at[order].set(jnp.tanh(h[order]) * jnp.arange(D))

    return scaled(p, jax.vmap(lambda h: one(h) + lax.top_k(h, D)[0])(x)).sum(1)


def until_large(p, x):
    """A loop that ends when the data says so, for every example."""

    def one(h):
        return lax.while_loop(lambda h: h.sum() < 5, lambda h: jnp.abs(h) + 1, h)

    return scaled(p, jax.vmap(one)(x)).sum(1)


FOUND = [
    factorised, sorted_and_written, until_large, summed_under_vmap,
    printed, outer, stacked, into_a_buffer, spectral, apart, last_step,
    last_step_time_first, every_step_by_number, reshaped_in_another_order,
]  # fmt: skip


def check(case, layers, found):
    """Blocks of scales and shifts are those of the examples."""
    grads = case.gradients()
    for layer in layers:
        if layer.kind == "scale_shift" and "also used by" not in layer.note:
            g = np.stack([grads[k.strip("[]'")] for k in layer.params], -1)
            wanted = np.einsum("nuk,nul->ukl", g, g) / len(case.x)
            close(found[layer.name].blocks, wanted, 1e-9)


@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize("network", DOUBTFUL + FOUND, ids=lambda f: f.__name__)
def test_right_or_a_fallback(rng, network, n):
    case = problem(rng, network, n=n)
    if network is backwards or network is opaque:  # examples meet: no gradient of one
        case = dataclasses.replace(case, x=jnp.repeat(case.x[:1], n, 0))
    tagged, found = case.statistics(fisher="empirical")
    check(case, tagged.layers, found)
    kinds = {x.name: x.kind for x in tagged.layers}
    assert "scale_shift" in kinds.values() or network in DOUBTFUL, kinds


def test_another_argument_as_long(rng):
    """A set of other items, as many as examples, has none of the examples."""
    items = jnp.asarray(rng.normal(size=(N, D)))

    def loss(p, x, items, y):
        h = scaled(p, items)
        z = kfac.normal(jax.nn.softmax(x.sum(1) @ h.T) @ h @ p["v"])
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))

    case = problem(rng, halves)
    tagged = kfac.tag(loss, case.params, case.x, items, case.y)
    assert "scale_shift" not in {x.kind for x in tagged.layers}


@pytest.mark.parametrize("n", [N, 3])
def test_positions_as_an_argument(rng, n):
    """Terms ``[N, T]``; the scales see ``[T, D]``, which is the same for all."""
    places = jnp.asarray(rng.normal(size=(T, D)))

    def loss(p, x, places, y):
        z = kfac.normal(jnp.sin(x + scaled(p, places)[None]) @ p["v"])
        return 0.5 * jnp.mean(jnp.sum((z - y[:, None]) ** 2, -1))

    case = problem(rng, halves, n=n)
    tagged = kfac.tag(loss, case.params, case.x, places, case.y)
    assert "scale_shift" not in {x.kind for x in tagged.layers}


def test_a_part_of_the_batch(rng):
    """Rows ``[2, T]``, means over each half of the batch, are two of four examples."""

    def network(p, x):
        h = scaled(p, x.reshape(2, N // 2, T, D).mean(1))
        return jnp.repeat(h, N // 2, 0).sum(1) + x.reshape(2, 2, T, D).reshape(
            x.shape
        ).sum(1)

    case = problem(rng, network)
    tagged, _ = case.statistics(fisher="empirical")
    assert "scale_shift" not in {x.kind for x in tagged.layers}


@pytest.mark.parametrize("start", [0, 1])
def test_as_many_channels_as_terms(rng, start):
    """One shift for all of ``[N, T, N T]``; terms as an argument's axes, or a part."""
    steps = T - start
    x, y = (jnp.asarray(rng.normal(size=(N, T, N * steps))) for _ in range(2))

    def loss(p, x, y):
        x, y = x[:, start:], y[:, start:]
        return 0.5 * jnp.mean(jnp.sum((jnp.sin(x + p["b"]) - y) ** 2, -1))

    params = {"b": jnp.asarray(0.3)}
    tagged = kfac.tag(loss, params, x, y, num_examples=N * steps)
    (layer,) = tagged.layers
    assert layer.kind == ("diagonal" if start else "scale_shift")
    if layer.kind == "scale_shift":
        c = np.cos(x + 0.3) * (np.sin(x + 0.3) - y)
        wanted = np.square(c.sum(-1)).sum() / (N * T)
        found = tagged.value_and_grad(params, x, y)[-1]["b"].blocks
        close(found, np.full((1, 1, 1), wanted))


@pytest.mark.parametrize("width", [1, 2])
def test_a_convolution_over_the_batch(rng, width):
    """Its rows are examples only if it sees one at a time."""
    dims = ("NHC", "HIO", "NHC")
    kernel = jnp.asarray(rng.normal(size=(width, D, D)))

    def network(p, x):
        h = scaled(p, first(x))
        h = lax.conv_general_dilated(h, kernel, (1,), "SAME", None, None, dims)
        return h.sum(0)

    tagged, _ = problem(rng, network).statistics(fisher="empirical")
    assert ("scale_shift" in {x.kind for x in tagged.layers}) == (width == 1)


def test_labels_of_other_steps(rng):
    """What a convolution has seen is not numbered as the labels are: shapes tell."""
    dims = ("NHC", "HIO", "NHC")
    x, y = (jnp.asarray(rng.normal(size=(N, T + 1, D))) for _ in range(2))

    def loss(p, x, y):
        h = lax.conv_general_dilated(x, p["k"], (1,), "SAME", None, None, dims)
        return 0.5 * jnp.mean(jnp.sum((jnp.tanh(h) - y) ** 2, -1))

    params = {"k": jnp.asarray(rng.normal(size=(2, D, D)))}
    options = {"num_examples": N * (T + 1), "statistics": "squares"}
    (layer,) = kfac.tag(loss, params, x, y, **options).layers
    assert layer.kind == "conv"


def test_some_of_more_items(rng):
    """Of ``2 N`` items the first ``N`` are picked: an example has one, not two."""
    items = jnp.asarray(rng.normal(size=(2 * N, D)))

    def loss(p, items, y):
        z = kfac.normal(scaled(p, items)[jnp.arange(N)] @ p["v"])
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))

    case = problem(rng, halves)
    tagged = kfac.tag(loss, case.params, items, case.y)
    assert "scale_shift" not in {x.kind for x in tagged.layers}


def test_two_marks_in_two_layouts(rng):
    """Examples and steps cannot be told apart any more."""

    def loss(p, x, y):
        h = scaled(p, x)
        one = kfac.normal(h @ p["v"])
        two = kfac.normal(first(h) @ p["v"])
        wrong = jnp.sum((one - y[:, None]) ** 2, -1) + jnp.sum((two - y) ** 2, -1)
        return 0.5 * jnp.mean(wrong)

    case = problem(rng, halves)
    tagged = kfac.tag(loss, case.params, case.x, case.y)
    assert "scale_shift" not in {x.kind for x in tagged.layers}


@pytest.mark.parametrize("flat", [True, False])
def test_a_loss_over_all_data(rng, flat):
    """No argument at all: what the loss closes over is taken for the examples."""
    case = problem(rng, halves)

    def network(p, x):
        if flat:
            return scaled(p, first(x).reshape(-1, D)).reshape(T, len(x), D).sum(0)
        return scaled(p, x).sum(1)

    case = dataclasses.replace(case, network=network, marked=False)
    x, y = case.x[:3], case.y[:3]
    tagged = kfac.tag(lambda p: case.loss(p, x, y), case.params, num_examples=3)
    assert ("scale_shift" in {x.kind for x in tagged.layers}) != flat
    found = jax.jit(tagged.value_and_grad)(case.params)[-1]
    check(dataclasses.replace(case, x=x, y=y), tagged.layers, found)


def test_a_thousand_arguments_added_from_behind():
    """Axes that become equal the wrong way round do not pile up."""

    def loss(p, xs, y):
        total = xs[-1]
        for x in reversed(xs[:-1]):
            total = total + x
        z = kfac.normal(jnp.tanh(xs[-2] * p + total))
        return jnp.mean(jnp.sum((z - y) ** 2, -1))

    xs = [jnp.ones((4, 2))] * 1500
    (layer,) = kfac.tag(loss, jnp.ones(2), xs, jnp.ones((4, 2))).layers
    assert layer.kind == "scale_shift"


@pytest.mark.parametrize("seen", [slice(None), slice(1, None)])
def test_uses_in_two_orders(rng, seen):
    """Terms ``[N, T]`` in two orders at two uses: an argument's, or a part of it."""

    def loss(p, x, y):
        h = jnp.tanh(x)[:, seen]
        z = h @ p["v"] + jnp.swapaxes(jnp.sin(first(h)) @ p["v"], 0, 1)
        return 0.5 * jnp.mean(jnp.sum((z - y[:, None]) ** 2, -1))

    case = problem(rng, halves)
    times = range(*seen.indices(T))
    options = {"num_examples": N * len(times), "fisher": "empirical"}
    p = {"v": case.params["v"]}
    tagged = kfac.tag(loss, p, case.x, case.y, statistics="squares", **options)
    found = jax.jit(tagged.value_and_grad)(p, case.x, case.y)[-1]
    squares = kfac.bayes.squares(tagged.layers, found, p)
    terms = [(case.x[n, t], case.y[n, None]) for n in range(N) for t in times]
    one = jax.jit(jax.grad(lambda p, x, y: loss(p, jnp.stack([x] * T)[None], y)))
    close(squares["v"], np.mean([np.square(one(p, *t)["v"]) for t in terms], 0), 1e-9)
