"""The interval study: traffic, data parallelism, going on, table and plots."""

import dataclasses
import io
import json
import math
import os
import re

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import kfac_jax_lite as kfac
from experiments import main as command_line
from experiments.datasets import Dataset
from experiments.errors import ConfigError, DataError, MetricsError
from experiments.metrics import read_records
from experiments.studies import images
from experiments.studies.commands import set_host_devices
from experiments.studies.intervals import report, run
from experiments.studies.intervals.config import (
    SIZES,
    Cell,
    IntervalReport,
    IntervalStudy,
)

DEVICES = 8

needs_devices = pytest.mark.skipif(
    jax.device_count() != DEVICES, reason="needs eight host devices"
)


def tiny(path, **values) -> IntervalStudy:
    small = {
        "out": path,
        "blocks": (),  # a convolution, batch norm and the dense layer
        "batch_size": 128,
        "steps": 12,
        "record_every": 1,
        "eval_every": 6,
    }
    return dataclasses.replace(SIZES["tiny"], **(small | values))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three cells, recorded at every step."""
    path = tmp_path_factory.mktemp("study") / "cells.jsonl"
    config = tiny(path, rules=("elapsed", "multiple"))
    with jax.enable_x64(False):
        run.run_intervals(config, Console(file=io.StringIO()))
    return config


def packed(width):
    """Elements of a symmetric matrix on the wire."""
    return width * (width + 1) // 2


def elements_of(layer):
    """Elements that a refresh of a layer sends."""
    blocks = math.prod(layer.a_shape[:-2])
    if layer.kind == "scale_shift":
        return blocks * packed(layer.a_shape[-1])
    return blocks * (packed(layer.a_shape[-1]) + packed(layer.g_shape[-1]))


@needs_devices
def test_traffic_is_refreshes_times_packed_factors(study):
    data = images.load_data(study)
    tagged = run.tag_share(study, run.make_task(study, data), data, DEVICES)
    sizes = {layer.name: 4 * elements_of(layer) for layer in tagged.layers}
    lines = read_records(study.out)
    assert len(lines) == 3
    for line in lines:
        assert {layer["name"] for layer in line["layers"]} == sizes.keys()
        sent = sum(
            layer["refreshes"] * sizes[layer["name"]] for layer in line["layers"]
        )
        everything = study.steps * sum(sizes.values())
        assert line["bytes_reduced"] == line["records"][-1]["bytes"] == sent
        assert line["bytes_if_every_step"] == everything
        assert line["ratio"] == sent / everything
    assert lines[0]["cell"] == {"rule": "every", "threshold": None, "seed": 0}
    assert lines[0]["ratio"] == 1


@needs_devices
@pytest.mark.parametrize("rule", ["elapsed", "multiple"])
def test_refreshes_follow_from_the_changes(study, rule):
    """Algorithm 1 in plain Python, fed with the recorded changes."""
    (line,) = (x for x in read_records(study.out) if x["cell"]["rule"] == rule)
    for i in range(len(line["layers"])):
        interval, refreshes, last = 1, 0, 0
        for record in line["records"]:
            t = record["step"]
            due = t - last >= interval if rule == "elapsed" else t % interval == 0
            if t == 1 or due:
                change = record["change"][i]
                interval += change is not None and change < 0.3
                refreshes, last = refreshes + 1, t
            assert record["interval"][i] == interval
            assert record["refreshes"][i] == refreshes
    assert line["records"][-1]["refreshes"] != [study.steps] * len(line["layers"])


@needs_devices
def test_a_step_is_that_of_the_averages(tmp_path):
    """Loss, batch averages and update are those of the devices' means."""
    config = tiny(tmp_path / "unused.jsonl", decay_power=0.0)
    data, mesh = images.load_data(config), run.make_mesh(config)
    task, cell = run.make_task(config, data), Cell("every", None, 3)
    program = run.make_program(config, cell, task, data, mesh)
    params, model_state = task.init(jax.random.key(3))
    x, y = data.x_train[:128], data.y_train[:128]
    carry, loss = program.step(program.start(3), x, y)

    tagged = run.tag_share(config, task, data, DEVICES)
    shares = zip(np.split(x, DEVICES), np.split(y, DEVICES), strict=True)
    evaluate = jax.jit(tagged.value_and_grad)
    found = [evaluate(params, model_state, *share) for share in shares]
    mean = jax.tree.map(lambda *values: sum(values) / DEVICES, *found)
    (wanted_loss, wanted_state), grads, statistics = mean
    tx = kfac.kfac(
        tagged.layers,
        config.learning_rate,
        damping=config.damping,
        kl_clip=None,
        factor_decay=config.factor_decay,
    )
    update = jax.jit(tx.update)
    updates, _ = update(grads, tx.init(params), params, statistics=statistics)
    wanted = optax.apply_updates(params, updates), wanted_state, wanted_loss
    seen = carry.params, carry.model_state, loss
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        seen,
        wanted,
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), carry.params, params)
    assert max(jax.tree.leaves(moved)) > 1e-2


@needs_devices
def test_finished_cells_are_skipped(study, tmp_path):
    path = tmp_path / "cells.jsonl"
    before = study.out.read_text()
    path.write_text(before)
    more = dataclasses.replace(study, out=path, rules=("elapsed", "staleness"))
    screen = io.StringIO()
    run.run_intervals(more, Console(file=screen, width=200))
    after = path.read_text()
    assert "2 cells finished, 1 to run" in screen.getvalue()
    assert after.startswith(before)
    (new,) = after[len(before) :].splitlines()
    assert json.loads(new)["cell"]["rule"] == "staleness"

    other = dataclasses.replace(more, damping=0.5)
    with pytest.raises(MetricsError, match=r"damping 0\.03, not 0\.5\. Give another"):
        run.run_intervals(other, Console(file=screen))


@needs_devices
def test_report_of_a_run(study, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    config = IntervalReport(study.out, tmp_path, heat_threshold=0.3)
    paths = report.save_report(config, console)
    assert [path.name for path in paths] == [
        "cells.json",
        "cells.png",
        "cells_layers.png",
        "cells.html",
        "cells.md",
        "cells.parquet",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[1:3])
    summary = json.loads(paths[0].read_text())
    assert [row["rule"] for row in summary["rows"]] == ["every", "multiple", "elapsed"]
    page, markdown = (path.read_text(encoding="utf-8") for path in paths[3:5])
    for text in (paths[0].read_text(), study.out.read_text(), page, markdown):
        assert str(tmp_path) not in text
    check_page(page, markdown, summary, read_records(study.out))
    none = dataclasses.replace(config, heat_threshold=0.7, out=tmp_path / "other")
    assert len(report.save_report(none, console)) == 5


def check_page(page, markdown, summary, lines):
    """The page has the table's numbers, the curves', both plots and the commit."""
    assert page.count("data:image/png;base64,") == 2
    for name in ("cells.png", "cells_layers.png"):
        assert f"]({name})" in markdown
    for row in summary["rows"]:
        numbers = f"{100 * row['accuracy']:.2f}", f"{100 * row['ratio']:.1f}"
        for number in numbers:
            assert f"| {number} |" in markdown and f">{number}</td>" in page
    # One seed: the means during training are the values themselves.
    for line in lines:
        rule, threshold = line["cell"]["rule"], line["cell"]["threshold"] or "–"
        values = [f"{100 * x['accuracy']:.2f}" for x in line["evaluations"]]
        assert f"| {' | '.join([rule, str(threshold), *values])} |\n" in markdown
    commit = lines[0]["machine"]["commit"] or "not recorded"
    assert f"Commit: {commit}." in page and f"Commit: {commit}." in markdown


def made_up(rule, threshold, seed, accuracy, ratio):
    """A finished cell of ten steps, 1,000 bytes each."""
    half = round(1e4 * ratio * 0.8)
    records = [
        {"step": 5, "bytes": half},
        {
            "step": 10,
            "bytes": round(1e4 * ratio),
            "refreshes": [6, 4],
            "interval": [3, 4],
        },
    ]
    return {
        "cell": {"rule": rule, "threshold": threshold, "seed": seed},
        "fingerprint": "f",
        "accuracy": accuracy,
        "train_loss": 1.0,
        "ratio": ratio,
        "bytes_reduced": round(1e4 * ratio),
        "bytes_if_every_step": 10_000,
        "records": records,
        "layers": [{"inversions": 2}, {"inversions": 3}],
        "seconds": 1.0,
    }


def test_summary_of_known_numbers():
    rows = report.summarise(
        [
            made_up("elapsed", 0.3, 0, 0.69, 0.1),
            made_up("every", None, 0, 0.70, 1.0),
            made_up("every", None, 1, 0.74, 1.0),
            made_up("elapsed", 0.3, 1, 0.73, 0.2),
            made_up("staleness", 0.2, 0, 0.65, 0.2),
        ]
    )
    every, elapsed, staleness = rows
    assert [row["rule"] for row in rows] == ["every", "elapsed", "staleness"]
    assert every["accuracy"] == pytest.approx(0.72)
    assert elapsed["accuracy"] == pytest.approx(0.71)
    assert elapsed["paired"] == pytest.approx(-0.01)
    assert elapsed["accuracy_range"] == [0.69, 0.73]
    assert elapsed["ratio"] == pytest.approx(0.15)
    assert elapsed["late_ratio"] == pytest.approx(0.06)
    assert elapsed["inversions"] == 5
    assert elapsed["unlike"] == 1.5 and staleness["unlike"] is None
    assert elapsed["within_spread"] and not staleness["within_spread"]
    assert re.search(r" 15\.0 +10\.0-20\.0 ", report.summary_text(rows))


def test_what_is_no_study(tmp_path):
    path = tmp_path / "cells.jsonl"
    with pytest.raises(MetricsError, match="no finished cell"):
        report.read_lines(path)
    line = made_up("elapsed", 0.3, 0, 0.7, 0.1) | {"kind": "cell", "step": 10}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(MetricsError, match="no run of the rule 'every'"):
        report.read_lines(path)
    other = json.dumps(line | {"fingerprint": "g"})
    path.write_text(json.dumps(line) + "\n" + other + "\n")
    with pytest.raises(MetricsError, match="mixes configurations: f, g"):
        report.read_lines(path)


def test_layers_from_input_to_output():
    names = [
        "Dense_0",
        "ResidualBlock_10/Conv_0",
        "ResidualBlock_2/BatchNorm_0",
        "ResidualBlock_2/Conv_1",
        "ResidualBlock_2/Conv_0",
        "BatchNorm_0",
        "Conv_0",
    ]
    assert sorted(names, key=report.depth) == [
        "Conv_0",
        "BatchNorm_0",
        "ResidualBlock_2/Conv_0",
        "ResidualBlock_2/BatchNorm_0",
        "ResidualBlock_2/Conv_1",
        "ResidualBlock_10/Conv_0",
        "Dense_0",
    ]


def test_heat_map_counts_steps_per_refresh():
    line = {
        "layers": [{"name": "Dense_0"}, {"name": "Conv_0"}],
        "records": [
            {"step": 10, "interval": [2, 3], "refreshes": [5, 2]},
            {"step": 20, "interval": [4, 20], "refreshes": [9, 2]},
            {"step": 30, "interval": [5, 20], "refreshes": [11, 3]},
            {"step": 40, "interval": [5, 20], "refreshes": [13, 3]},
        ],
    }
    interval, between, names, steps = report.windows(line)
    assert names == ["Conv_0", "Dense_0"]
    np.testing.assert_array_equal(interval, [[3, 20, 20, 20], [2, 4, 5, 5]])
    wanted = [[30 / 3, 40 / 3, 40 / 3, 30 / 1], [30 / 11, 40 / 13, 40 / 13, 30 / 8]]
    np.testing.assert_array_equal(between, wanted)
    np.testing.assert_array_equal(steps, [0, 10, 20, 30, 40])


def test_pooling(rng):
    pixels = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    small = images.pooled(pixels, 2)
    assert small.shape == (2, 2, 3, 3) and small.dtype == np.float32
    np.testing.assert_allclose(small[1, 1, 2], pixels[1, 2:, 4:].mean((0, 1)), 1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ("never",)}, "rules is 'never'; wanted one of multiple"),
        ({"thresholds": (0.0,)}, "thresholds is 0.0"),
        ({"seeds": (-1,)}, "seeds is -1"),
        (
            {"batch_size": 100},
            "batch-size is 100; wanted a multiple of host-devices, 8",
        ),
        ({"steps": 15}, "steps is 15, .* wanted multiples of record-every, 10"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"host_devices": 0}, "host-devices is 0"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SIZES["tiny"], **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool": 3}, "pool is 3; wanted a divisor of the images' 8 and 8"),
        ({"batch_size": 4096}, "batch-size is 4096; Digits .* has only"),
    ],
)
def test_data_that_does_not_fit(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        images.load_data(tiny(tmp_path / "unused.jsonl", **values))


def test_devices_that_are_not_there(tmp_path):
    wrong = jax.device_count() + 1
    config = tiny(tmp_path / "x.jsonl", host_devices=wrong, batch_size=wrong * 10)
    with pytest.raises(ConfigError, match=f"host-devices is {wrong}; JAX has"):
        run.make_mesh(config)


def test_command_line(monkeypatch, tmp_path):
    parse = command_line.parse
    assert parse(["study", "intervals"]) == SIZES["small"]
    config = parse(["study", "intervals", "--size", "paper", "--seeds", "4"])
    assert config == dataclasses.replace(SIZES["paper"], seeds=(4,))
    report = parse(["study", "intervals-report", "--heat-threshold", "0.2"])
    assert report == IntervalReport(heat_threshold=0.2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    set_host_devices(None)
    set_host_devices(3)
    set_host_devices(4)
    wanted = "--xla_dump_to=x --xla_force_host_platform_device_count=3"
    assert os.environ["XLA_FLAGS"] == wanted


def test_paper_size_says_what_it_wants(tmp_path, capsys):
    arguments = ["study", "intervals", "--size", "paper"]
    arguments += ["--out", str(tmp_path / "x.jsonl")]
    assert command_line.main(arguments) == 2
    assert "No data folder was given. The paper's size wants ImageNet" in (
        capsys.readouterr().err
    )
    assert command_line.main([*arguments, "--data-dir", str(tmp_path)]) == 2
    assert "has no x_train.npy, y_train.npy" in capsys.readouterr().err


def test_imagenet_is_opened_not_read(tmp_path, rng):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 3)):
        pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        np.save(folder / f"x_{split}.npy", pixels)
        np.save(folder / f"y_{split}.npy", np.arange(count) + 994)
    data = images.load_imagenet(tmp_path)
    assert isinstance(data.x_train, np.memmap) and len(data.x_test) == 3
    assert data.num_classes == 1000 and data.y_train.tolist()[-1] == 999
    np.save(folder / "y_test.npy", np.arange(3) + 998)
    with pytest.raises(DataError, match=r"test: images uint8 \(3, 16, 16, 3\)"):
        images.load_imagenet(tmp_path)


def test_paper_size_has_the_papers_factors():
    """53 convolutions, 53 batch norms, 1 dense layer; 3.0 TB with full norm blocks."""
    pixels = np.zeros((1, 224, 224, 3), np.uint8)
    labels = np.zeros(1, np.int32)
    data = Dataset("imagenet", "", "", pixels, labels, pixels, labels, num_classes=1000)
    config = SIZES["paper"]
    tagged = run.tag_share(config, run.make_task(config, data), data, 128)
    kinds = [layer.kind for layer in tagged.layers]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {"conv": 53, "scale_shift": 53, "dense": 1}
    total = sum(
        packed(2 * layer.a_shape[0])
        if layer.kind == "scale_shift"
        else elements_of(layer)
        for layer in tagged.layers
    )
    assert total == 133_411_891
    unit_wise = sum(elements_of(layer) for layer in tagged.layers)
    assert unit_wise / total == pytest.approx(0.578, abs=5e-4)
