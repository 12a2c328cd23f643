"""The damping study: searches that go on, its winners, its page."""

import json

import duckdb
import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.main import main
from experiments.studies.damping import config as configs
from experiments.studies.damping import report, run

ARGUMENTS = [
    "study", "damping", "--size", "tiny", "--trials", "2", "--dampings", "0.01",
    "--steps", "8", "--eval-every", "4", "--eval-examples", "64",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("damping")
    with jax.enable_x64(False):  # as in every test of the experiments
        assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def lines(path):
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_cell_has_its_trials_and_winner(folder):
    for name in ("sgd", "fixed_1e-02", "adaptive", "levenberg_marquardt"):
        records = lines(folder / f"{name}.jsonl")
        assert [r["kind"] for r in records] == ["trial", "trial", "winner"]
        best = min(records[:2], key=run.final)
        assert records[2]["values"] == best["values"]
        np.testing.assert_allclose(records[2]["curve"], best["curve"], rtol=1e-4)
        seen = records[2]["seen"][-1]
        assert [sum(c) for c in seen["squares"]] == [64 * 16, 16 * 16, 16 * 10]
        factors = 0 if name == "sgd" else 6
        assert len(seen["eigenvalues"]) == factors
    assert len(lines(folder / "sensitivity.jsonl")) == 2


def test_tasks_have_their_rates_and_seeds(folder):
    """Both methods: every rate once, then the best one with the other seeds."""
    records = lines(folder / "tasks.jsonl")
    for method in ("default", "adaptive"):
        mine = [r for r in records if r["method"] == method]
        tried = {
            r["values"]["rate"]: r["train_loss"][-1] for r in mine if not r["seed"]
        }
        assert set(tried) == {0.1, 0.3}
        (again,) = [r for r in mine if r["seed"]]
        assert again["values"]["rate"] == min(tried, key=tried.__getitem__)
    dampings = {r["method"]: r["damping"] for r in records}
    np.testing.assert_allclose(dampings["default"], 1e-3)
    assert 0.5 < dampings["adaptive"][0] <= 1.0
    found = json.loads((folder / "summary.json").read_text())["tasks"]["mlp"]
    default, adaptive = (
        next(r for r in records if r["method"] == m and r["seed"])
        for m in ("default", "adaptive")
    )
    for name, key in (("ratio", "loss"), ("train_ratio", "train_loss")):
        assert found[name] == pytest.approx(adaptive[key][-1] / default[key][-1])


def test_tasks_that_are_finished_are_not_run_again(folder, tmp_path):
    records = (folder / "tasks.jsonl").read_text().splitlines()
    for kept in (len(records), 2):
        (tmp_path / "tasks.jsonl").write_text("\n".join(records[:kept]) + "\n")
        only = ["--only", "tasks", "--out", str(tmp_path)]
        assert main([*ARGUMENTS, *only]) == 0
        again = lines(tmp_path / "tasks.jsonl")
        for old, new in zip(map(json.loads, records), again, strict=True):
            assert (old["method"], old["seed"]) == (new["method"], new["seed"])
            np.testing.assert_allclose(old["train_loss"], new["train_loss"], rtol=1e-4)


def test_the_page_has_the_table_and_the_plots(folder):
    page = (folder / "page.md").read_text()
    for part in ("adaptive damping", "λ = 1e-02", "Levenberg-Marquardt", "SGD"):
        assert part in page
    for name in ("sensitivity", "curves", "squares", "eigenvalues", "tasks"):
        assert (folder / f"{name}.png").stat().st_size > 1000
        assert f"{name}.png" in page
    html = (folder / "page.html").read_text()
    assert html.count("data:image/png;base64,") == 5
    assert all(part in html for part in ("adaptive damping", "λ = 1e-02", "SGD"))
    rows = json.loads((folder / "summary.json").read_text())["cells"]
    records = lines(folder / "adaptive.jsonl")
    assert rows["adaptive"]["best"] == min(run.final(r) for r in records[:2])


def test_the_page_has_the_untuned_runs_and_how_it_was_made(folder):
    page = (folder / "page.md").read_text()
    for record in lines(folder / "sensitivity.jsonl"):
        loss = f"{run.final(record):.4f}"
        row = f"| 1e-02 | {record['method']} | 1 | {loss} | {loss} | {loss} |"
        assert row in page
    record = lines(folder / "sgd.jsonl")[0]
    assert f"Commit: {record['machine']['commit'] or 'not recorded'}." in page
    assert "| eval_every | 4 |" in page and "| kl_clip | – |" in page
    assert f"| jax | {jax.__version__} |" in page


def test_the_runs_as_parquet(folder):
    with duckdb.connect() as base:
        table = base.read_parquet(str(folder / "runs.parquet"))
        found = table.select('cell, kind, "values.rate", "values.damping"').fetchall()
        assert "seen" not in " ".join(table.columns)
    wanted = [
        (path.stem, r["kind"], r["values"]["rate"], r["values"].get("damping"))
        for path in sorted(folder.glob("*.jsonl"))
        for r in lines(path)
    ]
    assert found == wanted


def test_records_are_those_of_the_files(folder):
    """What DuckDB infers changes no value, and gives no cell another's keys."""
    cells = report.read_cells(folder)
    assert list(cells) == [
        "sgd",
        "levenberg_marquardt",
        "adaptive",
        "fixed_1e-02",
        "sensitivity",
        "tasks",
    ]
    for name, records in cells.items():
        for record, written in zip(
            records, lines(folder / f"{name}.jsonl"), strict=True
        ):
            for key in written.keys() - {"machine"}:
                assert record[key] == written[key], (name, key)


def test_old_records_without_a_commit(folder, tmp_path):
    for path in folder.glob("*.jsonl"):
        records = lines(path)
        for record in records:
            del record["machine"]["commit"]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / path.name).write_text(text)
    report.save_report(configs.DampingReport(tmp_path), Console(quiet=True))
    assert "Commit: not recorded." in (tmp_path / "page.html").read_text()
    old, new = (
        json.loads((at / "summary.json").read_text())["cells"]
        for at in (tmp_path, folder)
    )
    assert old == new


def test_a_search_goes_on_as_if_it_had_not_stopped(folder, tmp_path):
    whole = (folder / "adaptive.jsonl").read_text().splitlines()
    (tmp_path / "adaptive.jsonl").write_text(whole[0] + "\n")
    only = ["--only", "adaptive", "--out", str(tmp_path)]
    assert main([*ARGUMENTS, *only]) == 0
    again = lines(tmp_path / "adaptive.jsonl")
    for old, new in zip(map(json.loads, whole), again, strict=True):
        assert old["values"] == new["values"]
        np.testing.assert_allclose(old["curve"], new["curve"], rtol=1e-4)


def test_runs_of_another_configuration_are_refused(folder, capsys):
    more = ["--width", "8", "--only", "sgd", "--out", str(folder)]
    assert main([*ARGUMENTS, *more]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert main(["study", "damping-report", "--folder", str(tmp_path)]) == 2
    assert "holds no results" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "wrong",
    [["--steps", "7"], ["--dampings", "-1"], ["--only", "fixed"], ["--kl-clip", "0"]],
    ids=str,
)
def test_wrong_values_are_told(wrong, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, *wrong, "--out", str(tmp_path)])
    assert stopped.value.code == 2


def test_best_third():
    trials = [{"kind": "trial", "curve": [9.0, x]} for x in (3.0, 1.0, None, 2.0)]
    trials += [
        {"kind": "trial", "curve": [9.0, 4.0]},
        {"kind": "trial", "curve": [0.5]},
    ]
    found = [run.final(r) for r in report.best_third(trials)]
    assert found == [0.5, 1.0]


def test_steps_are_those_of_the_optimiser():
    """One step of the SGD cell, by hand: the learning rate falls on a line."""
    config = configs.DampingStudy(
        dataset="digits", hidden=1, width=3, batch_size=32, steps=2, eval_every=1,
        eval_examples=32, dampings=(1.0,), trials=1,
    )  # fmt: skip
    images = run.load(config)
    program = run.make_program(config, images, configs.SGD, None)
    values = {
        "rate": np.float32(0.5),
        "end": np.float32(0.2),
        "momentum": np.float32(0),
    }
    carry = start = program.start(0, values)
    order = run.batches(config, images, 0)
    record = run.train(config, images, program, values, 0)
    params = start[0]
    for number, rate in enumerate((0.5, 0.5 * (1 - 0.8 / 2))):
        x, y = images.x[order[number]], images.y[order[number]]
        grads = jax.grad(run.loss)(params, x, y)
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)
    wanted = program.measure((params, carry[1]))
    np.testing.assert_allclose(record["curve"][-1], wanted, rtol=1e-5)
    assert record["dampings"] == [None] * 3


def test_report_of_a_part(folder, tmp_path):
    """A study with one cell has a page too."""
    (tmp_path / "sgd.jsonl").write_text((folder / "sgd.jsonl").read_text())
    report.save_report(configs.DampingReport(tmp_path), Console(quiet=True))
    assert "SGD" in (tmp_path / "page.md").read_text()
