"""The batch-size study: searches that go on, winners, a page from the records."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.main import main
from experiments.studies import records
from experiments.studies.batch_size import report, run
from experiments.studies.batch_size.config import (
    SIZES,
    TINY,
    BatchReport,
    BatchStudy,
    Cell,
)
from experiments.tuning.optimisers import rate_at
from experiments.tuning.trials import as_floats
from tests.experiments.batch_runs import lines, make_record, write

ARGUMENTS = [
    "study", "batch-size", "--size", "tiny", "--train-examples", "128",
    "--validation-examples", "32", "--batch-sizes", "32", "64", "--hidden", "8",
]  # fmt: skip
FEW = [*ARGUMENTS, "--trials", "2", "--seeds", "2"]
PLOTS = ("final", "iterations", "seconds", "search")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("batch_size")
    with jax.enable_x64(False):  # as in every test of the experiments
        assert main([*FEW, "--out", str(out)]) == 0
    return out


def test_every_cell_has_its_trials_and_seeds(folder):
    for size in (32, 64):
        for optimizer in ("sgd", "adamw", "muon", "kfac"):
            records = lines(folder / f"{optimizer}_{size}.jsonl")
            assert [r["kind"] for r in records] == ["trial"] * 2 + ["seed"] * 2
            trials, seeds = records[:2], records[2:]
            best = max((t for t in trials if not t["pruned"]), key=run.final)
            assert [s["seed"] for s in seeds] == [1, 2]
            for seed in seeds:
                assert seed["number"] == best["number"]
                assert seed["values"] == best["values"]
                assert seed["step"] == 2 * 128 // size
                for name in ("accuracy", "loss", "train_accuracy", "wall", "processor"):
                    assert len(seed[name]) == 2
            first = trials[0]["values"]
            assert first == pytest.approx(TINY.space(optimizer).usual())


def test_the_page_is_made_from_records_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", None)  # nothing can be trained
    command = ["study", "batch-size-report", "--folder", str(folder)]
    assert main([*command, "--out", str(tmp_path)]) == 0
    html, page = (tmp_path / f"page.{end}" for end in ("html", "md"))
    text = page.read_text()
    for part in ("K-FAC − SGD", "AdamW", "Muon", "decay epoch", "training − test"):
        assert part in text and part in html.read_text()
    for name in PLOTS:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert f"({name}.png)" in text
    assert (tmp_path / "runs.parquet").stat().st_size > 1000
    rows = json.loads((tmp_path / "summary.json").read_text())["cells"]
    of_cell = next(r for r in rows if (r["optimizer"], r["batch_size"]) == ("muon", 64))
    ends = [r["accuracy"][-1] for r in lines(folder / "muon_64.jsonl")[2:]]
    assert of_cell["test_accuracy"] == pytest.approx(np.mean(ends))
    assert "paper: SGD" not in text  # digits are not the paper's images


def test_a_finished_study_trains_nothing(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.glob("*.jsonl")}
    monkeypatch.setattr(run, "make_program", None)
    assert main([*FEW, "--out", str(folder)]) == 0
    assert {p.name: p.read_bytes() for p in folder.glob("*.jsonl")} == before


def test_a_killed_study_goes_on_as_if_it_had_not_stopped(folder, tmp_path):
    whole = (folder / "kfac_64.jsonl").read_text().splitlines()
    half = whole[1][: len(whole[1]) // 2]
    (tmp_path / "kfac_64.jsonl").write_text(f"{whole[0]}\n{half}")
    assert main([*FEW, "--only", "kfac_64", "--out", str(tmp_path)]) == 0
    again = lines(tmp_path / "kfac_64.jsonl")
    for old, new in zip(map(json.loads, whole), again, strict=True):
        for name in ("kind", "number", "seed", "values", "pruned"):
            assert old[name] == new[name]
        np.testing.assert_allclose(old["loss"], new["loss"], rtol=1e-4)


def test_more_trials_and_another_winner(folder, tmp_path):
    """Seeds of an old winner stay, those of the new one are run."""
    records = lines(folder / "sgd_64.jsonl")
    old = max((r for r in records[:2] if not r["pruned"]), key=run.final)
    # A third trial that is perfect: the winner changes.
    perfect = dict(records[0], number=2, accuracy=[1.0, 1.0], pruned=False)
    write(tmp_path, "sgd_64", [*records, perfect])
    more = [*ARGUMENTS, "--trials", "3", "--seeds", "2", "--only", "sgd_64"]
    assert main([*more, "--out", str(tmp_path)]) == 0
    found = lines(tmp_path / "sgd_64.jsonl")
    assert found[:4] == records
    assert [(r["kind"], r["number"], r["seed"]) for r in found[5:]] == [
        ("seed", 2, 1),
        ("seed", 2, 2),
    ]
    result = report.read_results(tmp_path)[Cell("sgd", 64)]
    assert old["number"] != result.winner["number"] == 2
    assert [r["number"] for r in result.seeds.values()] == [2, 2]


def test_more_trials_go_on_with_a_search(folder, tmp_path):
    write(tmp_path, "sgd_64", lines(folder / "sgd_64.jsonl"))
    more = [*ARGUMENTS, "--trials", "3", "--seeds", "1", "--only", "sgd_64"]
    assert main([*more, "--out", str(tmp_path)]) == 0
    trials = [r for r in lines(tmp_path / "sgd_64.jsonl") if r["kind"] == "trial"]
    assert [t["number"] for t in trials] == [0, 1, 2]
    assert trials[2]["values"] not in [t["values"] for t in trials[:2]]


def test_runs_of_another_configuration_are_refused(folder, capsys):
    more = ["--epochs", "3", "--only", "sgd_64", "--out", str(folder)]
    assert main([*FEW, *more]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_what_the_fingerprint_leaves_out():
    base = TINY.fingerprint()
    same = {"trials": 9, "seeds": 9, "only": ("sgd_32",), "batch_sizes": (32,)}
    assert dataclasses.replace(TINY, **same).fingerprint() == base
    for change in ({"epochs": 3}, {"kl_clip": None}, {"fisher": "empirical"}):
        assert dataclasses.replace(TINY, **change).fingerprint() != base


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batch-sizes", "4096"], ["--only", "sgd_7"], ["--epochs", "0"],
        ["--train-examples", "5000"], ["--pool", "3"], ["--kl-clip", "0"],
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_told(wrong, tmp_path, capsys):
    try:
        code = main([*FEW, *wrong, "--out", str(tmp_path)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert wrong[0].removeprefix("--") in capsys.readouterr().err


def test_the_images_are_split(tmp_path):
    """Training, validation and test images are distinct, and always the same."""
    config = dataclasses.replace(TINY, train_examples=1_000)
    first, again = run.load(config), run.load(TINY)
    held = first.held[0]
    np.testing.assert_array_equal(held, again.held[0])
    np.testing.assert_array_equal(first.data.x_train[:512], again.data.x_train)
    parts = {
        name: {x.tobytes() for x in images}
        for name, images in (("train", first.data.x_train), ("held", held))
    }
    assert len(parts["held"]) == len(held)
    assert not parts["train"] & parts["held"]


def test_steps_are_those_of_the_optimiser():
    """One epoch of SGD by hand: momentum, weight decay, the drop of the rate."""
    config = dataclasses.replace(
        TINY, train_examples=128, epochs=2, augmentation="none", hidden=(4,)
    )
    cell, shared = Cell("sgd", 64), run.load(config)
    program = run.make_program(config, shared, cell)
    values = {
        "learning_rate": 0.2, "lr_decay": 0.1, "decay_epoch": 0.5, "momentum": 0.8,
        "weight_decay": 0.01,
    }  # fmt: skip
    measure, _ = run.measures(shared)
    record = run.run_one(config, shared, cell, program, values, 3, measure)
    params, state = shared.task.init(jax.random.key(3))
    velocity = jax.tree.map(jnp.zeros_like, params)
    for number in range(4):
        rows = run.orders(128, 64, 2, 3)[number // 2][number % 2]
        batch = tuple(part[rows] for part in shared.images)
        grads = jax.grad(lambda p, b=batch: shared.task.loss(p, state, *b)[0])(params)
        rate = 0.2 if number < 2 else 0.02
        assert float(rate_at(as_floats(values), number, 4)) == pytest.approx(rate)
        velocity = jax.tree.map(
            lambda v, g, p: 0.8 * v + g + 0.01 * p, velocity, grads, params
        )
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
    wanted = measure((params, state))
    np.testing.assert_allclose(record["loss"][-1], wanted["loss"], rtol=1e-5)
    assert record["step"] == 4


def test_optimisers_share_start_and_data():
    """Runs of a seed have the same first images, whatever the batch size."""
    small, other = (rows.ravel() for rows in run.orders(512, 32, 2, seed=1))
    large = run.orders(512, 128, 1, seed=1)[0].ravel()
    np.testing.assert_array_equal(small, large)
    assert sorted(small) == list(range(512))
    assert (small != other).any()


def test_a_run_that_diverges_ends_and_counts_as_chance():
    config = dataclasses.replace(TINY, train_examples=128, epochs=3)
    cell, shared = Cell("sgd", 64), run.load(config)
    program = run.make_program(config, shared, cell)
    values = dict(config.sgd.usual(), learning_rate=1e30)
    measure, _ = run.measures(shared)
    record = run.run_one(config, shared, cell, program, values, 0, measure)
    assert record["diverged"] and not record["pruned"]
    assert len(record["accuracy"]) == 1
    assert run.final(record) == run.CHANCE


def test_a_pruned_trial_never_wins():
    trials = [
        make_record("trial", 0, 0.3),
        make_record("trial", 1, 0.9, pruned=True),
        make_record("trial", 2, 0.4),
        make_record("trial", 3, 0.4),
        make_record("trial", 4, 0.99, diverged=True),
    ]
    assert run.winner_of(trials)["number"] == 2


def test_the_pruner_ends_what_is_below_the_median():
    config = dataclasses.replace(TINY, startup_trials=3, prune_from=1, epochs=2)
    values = config.sgd.usual()
    known = [make_record("trial", i, 0.5, values=values) for i in range(3)]
    for record, first in zip(known, (0.2, 0.3, 0.4), strict=True):
        record["accuracy"] = [first, 0.5]
    for accuracy, pruned in ((0.25, True), (0.35, False)):
        trial = run.next_trial(config, Cell("sgd", 64), known)
        trial.report(accuracy, 1)
        assert bool(trial.should_prune()) is pruned


def test_a_half_line_is_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    records.drop_half_line(path)
    assert path.read_text() == '{"a": 1}\n'
    records.drop_half_line(path)
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("name", SIZES)
def test_refreshes_keep_pace_with_the_examples(name):
    config: BatchStudy = SIZES[name]
    for size in config.batch_sizes:
        every = config.refresh_every(size)
        assert every == 1 or every * size <= config.refresh_examples
        assert (every + 1) * size > config.refresh_examples


def test_report_of_a_part(folder, tmp_path):
    """A study with one cell has a page too."""
    write(tmp_path, "sgd_64", lines(folder / "sgd_64.jsonl"))
    report.save_report(BatchReport(tmp_path), Console(quiet=True))
    assert "no finished runs at a common batch" in (tmp_path / "page.md").read_text()
