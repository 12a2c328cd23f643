"""``cost`` on the command line: the paper's figures, the plot, traces."""

import io
import json
import typing

import pytest
from rich.console import Console

from experiments import cost, main
from experiments.configs.cost import CostConfig, CostModelName, MachineConfig
from experiments.errors import ConfigError, MetricsError
from experiments.metrics import MetricsFile


@pytest.fixture
def printed(monkeypatch):
    """Runs the command line; returns what it printed."""

    def run(*arguments, status=0):
        console = Console(file=io.StringIO(), width=110)
        monkeypatch.setattr(main, "open_console", lambda: console)
        assert main.main(["cost", *arguments]) == status
        return console.file.getvalue()

    return run


def test_the_models_are_those_of_the_catalogue():
    assert set(typing.get_args(CostModelName)) == set(cost.MODELS)


@pytest.mark.slow
def test_the_papers_bytes(printed):
    text = printed(
        "--model", "resnet50", "--batch-norm", "full", "--steps", "2814"
    )  # fmt: skip
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    full = lines["full batch-norm blocks, all-reduce, float32"]
    assert "133,411,891" in full and "3.003 TB" in full and "2.98 TB" in full
    assert "57.8 %" in lines["unit-wise batch norm"]
    assert "28.9 %" in lines["and reduce-scatter"]
    assert "14.5 %" in lines["and bfloat16"]
    assert "107 layers, 25,557,032 parameters" in text
    assert "simulated" in text


def test_every_model_can_be_counted():
    for name in ("mlp", "autoencoder", "lenet5", "resnet", "lstm"):
        config = CostConfig(name, batch=4)
        net = cost.network(config)
        flops = net.cost(config).flops_per_step()
        assert net.batch == 4 and all(work > 0 for work in flops)


def test_plot_and_result(printed, tmp_path):
    paths = tmp_path / "new" / "cost.png", tmp_path / "cost.json"
    text = printed(
        *("--model", "lenet5", "--devices", "16", "--mode", "owner"),
        *("--plot", str(paths[0]), "--result", str(paths[1])),
    )
    assert f"Plot: {paths[0]}" in text and f"Result: {paths[1]}" in text
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    result = json.loads(paths[1].read_text())
    assert str(tmp_path) not in paths[1].read_text()
    assert set(result["curves"]) == {
        f"{mode} {rate}" for mode in ("all", "owner") for rate in (1.0, 0.109)
    }
    curve = result["curves"]["all 1.0"]
    assert list(curve) == [str(2**k) for k in range(3, 15)]
    times = curve["16"]
    parts = [v for k, v in times.items() if k not in ("total", "factor_share")]
    assert sum(parts) == pytest.approx(times["total"])
    (row,) = [row for row in result["modes"] if row["mode"] == "all"]
    assert row["time"] == times
    assert result["settings"]["machine"]["bandwidth"] == 12.5e9


def test_the_plot_is_marked_simulated():
    config = CostConfig("mlp", batch=32)
    net = cost.network(config)
    figure = cost.draw(cost.simulated(net, config), net, config)
    assert figure.get_suptitle().startswith("Simulated: mlp, 32 examples per device")
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert "all, every step" in labels and "owner, rate 0.109" in labels
    assert not any("published" in label for label in labels)
    (point,) = cost.PUBLISHED["resnet50"]
    assert point.seconds == pytest.approx(0.1875)


def trace(path, layers):
    """A metrics file as a run with K-FAC leaves it."""
    file = MetricsFile(path)
    file.append("config", 0)
    if layers is not None:
        file.append("layers", 10, layers=layers)
    file.close()
    return path


def test_a_trace_takes_the_place_of_the_rate(tmp_path):
    config = CostConfig("mlp", devices=4, steps=10)
    net = cost.network(config)
    records = [
        {"name": t.name, "steps": 10, "refreshes": 1 + i, "inversions": 1}
        for i, t in enumerate(net.layers)
    ]
    config = CostConfig("mlp", steps=10, trace=trace(tmp_path / "t.jsonl", records))
    found = cost.variants(net, config, cost.read_trace(config))
    elements = [record.elements for record in net.cost(config).layers]
    wanted = sum((1 + i) * 2 * 4 * n for i, n in enumerate(elements))
    assert found[0]["limit"] == pytest.approx(wanted)
    console = Console(file=io.StringIO(), width=110)
    cost.run(config, console)
    assert "refreshed as in t.jsonl" in console.file.getvalue()


def test_wrong_traces(tmp_path):
    def run(path):
        config = CostConfig("mlp", trace=path)
        cost.run(config, Console(file=io.StringIO()))

    with pytest.raises(MetricsError, match="does not exist"):
        run(tmp_path / "nothing.jsonl")
    with pytest.raises(MetricsError, match="no record of K-FAC's layers"):
        run(trace(tmp_path / "sgd.jsonl", None))
    with pytest.raises(ConfigError, match="mlp: the trace has no record of layer"):
        run(trace(tmp_path / "other.jsonl", []))


@pytest.mark.parametrize(
    "values, error",
    [
        ({"rate": 1.5}, "rate is 1.5"),
        ({"devices": 0}, "devices is 0"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_wrong_values(values, error):
    with pytest.raises(ConfigError, match=error):
        CostConfig(**values)


def test_wrong_machine():
    with pytest.raises(ConfigError, match="machine.flops is 0"):
        MachineConfig(flops=0.0)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1e3, "1 kB"),
        (3.0034e12, "3.003 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(count, text):
    assert cost.size(count) == text
