"""The tangent kernel and the dual natural gradient against explicit Jacobians."""

import collections
import functools

import chex
import hypothesis
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import close, identical, leaves, random_like
from tests.models import BY_NAME, mlp

MODELS = ["mlp", "conv2d", "bernoulli", "normal", "language", "batch_norm_flat"]
EXAMPLES = 5
BOTH = pytest.mark.parametrize("independent", [False, True], ids=["coupled", "alone"])


def setting(name, examples=EXAMPLES):
    """A model with its tagged loss, parameters and batch."""
    model = BY_NAME[name]
    return model, model.tag(examples), model.params(), model.batch(examples)


def marked_jacobian(model, params, x):
    """``J`` of what is marked, ``[n, C, P]``: a normal mean over its deviation."""
    scale = np.sqrt(model.variance) if model.likelihood == "normal" else 1.0
    return oracles.parameter_jacobian(model, params, x) / scale


def ravel(tree):
    """One float64 vector."""
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64)


def step_of(tx):
    """The first update, to be jitted."""
    return lambda grads, params, batch: tx.update(
        grads, tx.init(params), params, batch=batch
    )


def primal(fisher, gradient, damping):
    """``(F + λI)⁻¹ g`` densely."""
    return np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)


# ---------------------------------------------------------------- the kernel


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_kernel_is_the_product_of_jacobians(name, independent):
    if independent and name == "batch_norm_flat":
        pytest.skip("batch norm couples examples")
    model, tagged, params, batch = setting(name)
    other = model.batch(3, seed=7)
    j, k = (marked_jacobian(model, params, x) for x, _ in (batch, other))

    @jax.jit
    def run(params, batch, other):
        kernel = functools.partial(
            kfac.ntk.kernel, tagged, params, batch, independent=independent
        )
        return kernel(chunk=2), kernel(trace=True), kernel(other, chunk=7)

    whole, contracted, across = run(params, batch, other)
    wanted = np.einsum("icp,jep->icje", j, j)
    close(whole, wanted, 1e-11)
    close(contracted, np.einsum("icjc->ij", wanted), 1e-11)
    close(across, np.einsum("icp,jep->icje", j, k), 1e-11)


def masked_loss(params, x, y, mask):
    """A classifier of sequences, some of whose positions do not count."""
    z = jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]
    terms = optax.softmax_cross_entropy_with_integer_labels(
        kfac.categorical(z, mask), y
    )
    return jnp.where(mask, terms, 0).sum() / mask.sum()


def masked_setting():
    """Parameters, arguments, and the Jacobian ``[n, C, P]`` of all rows."""
    rng = np.random.default_rng(3)
    shapes = {"w": (3, 4), "v": (4, 3), "b": (3,)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(4, 2, 3))), jnp.asarray([[0, 2], [1, 1]] * 2)
    mask = jnp.asarray([[True, True], [True, False], [False, False], [True, True]])
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def forward(v):
        p = unravel(v)
        return (jnp.tanh(x @ p["w"]) @ p["v"] + p["b"]).reshape(8, 3)

    return params, (x, y, mask), forward(flat), jax.jacrev(forward)(flat)


@BOTH
def test_rows_that_do_not_count(independent):
    params, batch, z, jacobian = masked_setting()
    tagged = kfac.tag(masked_loss, params, *batch)
    count = np.asarray(batch[2]).reshape(-1)
    j = np.asarray(jacobian) * count[:, None, None]
    found = kfac.ntk.kernel(tagged, params, batch, independent=independent)
    close(found, np.einsum("icp,jep->icje", j, j), 1e-11)
    root = np.einsum("nck,ncp->nkp", oracles.output_root("categorical", z), j)
    root = root.reshape(-1, j.shape[-1])
    fisher = root.T @ root / count.sum()
    grads = jax.grad(masked_loss)(params, *batch)
    for solver in ("cholesky", "qr"):
        tx = kfac.ntk.dual_natural_gradient(
            tagged, 0.01, solver=solver, independent=independent
        )
        u, _ = jax.jit(step_of(tx))(grads, params, batch)
        close(ravel(u), primal(fisher, ravel(grads), 0.01), 1e-9)


@BOTH
@pytest.mark.parametrize("name", ["mlp", "conv2d", "bernoulli", "normal", "language"])
def test_the_spectrum_is_that_of_the_fisher_matrix(name, independent):
    model, tagged, params, batch = setting(name, 3)
    run = functools.partial(kfac.ntk.eigenvalues, tagged, independent=independent)
    found = jax.jit(run)(params, batch)
    fisher = oracles.dense_fisher(model, params, batch[0], fisher="exact")
    wanted = np.sort(np.linalg.eigvalsh(fisher))[::-1]
    size = min(len(found), len(wanted))
    close(found[:size], wanted[:size], 1e-11)
    for zeros in (found[size:], wanted[size:]):
        np.testing.assert_allclose(zeros, 0, atol=1e-11 * wanted[0])


# ---------------------------------------------------------------- the step


@BOTH
@pytest.mark.parametrize("solver", ["cholesky", "qr"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
@hypothesis.given(
    examples=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 4)),
    damping=st.floats(-6, 0).map(lambda power: 10.0**power),
    seed=st.integers(0, 10**6),
)
@hypothesis.settings(max_examples=2)
def test_dual_is_primal(
    likelihood, solver, independent, examples, sizes, damping, seed
):
    """Of the gradient, and of any vector, more outputs than parameters or fewer."""
    model = mlp("m", sizes, likelihood=likelihood, variance=0.5)
    params, batch = model.params(seed=seed), model.batch(examples, seed=seed + 1)
    tagged = model.tag(examples)
    tx = kfac.ntk.dual_natural_gradient(
        tagged, damping, solver=solver, independent=independent
    )
    fisher = oracles.dense_fisher(model, params, batch[0], fisher="exact")
    grads = jax.grad(model.plain_loss)(params, *batch)
    noise = random_like(np.random.default_rng(seed), params)
    decayed = jax.tree.map(lambda g, p: 0.3 * g + 0.01 * p, grads, params)

    @jax.jit
    @jax.vmap
    def step(vector):
        return tx.update(vector, tx.init(params), params, batch=batch)

    stacked = jax.tree.map(lambda *v: jnp.stack(v), grads, noise, decayed)
    updates, state = step(stacked)
    for i, vector in enumerate((grads, noise, decayed)):
        found = jax.tree.map(lambda u, i=i: u[i], updates)
        close(ravel(found), primal(fisher, ravel(vector), damping), 1e-8)
    assert state.count.tolist() == [1] * 3 and state.skipped.tolist() == [0] * 3


def graded(sigmas, parameters, seed=0):
    """A linear model ``z = X θ`` with ``X / √n = U diag(σ) Vᵀ``, and the three."""
    rng = np.random.default_rng(seed)
    n = len(sigmas)
    u, _ = np.linalg.qr(rng.normal(size=(n, n)))
    v, _ = np.linalg.qr(rng.normal(size=(parameters, n)))
    x = jnp.asarray(np.sqrt(n) * u * sigmas @ v.T)

    def loss(params, x, y):
        return 0.5 * jnp.mean((kfac.normal(x @ params["w"]) - y) ** 2)

    y = jnp.asarray(rng.normal(size=n))
    params = {"w": jnp.zeros(parameters)}
    wanted = -v @ (sigmas / (sigmas**2 + 1e-10) * (u.T @ np.asarray(y))) / np.sqrt(n)
    return kfac.tag(loss, params, x, y), params, (x, y), wanted


@pytest.mark.parametrize("solver, tolerance", [("cholesky", 1e-1), ("qr", 1e-7)])
def test_a_tiny_damping(solver, tolerance):
    """``λ = 1e-10`` with ``λ_max = 1e4``, whose answer is known without a solve."""
    tagged, params, batch, wanted = graded(np.logspace(2, -6, 9), 30)
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(tagged, 1e-10, solver=solver)
    found, _ = jax.jit(step_of(tx))(grads, params, batch)
    error = np.linalg.norm(ravel(found) - wanted) / np.linalg.norm(wanted)
    assert error < tolerance
    # Woodbury's formula alone, even with an orthogonal basis, is no match for it.
    k = np.asarray(batch[0]) / 3
    inner = np.linalg.solve(k @ k.T + 1e-10 * np.eye(9), k @ ravel(grads))
    woodbury = (ravel(grads) - k.T @ inner) / 1e-10
    worse = np.linalg.norm(woodbury - wanted) / np.linalg.norm(wanted)
    assert error < worse / 10


def test_probabilities_that_vanish():
    """A confident and wrong classifier, whose ``Λ`` is zero to rounding."""
    tagged, params = (
        kfac.tag(linear_loss, {"w": jnp.eye(3)}, jnp.eye(3), jnp.arange(3)),
        {"w": jnp.eye(3)},
    )
    for height in (10.0, 200.0, 2000.0):
        batch = height * jnp.eye(3)[jnp.array([1, 2, 0])], jnp.arange(3)
        grads = jax.grad(linear_loss)(params, *batch)
        z = np.asarray(batch[0] @ params["w"])
        j = np.einsum("ni,ck->ncik", np.asarray(batch[0]), np.eye(3)).reshape(3, 3, 9)
        p = oracles.softmax(z)
        curvature = np.stack([np.diag(q) - np.outer(q, q) for q in p])
        fisher = np.einsum("ncp,nce,neq->pq", j, curvature, j) / 3
        for solver in ("cholesky", "qr"):
            tx = kfac.ntk.dual_natural_gradient(tagged, 0.1, solver=solver)
            u, _ = jax.jit(step_of(tx))(grads, params, batch)
            close(ravel(u), primal(fisher, ravel(grads), 0.1), 1e-9)


def linear_loss(params, x, y):
    """Cross entropy of a linear classifier."""
    z = kfac.categorical(x @ params["w"])
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def test_two_outputs():
    """A classifier and a regressor of the same trunk, their losses added."""
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "a": (4, 3), "b": (4, 2)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray([0, 1, 2, 1, 0])
    t = jnp.asarray(rng.normal(size=(5, 2)))

    def forward(p, x):
        h = jnp.tanh(x @ p["w"])
        return h @ p["a"], h @ p["b"]

    def loss(p, x, y, t):
        z, m = forward(p, x)
        terms = optax.softmax_cross_entropy_with_integer_labels(kfac.categorical(z), y)
        return terms.mean() + 0.5 * jnp.mean(jnp.sum((kfac.normal(m) - t) ** 2, -1))

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jz, jm = jax.jacrev(lambda v: forward(unravel(v), x))(flat)
    s = oracles.output_root("categorical", forward(params, x)[0])
    root = np.concatenate([
        np.einsum("nck,ncp->nkp", s, jz).reshape(15, -1),
        np.asarray(jm).reshape(10, -1),
    ])  # fmt: skip
    fisher = root.T @ root / 5
    tagged = kfac.tag(loss, params, x, y, t)
    grads = jax.grad(loss)(params, x, y, t)
    for independent in (False, True):
        for solver in ("cholesky", "qr"):
            tx = kfac.ntk.dual_natural_gradient(
                tagged, 1e-3, solver=solver, independent=independent
            )
            u, _ = jax.jit(step_of(tx))(grads, params, (x, y, t))
            close(ravel(u), primal(fisher, ravel(grads), 1e-3), 1e-9)
    with pytest.raises(
        ValueError, match=r"one marked output, got \[\(5, 3\), \(5, 2\)"
    ):
        kfac.ntk.kernel(tagged, params, (x, y, t))


# ---------------------------------------------------------------- the contract


def steps(tx, tagged, params, batches, wrap=jax.jit):
    """One step per batch."""

    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(tagged.loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    run, state = wrap(step), tx.init(params)
    for batch in batches:
        params, state, _ = run(params, state, *batch)
    return params, state


def chained(tagged, **options):
    """The transformation as it is used, with a schedule as damping."""
    schedule = optax.exponential_decay(0.1, 1, 0.5)
    dual = kfac.ntk.dual_natural_gradient(tagged, schedule, **options)
    return optax.chain(dual, optax.scale(-0.3))


CASES = [("cholesky", False), ("cholesky", True), ("qr", False), ("qr", True)]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """A small network with three batches, and the transformation."""
    solver, independent = request.param
    model, tagged, params, _ = setting("mlp", 4)
    tx = chained(tagged, solver=solver, independent=independent)
    return tx, tagged, params, [model.batch(4, seed=10 + i) for i in range(3)]


def test_jit_is_eager_and_compiles_once(case):
    calls = collections.Counter()

    def counted(step):
        def run(*args):
            calls["traced"] += 1
            return step(*args)

        return jax.jit(run)

    jitted = steps(*case, wrap=counted)
    assert calls["traced"] == 1
    close(jitted, steps(*case, wrap=lambda step: step), 1e-8)


def test_state_is_fixed(case):
    tx, _, params, _ = case
    before, abstract = tx.init(params), jax.eval_shape(tx.init, params)
    after = steps(*case)[1]
    for other in (after, abstract):
        chex.assert_trees_all_equal_structs(before, other)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, other)
    assert not [leaf for leaf in jax.tree.leaves(before) if leaf.weak_type]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(before)]
    assert len(pointers) == len(set(pointers))
    assert int(after[0].count) == 3


def test_the_schedule_counts_steps(case):
    tx, tagged, params, (batch, *_) = case
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    _, state = tx.update(grads, tx.init(params), params, batch=batch)
    second, _ = tx.update(grads, state, params, batch=batch)
    fisher = oracles.dense_fisher(BY_NAME["mlp"], params, batch[0], fisher="exact")
    close(ravel(second), -0.3 * primal(fisher, ravel(grads), 0.05), 1e-6)


def test_scan_over_steps(case):
    tx, tagged, params, batches = case

    def body(carry, batch):
        params, state = carry
        grads = jax.grad(tagged.loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *b: jnp.stack(b), *batches)
    run = jax.jit(lambda c: jax.lax.scan(body, c, stacked)[0])
    close(run((params, tx.init(params))), steps(*case), 1e-8)


def test_foreign_extra_arguments_are_ignored(case):
    tx, tagged, params, (batch, *_) = case
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    plain = tx.update(grads, tx.init(params), params, batch=batch)
    more = tx.update(
        grads, tx.init(params), params, batch=batch, value=1.0, statistics=None
    )
    identical(plain, more)


def test_a_batch_that_is_not_finite_changes_nothing(case):
    tx, tagged, params, (first, second, _) = case
    bad = first[0].at[0, 0].set(jnp.nan), first[1]
    before = steps(tx, tagged, params, [first])
    after = steps(tx, tagged, params, [first, bad])
    identical(after[0], before[0])
    assert int(after[1][0].skipped) == 1
    assert int(after[1][0].count) == int(before[1][0].count) == 1
    close(
        steps(tx, tagged, params, [first, bad, second])[0],
        steps(tx, tagged, params, [first, second])[0],
        1e-12,
    )


def test_inject_hyperparams_and_vmap_over_damping():
    model, tagged, params, batch = setting("mlp", 4)
    grads = jax.grad(model.plain_loss)(params, *batch)
    dual = kfac.ntk.dual_natural_gradient
    tx = optax.inject_hyperparams(dual, static_args="tagged")(tagged, damping=0.5)

    def injected(damping):
        state = tx.init(params)
        state.hyperparams["damping"] = damping
        return tx.update(grads, state, params, batch=batch)[0]

    dampings = jnp.array([0.01, 0.1])
    found = jax.jit(jax.vmap(injected))(dampings)
    fisher = oracles.dense_fisher(model, params, batch[0], fisher="exact")
    for i, damping in enumerate(dampings):
        one = jax.tree.map(lambda u, i=i: u[i], found)
        close(ravel(one), primal(fisher, ravel(grads), damping), 1e-8)


@pytest.mark.parametrize("solver", ["cholesky", "qr"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=str)
def test_lower_precision(dtype, solver):
    """Updates in the parameters' precision; in float32 close to those in float64."""
    model = BY_NAME["mlp"]
    params, batch = model.params(dtype), model.batch(4, dtype)
    tagged = model.tag(4, dtype)
    grads = jax.grad(model.loss)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1, solver=solver)
    found, state = tx.update(grads, tx.init(params), params, batch=batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert int(state.count) == 1
    full = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    x = batch[0].astype(jnp.float64)
    fisher = oracles.dense_fisher(model, full, x, fisher="exact")
    wanted = primal(fisher, ravel(jax.grad(model.loss)(full, x, batch[1])), 0.1)
    close(ravel(found), wanted, 1e-4 if dtype == jnp.float32 else 0.1)


# ---------------------------------------------------------------- devices


@BOTH
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("solver", ["cholesky", "qr"])
def test_a_sharded_batch(kind, solver, independent):
    model, _, params, batch = setting("mlp", 16)
    tagged = model.tag(16)
    tx = chained(tagged, solver=solver, independent=independent)
    wanted = steps(tx, tagged, params, [batch])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = functools.partial(NamedSharding, mesh)
    placed = jax.device_put(params, put(PartitionSpec()))
    split = jax.device_put(batch, put(PartitionSpec("data")))
    with jax.set_mesh(mesh):
        found = steps(tx, tagged, placed, [split])
        gram = jax.jit(lambda p, b: kfac.ntk.kernel(tagged, p, b))(placed, split)
    close(jax.device_get(found), jax.device_get(wanted), 1e-9)
    close(jax.device_get(gram), kfac.ntk.kernel(tagged, params, batch), 1e-11)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_gathered_batches_under_shard_map():
    """Every device is given all of the batch and its gradient."""
    model, _, params, batch = setting("mlp", 16)
    tagged = model.tag(16)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, *batch):
        whole = jax.tree.map(lambda b: jax.lax.all_gather(b, "data", tiled=True), batch)
        grads = jax.grad(tagged.loss_fn)(params, *whole)
        return tx.update(grads, tx.init(params), params, batch=whole)[0]

    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), *[PartitionSpec("data")] * 2),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    wanted, _ = tx.update(grads, tx.init(params), params, batch=batch)
    close(jax.device_get(jax.jit(run)(params, *batch)), wanted, 1e-9)


# ---------------------------------------------------------------- errors


def test_errors_say_what_was_seen():
    model, tagged, params, (x, y) = setting("mlp", 4)
    grads = jax.grad(model.plain_loss)(params, x, y)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"batch=\(x, y, …\).*batch of type.*None"):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match="batch of type.*list"):
        tx.update(grads, state, params, batch=[x, y])
    with pytest.raises(ValueError, match="params of type.*None"):
        tx.update(grads, state, batch=(x, y))

    def shared(params, x, y, scale):
        return model.loss(params, scale * x, y)

    mixed = kfac.tag(shared, params, x, y, jnp.ones(3)[0])
    with pytest.raises(ValueError, match=r"\[\(4, 4\), \(4,\), \(\)\].*\[\(4, 3\)\]"):
        kfac.ntk.kernel(mixed, params, (x, y, jnp.ones(())), independent=True)
    unmarked = kfac.tag(model.plain_loss, params, x, y)
    with pytest.raises(ValueError, match=r"marked"):
        kfac.ntk.kernel(unmarked, params, (x, y))


def test_widths_that_differ():
    def loss(params, x):
        return jnp.mean(jnp.sum(kfac.normal(x * params) ** 2, -1)) / 2

    params, x = jnp.ones(()), jnp.ones((4, 3))
    tagged = kfac.tag(loss, params, x)
    with pytest.raises(ValueError, match=r"\(4, 3\) and that of other \(5, 2\)"):
        kfac.ntk.kernel(tagged, params, (x,), (jnp.ones((5, 2)),))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"damping": 0.0}, ValueError),
        ({"damping": "small"}, TypeError),
        ({"damping": kfac.damping.adaptive()}, TypeError),
        ({"damping": kfac.damping.levenberg_marquardt()}, TypeError),
        ({"damping": 0.1, "solver": "lu"}, ValueError),
        ({"damping": 0.1, "chunk": 0}, ValueError),
    ],
    ids=str,
)
def test_wrong_options(options, error):
    tagged = setting("mlp")[1]
    with pytest.raises(error):
        kfac.ntk.dual_natural_gradient(tagged, **options)


def test_every_parameter_is_updated():
    """None is left out, whatever its layer is to K-FAC."""
    _, tagged, params, batch = setting("layer_norm", 4)
    grads = jax.grad(tagged.loss_fn)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1)
    found, _ = tx.update(grads, tx.init(params), params, batch=batch)
    assert all(np.asarray(leaf).any() for leaf in leaves(found).values())
