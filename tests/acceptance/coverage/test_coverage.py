"""Full-size networks, as shapes: how much of them gets a block."""

import io
import json

import chex
import jax
import pytest
from rich.console import Console

import kfac_jax_lite as kfac
from experiments.models.architectures import (
    ARCHITECTURES,
    GPT,
    Architecture,
    LSTMLanguageModel,
    language_model,
)
from tests.acceptance.coverage import __main__ as coverage
from tests.acceptance.coverage.counts import percent, reasons
from tests.helpers import cases

PARAMETERS = {
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "vit_b16": 86_567_656,
    "mixer_b16": 59_880_472,
    "gpt2_small": 124_439_808,
    "gpt2_small_scan": 124_439_808,
    "gpt2_xl": 1_557_611_200,
    "gpt2_xl_scan": 1_557_611_200,
    "lstm": 50_059_878,
}
TINY = {
    "tiny": Architecture("tiny", lambda: GPT(1, 8, 2, 11, 6), language_model, (2, 6))
}


FAST = ["resnet50", "vit_b16", "mixer_b16", "gpt2_small", "gpt2_small_scan", "lstm"]


@pytest.mark.parametrize("name", cases(ARCHITECTURES, FAST))
def test_every_parameter_of_a_full_size_network_is_in_one_layer(name):
    architecture = ARCHITECTURES[name]
    problem = architecture.make()
    tagged = coverage.tag(problem)
    assert problem.parameters == PARAMETERS[name]
    paths = jax.tree_util.tree_flatten_with_path(problem.params)[0]
    claimed = [path for layer in tagged.layers for path in layer.params]
    assert {jax.tree_util.keystr(path) for path, _ in paths} == set(claimed)
    row = coverage.coverage(tagged.layers)
    assert row["parameters"] == problem.parameters
    assert row["share"] >= 0.99, reasons(row["fallback"])


@pytest.mark.parametrize(
    "name", cases(["resnet50", "gpt2_small_scan"], ["gpt2_small_scan"])
)
def test_the_tagged_gradient_of_a_full_size_network_has_the_right_shapes(name):
    problem = ARCHITECTURES[name].make()
    tagged = coverage.tag(problem)
    _, grads, statistics = jax.eval_shape(
        tagged.value_and_grad, problem.params, *problem.args
    )
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (grads, problem.params)]
    assert shapes[0] == shapes[1]
    for layer in tagged.layers:
        if layer.kronecker:
            assert statistics[layer.name].a.shape == layer.a_shape
            assert statistics[layer.name].g.shape == layer.g_shape


@pytest.mark.parametrize(
    "model",
    [
        GPT(2, 8, 2, 11, 6),
        GPT(2, 8, 2, 11, 6, scan=True),
        GPT(2, 8, 2, 11, 6, scan=True, remat=True),
        GPT(2, 8, 2, 11, 6, remat=True),
        LSTMLanguageModel(11, 8),
        LSTMLanguageModel(11, 8, fused=False),
    ],
    ids=["plain", "scan", "scan_remat", "remat", "lstm", "lstm_cell"],
)
def test_tagged_value_and_gradient_are_the_plain_ones(model, rng):
    problem = language_model(model, (3, 6))
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("float32"), problem.params
    )
    tokens, targets = rng.integers(0, 11, size=(2, 3, 6))
    tagged = kfac.tag(problem.loss, params, tokens, targets)
    value, grads, _ = jax.jit(tagged.value_and_grad)(params, tokens, targets)
    plain = jax.jit(jax.value_and_grad(problem.loss))
    chex.assert_trees_all_close(
        (value, grads), plain(params, tokens, targets), rtol=1e-4, atol=1e-5
    )


def test_the_program_writes_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "ARCHITECTURES", TINY)
    # The program turns the folder of earlier compilations off.
    kept = jax.config.jax_enable_compilation_cache
    console = Console(file=io.StringIO(), width=110)
    config = coverage.Config(("tiny",), 1, ("tiny",), 2, tmp_path)
    try:
        result = coverage.benchmark(config, console)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    assert json.loads((tmp_path / "coverage.json").read_text())["models"].keys() == {
        "tiny"
    }
    row = result["models"]["tiny"]
    assert row["layers"] == sum(kind["layers"] for kind in row["kinds"].values())
    assert row["jaxpr_seconds"] > 0 and row["tag_seconds"] >= 0
    assert row["compile"]["ratio"] > 0
    assert "tiny" in console.file.getvalue()


def test_reasons_are_summed_up():
    items = [
        {"params": [f"['{i}']"], "parameters": 10**i, "note": "no rule for sort"}
        for i in range(1, 4)
    ]
    items.append({"params": ["['x']"], "parameters": 5000, "note": "unused"})
    assert reasons(items) == [
        "unused: 5,000 in 1 (['x'])",
        "no rule for sort: 1,110 in 3 (['1'], ['2'], …)",
    ]


def test_a_share_is_never_rounded_to_all():
    assert percent(1.0) == "100 %"
    assert percent(0.999999) == "99.99 %"
    assert percent(0.5) == "50.00 %"
