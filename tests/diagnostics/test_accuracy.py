"""``inverse_error`` and ``choose_ranks``: against dense matrices and known spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests import models, parallel, zoo
from tests.helpers import INVERSES, batches_of, cases, kfac_state, train

DAMPING = 1e-2
KEYS = {"name", "rank_a", "rank_g", "retained_trace_a", "retained_trace_g"}


def trained(name, inverse, steps=3, limit=8192, **options):
    """Layers and state after some steps."""
    model = zoo.BY_NAME[name] if name in zoo.BY_NAME else models.BY_NAME[name]
    more = {} if limit == 8192 else {"max_factor_dim": limit}
    tagged = model.tag(4, **more)
    tx = kfac.kfac(tagged.layers, 0.05, damping=DAMPING, inverse=inverse, **options)
    state = train(tagged, tx, model.params(), batches_of(model, steps))[1]
    return tagged.layers, state


EXACT = [x for x in INVERSES if x != "ekfac"]
EVERY = [("mlp", limit, inverse) for limit in (8192, 3, 1) for inverse in EXACT]
FAST = [case for case in EVERY if case[1] == 3] + [EVERY[0], EVERY[-1]]


@pytest.mark.parametrize("name, limit, inverse", cases(EVERY, FAST))
def test_exact_methods_have_no_error(name, limit, inverse):
    """With full, block-diagonal and diagonal factors."""
    layers, state = trained(name, inverse, limit=limit)
    records = kfac.inverse_error(layers, state)
    assert [r["name"] for r in records] == [t.name for t in layers if t.kronecker]
    for record in records:
        assert set(record) == KEYS | {"error", "error_white"}
        assert record["error"] < 1e-7
        assert record["error_white"] < 1e-7
        assert record["retained_trace_a"] == record["retained_trace_g"] == 1


@pytest.mark.parametrize("name", ["groups", "layers_scan_norm-jax"])
def test_stacks_and_groups(name):
    layers, state = trained(name, "cholesky")
    assert all(r["error"] < 1e-7 for r in kfac.inverse_error(layers, state))


def test_an_inverse_out_of_date_is_an_error():
    layers, state = trained("mlp", "cholesky", inverse_interval=10)
    assert all(r["error"] > 1e-3 for r in kfac.inverse_error(layers, state))


def low_rank(values, rank):
    """A state whose only layer has factors with these eigenvalues."""
    size = len(values)
    rng = np.random.default_rng(0)
    x = jnp.zeros((4, size), jnp.float64)
    params = {"w": jnp.zeros((size, size), jnp.float64)}
    loss = lambda p, x: jnp.mean(jnp.sum(kfac.normal(x @ p["w"]), -1))  # noqa: E731
    tagged = kfac.tag(loss, params, x)
    q, _ = np.linalg.qr(rng.normal(size=(2, size, size)))
    a, g = jnp.asarray((q * np.asarray(values)) @ q.mT)
    tx = kfac.scale_by_kfac(
        tagged.layers, damping=DAMPING, inverse=kfac.low_rank(rank), factor_decay=0.0
    )
    update = jax.jit(lambda s, f: tx.update(params, s, params, statistics=f)[1])
    state = tx.init(params)
    for _ in range(30):
        state = update(state, {"w": kfac.KroneckerStatistics(a, g)})
    return tagged.layers, state, np.asarray(a), np.asarray(g), q


def test_the_error_is_that_of_the_factors_kept():
    """In closed form: the mean over gradients with the factors' covariance."""
    values = 0.6 ** np.arange(12)
    layers, state, _, _, _ = low_rank(values, 4)
    (record,) = kfac.inverse_error(layers, state)
    kept = np.where(np.arange(12) < 4, values, values[4:].mean())
    exact = 1 / (np.outer(values, values) + DAMPING)
    error = 1 / (np.outer(kept, kept) + DAMPING) - exact
    assert record["rank_a"] == record["rank_g"] == 4
    share = values[:4].sum() / values.sum()
    assert record["retained_trace_a"] == pytest.approx(share, rel=1e-4)
    for name, weight in (("error", np.outer(values, values)), ("error_white", 1.0)):
        wanted = np.sqrt(np.sum(weight * error**2) / np.sum(weight * exact**2))
        assert record[name] == pytest.approx(wanted, rel=0.25)
    (reported,) = kfac.report(state)
    assert reported["retained_trace_g"] == record["retained_trace_g"]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_ranks_keep_the_share_and_no_more(share):
    values = 0.6 ** np.arange(12)
    layers, state, *_ = low_rank(values, 4)
    ((a, g),) = kfac.choose_ranks(layers, state, share).values()
    kept = np.cumsum(values) / values.sum()
    assert a == g
    assert kept[a - 1] >= share - 1e-9
    assert a == 1 or kept[a - 2] < share


def test_chosen_ranks_are_taken():
    layers, state = trained("mlp", "eigh")
    chosen = kfac.choose_ranks(layers, state, 0.3)
    method = kfac.low_rank(chosen)
    _, state = trained("mlp", method)
    for record in kfac.inverse_error(layers, state):
        ranks = tuple(record[f"rank_{side}"] for side in ("a", "g"))
        layer = next(t for t in layers if t.name == record["name"])
        assert ranks == method.ranks(layer)
        kept = method.ranks(layer) != (layer.a_shape[-1], layer.g_shape[-1])
        assert (record["error"] > 1e-7) == kept


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_states_with_owners():
    """Factors in slices, and rows of an inverse on different devices."""
    model = models.BY_NAME["mlp"]
    layers = model.tag(parallel.EXAMPLES).layers
    reduction = parallel.OWNER(share="gradients")
    _, state = parallel.run(model, "shard_map", reduction, 3)
    whole = parallel.whole(model, state)
    assert kfac.inverse_error(layers, state) == kfac.inverse_error(layers, whole)
    assert kfac.choose_ranks(layers, state) == kfac.choose_ranks(layers, whole)


def test_states_that_say_nothing():
    layers, state = trained("mlp", "eigh")
    with pytest.raises(ValueError, match="contains 0 KFACStates"):
        kfac.inverse_error(layers, ())
    fresh = kfac_state(state)._replace(count=jnp.zeros((), jnp.int32))
    with pytest.raises(ValueError, match="no step"):
        kfac.choose_ranks(layers, fresh)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="retained_trace"):
            kfac.choose_ranks(layers, state, share)
