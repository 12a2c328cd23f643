"""The cost model against the paper's figures, and the state and counters of a run."""

import jax
import jax.numpy as jnp
import pytest

import kfac_jax_lite as kfac
from experiments.models.architectures import ARCHITECTURES
from kfac_jax_lite.kronecker.state import from_words
from tests.helpers import INVERSES, cases, train
from tests.programs import mlp

STEPS = 2814


@pytest.fixture(scope="module")
def resnet50():
    problem = ARCHITECTURES["resnet50"].make()
    return kfac.tag(problem.loss, problem.params, *problem.args, has_aux=True).layers


def test_the_elements_of_resnet50(resnet50):
    """Packed factors and full batch-norm blocks, 107 layers."""
    cost = kfac.cost_model(resnet50, devices=128, batch_norm="full")
    assert len(cost.layers) == 107
    assert cost.parameters == 25_557_032
    assert cost.elements == 133_411_891


def test_three_terabytes(resnet50):
    """3.0 TB in 2,814 steps of float32 and a flag, all-reduced by many devices."""
    full = kfac.cost_model(resnet50, devices=128, batch_norm="full")
    limit = STEPS * full.bytes_per_step(event="refresh", limit=True)
    assert limit == (133_411_891 + 1) * 4 * 2 * STEPS
    assert round(limit / 1e12, 3) == 3.003
    exact = STEPS * full.bytes_per_step(event="refresh")
    assert exact == pytest.approx(limit * 127 / 128, rel=1e-12)
    unit = kfac.cost_model(resnet50, devices=128)
    assert round(100 * unit.elements / full.elements, 1) == 57.8


@pytest.mark.parametrize("rate, gigabytes", [(0.169, 507), (0.119, 357), (0.109, 327)])
def test_gigabytes_at_adaptive_intervals(resnet50, rate, gigabytes):
    """Table 1 of the same paper: its ratios and its bytes agree with the model."""
    cost = kfac.cost_model(resnet50, devices=128, batch_norm="full")
    sent = STEPS * cost.bytes_per_step(rate, event="refresh", limit=True)
    assert sent / 1e9 == pytest.approx(gigabytes, abs=1)


def test_reduce_scatter_and_bfloat16_halve(resnet50):
    def sent(**options):
        reduction = kfac.Reduction(devices=128, **options)
        cost = kfac.cost_model(resnet50, reduction, 128)
        return cost.bytes_per_step(event="refresh", limit=True)

    whole, owner = sent(), sent(mode="owner")
    # Unit-wise blocks are all-reduced in either mode, and slices are padded.
    assert 0.5 < owner / whole < 0.502
    narrow = sent(mode="owner", dtype=jnp.bfloat16)
    assert narrow == pytest.approx(owner / 2, rel=2e-3)
    assert sent(dtype=jnp.bfloat16) == pytest.approx(whole / 2, rel=2e-3)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize(
    "interval",
    [kfac.intervals.every(2), kfac.intervals.adaptive(0.1), kfac.intervals.staleness()],
    ids=lambda interval: interval.kind,
)
def test_memory_is_that_of_the_state(inverse, interval):
    tagged, params, _ = mlp([6, 5, 4, 3], 8, norm=True)
    tx = kfac.scale_by_kfac(tagged.layers, inverse=inverse, interval=interval)
    state = tx.init(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params))
    cost = kfac.cost_model(tagged.layers, inverse=inverse, interval=interval)
    for kept, bytes_kept in zip(
        (state.factors, state.previous, state.inverses), cost.memory, strict=True
    ):
        assert sum(x.nbytes for x in jax.tree.leaves(kept)) == bytes_kept


@pytest.mark.parametrize("share", ["inverses", "gradients"])
def test_memory_of_a_device_that_owns(share):
    """Parts of the state, one for each of the eight devices."""
    tagged, params, _ = mlp([70, 65, 33], 8, norm=True)
    reduction = kfac.Reduction("owner", devices=8, bucket=0, share=share)
    tx = kfac.scale_by_kfac(
        tagged.layers,
        interval=kfac.intervals.adaptive(0.1),
        axis_name="batch",
        reduction=reduction,
    )
    state = jax.eval_shape(tx.init, params)
    cost = kfac.cost_model(
        tagged.layers, reduction, 8, interval=kfac.intervals.adaptive(0.1)
    )
    specs = kfac.state_specs(state, "batch")

    def on_a_device(kept, spec):
        sizes = jax.tree.map(
            lambda x, s: x.size * x.dtype.itemsize // (8 if s and s[0] else 1),
            kept,
            spec,
        )
        return sum(jax.tree.leaves(sizes))

    assert cost.memory == (
        on_a_device(state.factors, specs.factors),
        on_a_device(state.previous, specs.previous),
        on_a_device(state.inverses, specs.inverses),
    )


def test_a_recorded_trace(rng):
    """Bytes of a run are its refreshes times the bytes of one."""
    tagged, params, args = mlp([4, 3, 2], 8)
    tx = kfac.scale_by_kfac(tagged.layers, interval=kfac.intervals.every(3))
    params, args = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), (params, args)
    )
    _, state, _ = train(tagged, tx, params, [args] * 7)
    report = kfac.report(state)
    assert [record["refreshes"] for record in report] == [3, 3]
    # Without a mapped axis the counter takes it that XLA reduces whole matrices.
    cost = kfac.cost_model(tagged.layers, devices=4, mapped=False)
    sent = cost.bytes_per_step(report, event="refresh")
    reduced = sum(record["bytes_reduced"] for record in report)
    assert 7 * sent == pytest.approx(reduced * 2 * 3 / 4)
    assert cost.rates(report)["0"].refresh == pytest.approx(3 / 7)
    assert 7 * sent == pytest.approx(3 * cost.bytes_per_step(event="refresh"))


REDUCTIONS = [
    kfac.Reduction(),
    kfac.Reduction(pack=False),
    kfac.Reduction(dtype=jnp.bfloat16),
    kfac.Reduction("owner", devices=8, bucket=0, share="inverses"),
    kfac.Reduction("owner", devices=8, bucket=0, share="gradients"),
    kfac.Reduction("owner", devices=8, bucket=1500, dtype=jnp.bfloat16),
]


FAST = [REDUCTIONS[i] for i in (0, 3, 5)]


@pytest.mark.parametrize("reduction", cases(REDUCTIONS, FAST), ids=str)
def test_the_counter_of_the_state(reduction):
    """What a refresh, an inversion and a step move, layer by layer."""
    tagged, params, _ = mlp([40, 33, 20], 8, norm=True)
    tx = kfac.scale_by_kfac(tagged.layers, axis_name="batch", reduction=reduction)
    clock = tx.init(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)).clock
    # Where the mode does not say how many devices there are, the counter takes one.
    cost = kfac.cost_model(tagged.layers, reduction, reduction.devices or 1)
    names = sorted(record.layer.name for record in cost.layers)
    for event, counted in (
        ("refresh", clock.bytes),
        ("inversion", clock.inversion_bytes),
        ("step", clock.step_bytes),
    ):
        moved = dict.fromkeys(names, 0)
        for one in cost.collectives:
            if one.event == event and one.layer:
                moved[one.layer] += one.payload
        assert [moved[name] for name in names] == from_words(counted)


def test_kinds_and_events_add_up(resnet50):
    reduction = kfac.Reduction("owner", devices=16)
    cost = kfac.cost_model(resnet50, reduction, 16)
    whole = cost.bytes_per_step(0.5)
    kinds = {c.kind for c in cost.collectives}
    assert {"all_reduce", "reduce_scatter", "permute", "all_gather"} <= kinds
    events = ("refresh", "inversion", "step")
    for parts in (
        [cost.bytes_per_step(0.5, kind=kind) for kind in kinds],
        [cost.bytes_per_step(0.5, event=event) for event in events],
    ):
        assert sum(parts) == pytest.approx(whole)


def test_inverse_interval_limits_inversions(resnet50):
    reduction = kfac.Reduction("owner", devices=16)

    def inversions(rate, interval):
        cost = kfac.cost_model(resnet50, reduction, 16, inverse_interval=interval)
        return cost.rates(rate)["head"].inversion

    assert inversions(1.0, 1) == 1
    assert inversions(1.0, 5) == 0.2
    assert inversions(0.1, 5) == 0.1


def test_the_table(resnet50):
    text = str(kfac.cost_model(resnet50, devices=128, batch_norm="full"))
    lines = text.splitlines()
    assert len(lines) == 107 + 4
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "133,411,891 elements" in lines[-1]
    assert "1.06 GB sent per step" in lines[-1]


def test_wrong_arguments():
    tagged, params, args = mlp([4, 3], 2)
    rows = kfac.layer_rows(tagged, params, *args)
    for options, error in (
        ({"batch_norm": "none"}, "batch_norm must be one of"),
        ({"devices": 0}, "devices wants a whole number"),
        ({"inverse_interval": 0}, "inverse_interval wants a whole number"),
        ({"inverse": "lu"}, "inverse must be one of"),
        ({"rows": {}}, "rows has no entry for layer"),
    ):
        with pytest.raises(ValueError, match=error):
            kfac.cost_model(tagged.layers, **options)
    cost = kfac.cost_model(tagged.layers, rows=rows)
    for trace, error in (
        (1.5, "from 0 to 1"),
        ([], "no record of layer"),
        ([{"name": "0", "steps": 0, "refreshes": 0, "inversions": 0}], "no steps yet"),
    ):
        with pytest.raises(ValueError, match=error):
            cost.bytes_per_step(trace)
    with pytest.raises(ValueError, match="rows=kfac.layer_rows"):
        kfac.cost_model(tagged.layers).flops_per_step()
