"""The contract of the dual natural gradient, on one device and on several."""

import collections
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests import oracles
from tests.helpers import cases, close, identical
from tests.models import BY_NAME
from tests.tangents import primal, ravel, setting, step_of

CASES = [("cholesky", False), ("cholesky", True), ("qr", True)]


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


@pytest.fixture(params=[CASES[0], CASES[2]], ids=str)
def case(request):
    """A small network with three batches, and the transformation."""
    solver, independent = request.param
    model, tagged, params, _ = setting("mlp", 4)
    tx = chained(tagged, solver=solver, independent=independent)
    return tx, tagged, params, [model.batch(4, seed=10 + i) for i in range(3)]


@pytest.mark.parametrize(
    "case",
    cases([(CASES[0],), (CASES[2],)], [(CASES[2],)]),
    indirect=True,
    ids=str,
)
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
    tx = optax.inject_hyperparams(dual)(tagged, damping=0.5)

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


PRECISIONS = list(itertools.product(["bfloat16", "float32"], ["cholesky", "qr"]))


@pytest.mark.parametrize(
    ("dtype", "solver"), cases(PRECISIONS, [PRECISIONS[0], PRECISIONS[3]])
)
def test_lower_precision(dtype, solver):
    """Updates in the parameters' precision; in float32 close to those in float64."""
    model = BY_NAME["mlp"]
    params, batch = model.params(dtype), model.batch(4, dtype)
    tagged = model.tag(4, dtype)
    grads = jax.grad(model.loss)(params, *batch)
    tx = kfac.ntk.dual_natural_gradient(tagged, 0.1, solver=solver)
    found, state = jax.jit(step_of(tx))(grads, params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert int(state.count) == 1
    full = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    x = batch[0].astype(jnp.float64)
    fisher = oracles.dense_fisher(model, full, x, fisher="exact")
    wanted = primal(fisher, ravel(jax.grad(model.loss)(full, x, batch[1])), 0.1)
    close(ravel(found), wanted, 1e-4 if dtype == "float32" else 0.1)


# ---------------------------------------------------------------- devices


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("solver", "independent", "kind"),
    cases(
        [(*c, kind) for c in CASES for kind in (AxisType.Auto, AxisType.Explicit)],
        [(*CASES[0], AxisType.Auto), (*CASES[2], AxisType.Explicit)],
    ),
)
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
