"""Masks, several outputs, tied and stacked layers, regularisers, large factors."""

import functools
import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.curvature.kronecker import nearest_product
from tests import models
from tests.helpers import cases, close
from tests.information import LAWS, Problem

ravel = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])  # noqa: E731
KEY = 3


def make(law, tagged, params, batches, approximation="full", **options):
    """The operator; labels are drawn with a fixed key."""
    if law == "mc_fisher":
        options = {"key": jax.random.key(KEY), "num_samples": 2}
    build = getattr(kfac.curvature, law)
    return build(tagged, params, batches, approximation, **options)


def jacobian(apply, params, *args):
    """``[rows, C, P]`` of a network in explicit form."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    out = jax.jit(jax.jacrev(lambda w: apply(unravel(w), *args)))(flat)
    return np.asarray(out).reshape(-1, out.shape[-2], flat.size)


# ---------------------------------------------------------------- masks

MASK = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool)


def masked_loss(p, x, y, mask):
    """Mean over the tokens that count."""
    z = kfac.categorical(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], mask=mask)
    terms = jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]
    return -jnp.where(mask, terms, 0).sum() / mask.sum()


MASKED = itertools.product(
    [law for law in LAWS if law != "mc_fisher"], ["full", "unit_wise", "ekfac"]
)
FAST = [("ggn", "full"), ("ggn", "ekfac"), ("hessian", "full")]
FAST += [("empirical_fisher", "unit_wise"), ("gradient_covariance", "full")]


@pytest.mark.parametrize(("law", "approximation"), cases(MASKED, FAST))
def test_rows_that_do_not_count(law, approximation, rng):
    """Padded tokens are not there, over batches with different shares of them."""
    params = {"w": rng.normal(size=(2, 3)), "b": rng.normal(size=3)}
    params |= {"v": rng.normal(size=(3, 3))}
    x, y = rng.normal(size=(4, 2, 2)), rng.integers(0, 3, (4, 2))
    params, x, y, mask = jax.tree.map(jnp.asarray, (params, x, y, MASK))
    tagged = kfac.tag(masked_loss, params, x[:2], y[:2], mask[:2])
    batches = [(x[i : i + 2], y[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    seen = make(law, tagged, params, batches, approximation)
    left = x[MASK], y[MASK], jnp.ones(int(MASK.sum()), bool)
    plain = kfac.tag(masked_loss, params, *left)
    wanted = make(law, plain, params, [left], approximation)
    assert seen.num_examples == wanted.num_examples == 5
    # The statistics are rescaled by a count of rows that is kept in float32.
    tolerance = 1e-6 if approximation == "ekfac" else 1e-9
    close(seen.to_dense(), wanted.to_dense(), tolerance)


def test_drawn_labels_only_count_where_the_mask_says(rng):
    x, y = jnp.asarray(rng.normal(size=(4, 2, 2))), jnp.zeros((4, 2), int)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (2, 3)), "b": jnp.ones(3),
        "v": jax.random.normal(keys[1], (3, 3)),
    }  # fmt: skip
    tagged = kfac.tag(masked_loss, params, x, y, jnp.asarray(MASK))
    for mask, scale in ((MASK, 1.0), (np.zeros_like(MASK), 0.0)):
        op = make("mc_fisher", tagged, params, [(x, y, jnp.asarray(mask))])
        matrix = np.asarray(op.to_dense())
        assert np.linalg.matrix_rank(matrix) <= 2 * mask.sum()
        assert (np.abs(matrix).max() > 0) == (scale > 0)


# ---------------------------------------------------------------- several outputs


def test_rows_of_several_outputs_belong_together(rng):
    """The empirical Fisher of an example sees the gradient of all of its loss."""
    params = {"w": rng.normal(size=(2, 3)), "u": rng.normal(size=(3, 2))}
    params |= {"v": rng.normal(size=3)}
    x, a, b = rng.normal(size=(4, 2)), rng.integers(0, 2, 4), rng.normal(size=4)
    params, x, a, b = jax.tree.map(jnp.asarray, (params, x, a, b))

    def terms(p, x, a, b):
        h = jnp.tanh(x @ p["w"])
        logits, mean = kfac.categorical(h @ p["u"]), kfac.normal(h @ p["v"])
        first = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
            logits, a[:, None], -1
        )[:, 0]  # fmt: skip
        return first + 0.5 * (mean - b) ** 2

    tagged = kfac.tag(lambda *args: terms(*args).mean(), params, x, a, b)
    one = jax.vmap(
        lambda x, a, b: ravel_of(
            jax.grad(lambda p: terms(p, x[None], a[None], b[None])[0])(params)
        )
    )
    g = np.asarray(jax.jit(one)(x, a, b))
    batches = [(x[i], a[i], b[i]) for i in (slice(0, 1), slice(1, 4))]
    for approximation in ("full", "diagonal"):
        seen = make("empirical_fisher", tagged, params, batches, approximation)
        matrix = g.T @ g / 4
        if approximation == "diagonal":
            matrix = np.diag(np.diag(matrix))
        close(seen.to_dense(), matrix, 1e-9)
    seen = make("gradient_covariance", tagged, params, batches)
    close(seen.to_dense(), np.cov(g, rowvar=False, bias=True), 1e-9)
    # Λ has no entries between outputs.
    h = np.tanh(np.asarray(x @ params["w"]))
    p = np.asarray(jax.nn.softmax(h @ params["u"]))
    first = jacobian(lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"], params, x)
    second = jacobian(lambda p, x: (jnp.tanh(x @ p["w"]) @ p["v"])[:, None], params, x)
    curve = np.einsum("nc,cd->ncd", p, np.eye(2)) - np.einsum("nc,nd->ncd", p, p)
    wanted = np.einsum("ncp,ncd,ndq->pq", first, curve, first)
    wanted += np.einsum("ncp,ncq->pq", second, second)
    for approximation in ("full", "diagonal"):
        matrix = wanted / 4
        if approximation == "diagonal":
            matrix = np.diag(np.diag(matrix))
        seen = make("ggn", tagged, params, batches, approximation)
        close(seen.to_dense(), matrix, 1e-9)


def ravel_of(tree):
    """A traced tree as a vector."""
    return jax.flatten_util.ravel_pytree(tree)[0]


# ---------------------------------------------------------------- other layers


@pytest.mark.parametrize("law", cases(["hessian", "ggn"], ["hessian"]))
def test_regularisers_and_fallbacks(law, rng):
    """The Hessian is of the whole loss, also where no layer reads a parameter."""
    params = {"w": rng.normal(size=(2, 3)), "odd": rng.normal(size=3)}
    params |= {"idle": rng.normal(size=2)}
    params, x = jax.tree.map(jnp.asarray, (params, rng.normal(size=(4, 2))))

    def apply(p, x):
        odd = jnp.cumsum(p["odd"])
        return jnp.sinh(x @ p["w"] + odd) + jnp.sin(odd) ** 2

    def loss(p, x):
        penalty = jnp.sum(p["idle"] ** 4) + jnp.sum(p["w"] ** 2 * p["odd"] ** 2)
        return 0.5 * (kfac.normal(apply(p, x)) ** 2).sum(-1).mean() + penalty

    tagged = kfac.tag(loss, params, x)
    assert {t.kind for t in tagged.layers} == {"dense", "diagonal"}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w), x)))(flat))
    j = jacobian(apply, params, x)
    ggn = np.einsum("ncp,ncq->pq", j, j) / 4
    labels = ravel({"idle": np.zeros(2), "odd": np.ones(3), "w": 2 * np.ones((2, 3))})
    entries = np.arange(len(labels))
    units = ravel({"idle": -1 - np.arange(2), "odd": 9 + np.arange(3),
                   "w": np.tile(np.arange(3), (2, 1))})  # fmt: skip
    wanted = {"hessian": hessian, "ggn": ggn}[law]
    for approximation, block in (
        ("full", 0 * entries), ("block_diagonal", labels), ("diagonal", entries),
        ("unit_wise", units),
    ):  # fmt: skip
        op = make(law, tagged, params, [(x[:1],), (x[1:],)], approximation)
        same = block[:, None] == block
        close(op.to_dense(), np.where(same, wanted, 0), 1e-9)
    op = make(law, tagged, params, [(x,)], "kronecker")
    close(ravel(op.diagonal())[:5], np.diag(wanted)[:5], 1e-9)


def test_tied_weights_are_one_block(rng):
    params = {"table": rng.normal(size=(4, 2)), "bias": rng.normal(size=4)}
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(rng.normal(size=(3, 4)))

    def apply(p, x):
        return jnp.tanh(x @ p["table"]) @ p["table"].T + p["bias"]

    def loss(p, x):
        return 0.5 * (kfac.normal(apply(p, x)) ** 2).sum(-1).mean()

    tagged = kfac.tag(loss, params, x)
    assert any(t.tied for t in tagged.layers)
    j = jacobian(apply, params, x)
    wanted = np.einsum("ncp,ncq->pq", j, j) / 3
    close(make("ggn", tagged, params, [(x,)]).to_dense(), wanted, 1e-9)
    names = ravel({"bias": np.zeros(4), "table": np.ones((4, 2))})
    block = np.where(names[:, None] == names, wanted, 0)
    seen = make("ggn", tagged, params, [(x,)], "block_diagonal").to_dense()
    close(seen, block, 1e-9)
    for approximation in ("kronecker", "ekfac"):
        op = make("ggn", tagged, params, [(x,)], approximation)
        values = op.eigenvalues()
        assert values.min() > -1e-12 and values.max() > 0
        close(np.linalg.eigvalsh(op.to_dense())[::-1], values, 1e-9)


def test_stacked_layers(rng):
    """Scanned layers: one block together, a Kronecker product for every slice."""
    params = {"w": jnp.asarray(rng.normal(size=(3, 2, 2)))}
    x = jnp.asarray(rng.normal(size=(4, 2)))

    def apply(p, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, p["w"])[0]

    def loss(p, x):
        return 0.5 * (kfac.normal(apply(p, x)) ** 2).sum(-1).mean()

    tagged = kfac.tag(loss, params, x)
    (layer,) = tagged.layers
    assert layer.stack == (3,)
    j = jacobian(apply, params, x)
    ggn = np.einsum("ncp,ncq->pq", j, j) / 4
    whole = make("ggn", tagged, params, [(x,)], "block_diagonal")
    close(whole.to_dense(), ggn, 1e-9)
    unit = np.arange(12) // 4 * 2 + np.arange(12) % 2
    seen = make("ggn", tagged, params, [(x,)], "unit_wise").to_dense()
    close(seen, np.where(unit[:, None] == unit, ggn, 0), 1e-9)
    wanted, h = np.zeros((12, 12)), x
    for i in range(3):
        rest = lambda z, i=i: apply({"w": params["w"][i + 1 :]}, jnp.tanh(z))  # noqa: E731
        z = h @ params["w"][i]
        c = np.einsum("ncnp->ncp", np.asarray(jax.jit(jax.jacrev(rest))(z)))
        g = np.einsum("ncp,ncq->pq", c, c) / 4
        at = slice(4 * i, 4 * i + 4)
        wanted[at, at] = np.kron(np.asarray(h.T @ h) / 4, g)
        h = jnp.tanh(z)
    close(make("ggn", tagged, params, [(x,)], "kronecker").to_dense(), wanted, 1e-9)


def test_grouped_convolutions():
    case = Problem(models.BY_NAME["groups"], (2,))
    names = case.labels(True)
    wanted = np.where(names[:, None] == names, case.full("ggn"), 0)
    close(case.operator("ggn", "unit_wise").to_dense(), wanted, 1e-9)
    seen = case.operator("ggn", "kronecker")
    matrix = np.asarray(seen.to_dense())
    kernel = case.unravel(np.arange(len(matrix)) * 1.0)["layer"]["kernel"]
    groups = np.asarray(kernel, int).reshape(-1, kernel.shape[-1])
    half = groups.shape[-1] // 2
    left, right = groups[:, :half].ravel(), groups[:, half:].ravel()
    assert not matrix[np.ix_(left, right)].any() and matrix[np.ix_(left, left)].any()
    close(ravel(seen.diagonal()), np.diag(matrix), 1e-9)


@functools.cache
def unbounded():
    """The network of the next test: its factors, and its whole matrix."""
    model = models.mlp("forms", (4, 5, 3))
    record = model.tag(4), model.params(), [model.batch(4)]
    whole = kfac.curvature.ggn(*record, "kronecker")
    return whole, np.asarray(kfac.curvature.ggn(*record).to_dense())


@pytest.mark.parametrize("limit", cases([3, 2, 1], [3, 1]))
def test_large_factors_in_other_forms(limit):
    """Factors kept as diagonal blocks, the last one filled up, or as diagonals."""
    model = models.mlp("forms", (4, 5, 3))
    params, args = model.params(), model.batch(4)
    whole, exact = unbounded()
    factors = {len(p.place[0]): p for p in whole.form.parts}
    tagged = model.tag(4, max_factor_dim=limit)
    matrix = np.zeros(whole.shape)
    moved = np.zeros(whole.shape)
    for layer, part in zip(tagged.layers, whole.form.parts, strict=True):
        place = np.asarray(part.place).reshape(-1)
        a, g = (
            within(np.asarray(x[0]), form, limit)
            for x, form in ((part.a, layer.a_form), (part.g, layer.g_form))
        )
        matrix[np.ix_(place, place)] = np.kron(a, g)
        moved[np.ix_(place, place)] = 1
    assert len(factors) == 2
    op = kfac.curvature.ggn(tagged, params, [args], "kronecker")
    close(op.to_dense(), matrix, 1e-9)
    close(op.eigenvalues(), np.linalg.eigvalsh(matrix)[::-1], 1e-9)
    v = model.params(seed=4)
    close(ravel(op.mv(v)), matrix @ ravel(v), 1e-9)
    op = kfac.curvature.ggn(tagged, params, [args], "ekfac")
    seen = np.asarray(op.to_dense())
    # Without weight sharing the moments are the exact diagonal in the eigenbases.
    close(np.trace(seen), np.trace(exact * moved), 1e-9)
    close(ravel(op.diagonal()), np.diag(seen), 1e-9)


def within(factor, form, limit):
    """What a form keeps of a factor."""
    size = len(factor)
    if form == "full":
        return factor
    if form == "diagonal":
        return np.diag(np.diag(factor))
    width = -(-size // -(-size // limit))
    block = np.arange(size) // width
    return np.where(block[:, None] == block, factor, 0)


def test_nearest_product_among_symmetric_ones(rng):
    """A product of skew matrices that is larger does not win."""
    skew = np.array([[0, 1.0], [-1, 0]])
    a, g = np.diag([2.0, 1.0]), np.array([[1, 0.5], [0.5, -1]])
    block = np.kron(a, g) + 10 * np.kron(skew, skew)
    np.testing.assert_array_equal(block, block.T)
    seen = nearest_product(jnp.asarray(block)[None], 2, 2)
    close(np.kron(*(np.asarray(x[0]) for x in seen)), np.kron(a, g), 1e-9)
    assert np.trace(seen[0][0]) > 0
    m = rng.normal(size=(2, 6, 6))
    m = m + np.swapaxes(m, -1, -2)
    a, g = nearest_product(jnp.asarray(m), 3, 2)
    for i in range(2):
        best = np.linalg.norm(m[i] - np.kron(a[i], g[i]))
        for _ in range(20):  # no symmetric product beside it is nearer
            da, dg = (0.1 * rng.normal(size=x.shape[1:]) for x in (a, g))
            other = np.kron(a[i] + da + da.T, g[i] + dg + dg.T)
            assert np.linalg.norm(m[i] - other) >= best - 1e-12


# ---------------------------------------------------------------- sampled labels


@pytest.mark.parametrize("name", cases(["mlp", "bernoulli", "normal"], ["mlp"]))
def test_drawn_labels_have_the_fisher_as_their_mean(name):
    """Standardised errors of the mean of 300 draws: their size is that of normals."""
    case = Problem(models.BY_NAME[name], (2, 1))
    v = case.model.params(seed=9)
    exact = case.full("fisher") @ ravel(v)

    def draw(key):
        make = kfac.curvature.mc_fisher
        return ravel(
            make(case.tagged, case.params, case.batches, key=key).mv(v)
        )  # fmt: skip

    keys = jax.random.split(jax.random.key(0), 300)
    draws = np.stack([draw(key) for key in keys])
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    z = (draws.mean(0) - exact)[error > 1e-12] / error[error > 1e-12]
    assert len(z) > 5 and np.abs(z).max() < 4.5 and np.sqrt(np.mean(z**2)) < 1.8
    assert error.max() > 1e-3 * np.abs(exact).max()


def test_labels_of_an_operator_stay():
    case = Problem(models.BY_NAME["mlp"], (2, 2))
    op = case.operator("mc_fisher")
    close(op.mv(case.params), op.mv(case.params), 1e-15)
    again = Problem(models.BY_NAME["mlp"], (2, 2), key=6).operator("mc_fisher")
    assert np.abs(ravel(op.mv(case.params)) - ravel(again.mv(case.params))).max() > 1e-4


def test_the_covariance_is_that_of_the_examples_gradients():
    case = Problem(models.BY_NAME["mlp"], (2, 3))
    grad = jax.grad(case.model.plain_loss)
    rows = [
        ravel(grad(case.params, case.x[i : i + 1], case.y[i : i + 1])) for i in range(5)
    ]
    wanted = np.cov(np.stack(rows), rowvar=False, bias=True)
    close(case.operator("gradient_covariance").to_dense(), wanted, 1e-9)
