"""The operators' verbs, streaming, compilation, devices and errors."""

import functools
import itertools

import hypothesis
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from kfac_jax_lite.curvature import products
from tests import models
from tests.helpers import cases, close, random_like
from tests.information import APPROXIMATIONS, LAWS, MODELS, Problem

ravel = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])  # noqa: E731
problem = functools.cache(lambda name, sizes=(2, 3): Problem(MODELS[name], sizes))
KEY = 7


@functools.cache
def operator(law, approximation):
    """An operator on the MLP, and its matrix."""
    op = problem("mlp").operator(law, approximation)
    return op, np.asarray(op.to_dense())


EVERY = [("ggn", approximation) for approximation in APPROXIMATIONS]
EVERY += [("gradient_covariance", "full"), ("gradient_covariance", "block_diagonal")]
EVERY += [("hessian", "full"), ("hessian", "block_diagonal"), ("hessian", "kronecker")]
FAST = [*EVERY[:7], ("hessian", "full")]


@pytest.mark.parametrize("law, approximation", cases(EVERY, FAST))
def test_products(law, approximation, rng):
    op, matrix = operator(law, approximation)
    like = problem("mlp").params
    v = random_like(rng, like)
    image = op.mv(v)
    assert jax.tree.structure(image) == jax.tree.structure(v)
    close(ravel(image), matrix @ ravel(v), 1e-9)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), v)
    for chunk in (None, 2):
        images = op.mm(many, chunk)
        for i, factor in enumerate((1, 2, -1)):
            row = ravel(jax.tree.map(lambda x, i=i: x[i], images))
            close(row, factor * (matrix @ ravel(v)), 1e-9)


@pytest.mark.parametrize("law", ["ggn", "hessian", "empirical_fisher"])
def test_many_large_products_at_once(law, rng):
    """Together more tangents of outputs than jaxlib 0.10.2 sums rightly on CPUs."""
    rows, classes, count = 512, 10, 16
    params = {
        "w": rng.normal(size=(20, 30)) / 4,
        "v": rng.normal(size=(30, classes)) / 4,
    }
    params |= {"b": np.zeros(30), "c": np.zeros(classes)}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    batch = jnp.asarray(rng.normal(size=(rows, 20)), jnp.float32), jnp.arange(rows) % 10

    def loss(params, x, y):
        h = jnp.tanh(x @ params["w"] + params["b"])
        z = kfac.categorical(h @ params["v"] + params["c"])
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

    tagged = kfac.tag(loss, params, *batch)
    op = getattr(kfac.curvature, law)(tagged, params, [batch])
    many = {n: rng.normal(size=(count, *x.shape)) for n, x in params.items()}
    many = {n: jnp.asarray(x, jnp.float32) for n, x in many.items()}
    images = op.mm(many)
    for i in range(count):
        alone = op.mv({n: x[i] for n, x in many.items()})
        close(ravel({n: x[i] for n, x in images.items()}), ravel(alone), 1e-5)


@pytest.mark.parametrize("law, approximation", cases(EVERY, FAST))
def test_exact_figures(law, approximation):
    op, matrix = operator(law, approximation)
    values = np.linalg.eigvalsh(matrix)[::-1]
    close(ravel(op.diagonal()), np.diag(matrix), 1e-9)
    close(float(op.trace()), np.trace(matrix), 1e-9)
    close(op.eigenvalues(), values, 1e-9)
    damping = 0.1 - min(values[-1], 0)
    wanted = np.linalg.slogdet(matrix + damping * np.eye(len(matrix)))[1]
    close(float(op.logdet(damping)), wanted, 1e-9)
    assert op.shape == matrix.shape and op.num_examples == 5
    assert law in repr(op) and approximation in repr(op)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("law, approximation", cases(EVERY, FAST))
def test_eigenpairs(law, approximation, which):
    op, matrix = operator(law, approximation)
    if approximation == "block_diagonal" and which != "largest":
        pytest.skip("the same code as for the whole matrix, with more products")
    found = op.eigsh(3, jax.random.key(KEY), which)
    values = np.linalg.eigvalsh(matrix)[::-1]
    if which == "magnitude":
        values = values[np.argsort(-np.abs(values))]
    wanted = values[-3:] if which == "smallest" else values[:3]
    np.testing.assert_allclose(found.values, wanted, atol=1e-7 * np.abs(values).max())
    vectors = np.stack(
        [ravel(jax.tree.map(lambda x, i=i: x[i], found.vectors)) for i in range(3)]
    )
    close(vectors @ vectors.T, np.eye(3), 1e-7)
    rests = vectors @ matrix - found.values[:, None] * vectors
    assert np.linalg.norm(rests, axis=1).max() < 1e-5 * np.abs(values).max()


@pytest.mark.parametrize("approximation", ["full", "block_diagonal", "kronecker"])
def test_estimates_carry_their_errors(approximation):
    """With a key: within four standard errors, which are zero in closed form."""
    op, matrix = operator("ggn", approximation)
    key = jax.random.key(KEY)
    wanted = np.linalg.slogdet(matrix + 0.1 * np.eye(len(matrix)))[1]
    pairs = [
        (op.trace(key), np.trace(matrix)),
        (op.logdet(0.1, key, num_samples=8, num_steps=30), wanted),
    ]
    diagonal = op.diagonal(key)
    pairs.append((jax.tree.map(jnp.sum, diagonal.value), None))
    for (value, error), exact in pairs[:2]:
        assert abs(value - exact) <= 4 * error + 1e-9 * abs(exact)
        assert (error == 0) == (approximation == "kronecker")
    off = ravel(diagonal.value) - np.diag(matrix)
    assert np.all(np.abs(off) <= 6 * ravel(diagonal.error) + 1e-12)


def test_the_hessians_diagonal_may_be_estimated():
    case = problem("mlp")
    exact = ravel(case.operator("hessian", "diagonal").diagonal())
    make = functools.partial(
        kfac.curvature.hessian, case.tagged, case.params, case.batches
    )
    op = make("diagonal", key=jax.random.key(KEY), num_samples=200)
    off = np.linalg.norm(ravel(op.diagonal()) - exact) / np.linalg.norm(exact)
    assert 0 < off < 0.5
    with pytest.raises(ValueError, match="only approximation='diagonal'"):
        make("unit_wise", key=jax.random.key(KEY))


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("law", [law for law in LAWS if law != "mc_fisher"])
def test_batches_are_one_data_set(law):
    """Three unequal batches equal all of them together."""
    streamed, joined = problem("mlp", (1, 4, 2)), problem("mlp", (1, 4, 2))
    op = streamed.operator(law)
    whole = getattr(kfac.curvature, law)(
        joined.tagged, joined.params, [(joined.x, joined.y)]
    )
    close(op.to_dense(), whole.to_dense(), 1e-10)
    assert op.num_examples == whole.num_examples == 7


class Again:
    """Batches that are made whenever they are gone through."""

    def __init__(self, batches):
        """Keep them, and count."""
        self.batches, self.rounds = batches, 0

    def __len__(self):
        """How many."""
        return len(self.batches)

    def __iter__(self):
        """Another round."""
        self.rounds += 1
        yield from self.batches


def test_any_sequence_that_repeats(capsys):
    case = problem("mlp")
    again = Again(case.batches)
    op = kfac.curvature.ggn(case.tagged, case.params, again, progress=True)
    before = again.rounds
    first, second = op.mv(case.params), op.mv(case.params)
    assert again.rounds == before + 2
    close(first, second, 1e-12)
    close(first, case.operator("ggn").mv(case.params), 1e-12)
    capsys.readouterr()


def test_one_program_serves_batches_products_and_parameters():
    model = models.mlp("counted")
    batches = [model.batch(3, seed=s) for s in range(3)]
    params = [model.params(seed=s) for s in range(3)]
    tagged = model.tag(3)
    before = products.product._cache_size()
    for point in params:
        op = kfac.curvature.ggn(tagged, point, batches)
        for v in params:
            op.mv(v)
    kfac.curvature.fisher(tagged, params[0], batches).mv(params[1])
    assert products.product._cache_size() == before + 1
    kfac.curvature.ggn(tagged, params[0], [model.batch(4)]).mv(params[0])
    assert products.product._cache_size() == before + 2


def test_inside_jit_and_cg(rng):
    case = problem("mlp")
    v = random_like(rng, case.params)
    args = case.batches[0]
    op = kfac.curvature.ggn(case.tagged, case.params, [args])
    close(jax.jit(op.mv)(v), op.mv(v), 1e-10)

    @jax.jit
    def inside(params, args, v):
        return kfac.curvature.ggn(case.tagged, params, [args]).mv(v)

    close(inside(case.params, args, v), op.mv(v), 1e-10)
    matrix = np.asarray(op.to_dense()) + 0.3 * np.eye(op.shape[0])
    wanted = np.linalg.solve(matrix, ravel(v))
    damped = lambda u: jax.tree.map(lambda x, y: x + 0.3 * y, op.mv(u), u)  # noqa: E731
    seen, _ = jax.scipy.sparse.linalg.cg(damped, v, tol=1e-12)
    close(ravel(seen), wanted, 1e-8)
    close(ravel(op.solve(v, 0.3, tol=1e-12)), wanted, 1e-8)


@pytest.mark.slow
def test_lineax(rng):
    lineax = pytest.importorskip("lineax")
    case = problem("mlp")
    op = kfac.curvature.ggn(case.tagged, case.params, case.batches)
    v = random_like(rng, case.params)
    tag = lineax.positive_semidefinite_tag
    matrix = lineax.FunctionLinearOperator(op.mv, op.structure, tag)
    close(matrix.mv(v), op.mv(v), 1e-10)
    close(matrix.as_matrix(), op.to_dense(), 1e-10)
    damped = matrix + 0.3 * lineax.IdentityLinearOperator(op.structure)
    damped = lineax.TaggedLinearOperator(damped, tag)
    solver = lineax.CG(rtol=1e-10, atol=1e-12)
    seen = lineax.linear_solve(damped, v, solver).value
    wanted = np.asarray(op.to_dense()) + 0.3 * np.eye(op.shape[0])
    close(ravel(seen), np.linalg.solve(wanted, ravel(v)), 1e-7)


SHARDED = itertools.product(
    ["ggn", "empirical_fisher", "mc_fisher", "hessian"],
    [AxisType.Auto, AxisType.Explicit],
)
FAST_SHARDED = [("ggn", AxisType.Explicit), ("mc_fisher", AxisType.Auto)]
FAST_SHARDED += [("hessian", AxisType.Auto)]


@pytest.mark.parametrize(("law", "kind"), cases(SHARDED, FAST_SHARDED))
def test_sharded_batches(law, kind, rng):
    """Batches split over eight devices give the same products and diagonals."""
    case = problem("mlp", (8, 8))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    make = getattr(kfac.curvature, law)
    options = {"key": jax.random.key(1)} if law == "mc_fisher" else {}
    v = random_like(rng, case.params)
    with jax.set_mesh(mesh):
        params, direction = jax.device_put((case.params, v), whole)
        batches = [jax.device_put(b, split) for b in case.batches]
        seen = make(case.tagged, params, batches, **options)
        image = jax.device_get(seen.mv(direction))
        if law != "hessian":
            diagonal = jax.device_get(seen.diagonal())
    op = make(case.tagged, case.params, case.batches, **options)
    close(image, jax.device_get(op.mv(v)), 1e-9)
    if law != "hessian":
        close(diagonal, jax.device_get(op.diagonal()), 1e-9)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"approximation": "low_rank"}, "approximation must be one of .*'low_rank'"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter([])}, "wanted a sequence"),
        ({"batches": [jnp.ones(3)]}, "wanted the tuple"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"params": {"layer0": jnp.ones(3)}}, "leaves"),
    ],
)
def test_bad_arguments(change, message):
    case = problem("mlp")
    given = {
        "tagged": case.tagged, "params": case.params, "batches": case.batches,
        "approximation": "block_diagonal",
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kfac.curvature.ggn(**given)


def test_bad_vectors_and_keys():
    case = problem("mlp")
    op = case.operator("ggn")
    with pytest.raises(ValueError, match=r"layer0.*bias.* has shape \(4,\), wanted"):
        op.mv(jax.tree.map(lambda x: x[..., :-1], case.params))
    with pytest.raises(ValueError, match="wants a vector like"):
        op.mv({"layer0": case.params["layer0"]})
    with pytest.raises(ValueError, match="pass key="):
        op.eigsh(2)
    with pytest.raises(ValueError, match="1 <= k <= 43"):
        op.eigsh(44, jax.random.key(0))
    with pytest.raises(ValueError, match="use more damping"):
        case.operator("hessian").logdet(0.0)
    with pytest.raises(ValueError, match="pass key="):
        kfac.curvature.mc_fisher(case.tagged, case.params, case.batches)
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        kfac.curvature.mc_fisher(
            case.tagged, case.params, case.batches, key=jax.random.key(0), num_samples=0
        )


def test_layers_too_large_for_a_dense_block_are_named():
    model = models.mlp("wide", (70, 60, 2))
    case = Problem(model, (2,))
    with pytest.raises(ValueError, match=r"layer layer0: .* 71 × 60 = 4,260"):
        case.operator("gradient_covariance", "kronecker")


# ---------------------------------------------------------------- shapes


@hypothesis.given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(["categorical", "bernoulli", "normal"]),
    st.integers(1, 3),
    st.sampled_from(["ggn", "empirical_fisher", "gradient_covariance"]),
)
@hypothesis.settings(max_examples=10)
@pytest.mark.slow
def test_shapes_and_likelihoods(sizes, likelihood, outputs, law):
    model = models.mlp("drawn", (2, 2, outputs), likelihood=likelihood, variance=0.7)
    case = Problem(model, tuple(sizes))
    matrix = case.full(law)
    op = case.operator(law)
    close(ravel(op.mv(case.params)), matrix @ ravel(case.params), 1e-9)
    close(float(op.trace()), np.trace(matrix), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["ggn", "fisher"])
def test_full_size_products_trace(law):
    """ResNet-50 on images of 224 × 224: nothing is as large as a Jacobian."""
    from experiments.models.architectures import ARCHITECTURES

    shapes = ARCHITECTURES["resnet50"].make()
    tagged = kfac.tag(shapes.loss, shapes.params, *shapes.args, has_aux=shapes.has_aux)

    def product(params, args, v):
        return getattr(kfac.curvature, law)(tagged, params, [args]).mv(v)

    image = jax.eval_shape(product, shapes.params, shapes.args, shapes.params)
    assert jax.tree.map(lambda x: x.shape, image) == jax.tree.map(
        lambda x: x.shape, shapes.params
    )
