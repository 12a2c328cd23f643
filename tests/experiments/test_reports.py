"""Tables and plots, from metrics files written by hand."""

import json

import pytest

from experiments.errors import MetricsError
from experiments.main import main
from experiments.reports import make_table, read_runs, save_plots


def write_run(folder, optimizer, losses, status="finished"):
    """Writes a run whose training loss after step 10 i is ``losses[i]``."""
    config = {
        "kind": "config",
        "step": 0,
        "optimizer": optimizer,
        "title": optimizer.upper(),
        "config": {"model": "mlp"},
        "data": {"title": "Digits"},
    }
    records = [config] + [
        {
            "kind": "eval",
            "step": 10 * i,
            "seconds": i / 2,
            "train_loss": loss,
            "test_loss": None if loss is None else loss + 0.1,
            "test_accuracy": 0.5,
        }
        for i, loss in enumerate(losses)
    ]
    if status:
        end = {"kind": "end", "step": 10 * len(losses), "compile_seconds": 3.25}
        records.append(end | {"status": status})
    path = folder / optimizer / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, "adam", [2.0, 1.0, 0.5, 0.75])
    write_run(tmp_path, "kfac", [2.0, 0.5, 0.25, 0.125])
    write_run(tmp_path, "sgd", [2.0, 1.5, None], status="diverged")
    write_run(tmp_path, "adamw", [2.0, 1.0], status=None)
    return tmp_path


def test_order_and_status(folder):
    runs = read_runs(folder)
    assert [run.optimizer for run in runs] == ["kfac", "sgd", "adam", "adamw"]
    assert [run.status for run in runs] == [
        "finished",
        "diverged",
        "finished",
        "unfinished",
    ]


def test_table(folder, console):
    console.print(make_table(read_runs(folder), "adam"))
    lines = console.file.getvalue().splitlines()
    rows = {
        name: line.split()
        for name in ("KFAC", "SGD", "ADAM", "ADAMW")
        for line in lines
        if line.split()[:1] == [name]
    }
    # Adam's best is 0.5, at step 20; K-FAC is there at step 10, after half a second.
    assert rows["KFAC"][1:] == "0.125 0.225 50.00% 30 1.5 3.2 4.8 10 0.5".split()
    assert rows["ADAM"][1:] == "0.75 0.85 50.00% 30 1.5 3.2 4.8 20 1.0".split()
    assert rows["SGD"][1:] == "(diverged) - - 50.00% 20 1.0 3.2 4.2 - -".split()
    assert rows["ADAMW"][1] == "(unfinished)"


def test_plots(folder):
    for path in save_plots(read_runs(folder), folder):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_report_command(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert "loss_vs_seconds.png" in capsys.readouterr().out


def test_plot_that_cannot_be_written(folder):
    with pytest.raises(MetricsError, match="cannot be written"):
        save_plots(read_runs(folder), folder / "nowhere")


def test_empty_folder(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err


def test_total_seconds_hold_compiling(folder):
    """Compiling is 3.25 s, the last evaluation at 1.5 s; none of an unfinished run."""
    table = make_table(read_runs(folder), "adam")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["total s"] == ["4.8", "4.2", "4.8", "-"]
    assert "total is with compilation" in str(table.caption)


WRONG = {
    "eval": {"train_loss": "much", "test_loss": [], "seconds": None,
             "test_accuracy": "half", "step": "three"},
    "config": {"optimizer": 3, "title": None, "config": {}, "data": {"title": 1}},
    "end": {"status": "asleep", "compile_seconds": None},
}  # fmt: skip


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_records_with_missing_or_wrong_fields(kind, missing, folder, capsys):
    """One line that names the file, the line and the field."""
    path = folder / "adam" / "metrics.jsonl"
    before = path.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    number = next(i for i, r in enumerate(records) if r["kind"] == kind)
    for name, value in WRONG[kind].items():
        if missing and name == "test_accuracy":
            continue  # not every network has one
        bad = dict(records[number])
        bad.pop(name) if missing else bad.update({name: value})
        lines = [*records[:number], bad, *records[number + 1 :]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["report", str(folder)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert str(path) in told and f"line {number + 1}" in told and name in told
    path.write_text(before)
    assert main(["report", str(folder)]) == 0
