"""Queries over JSON lines: nulls, nested values, other keys, Parquet."""

import json

import duckdb
import pytest

from experiments import metrics
from experiments.errors import MetricsError
from experiments.studies import records

SGD = {
    "kind": "trial",
    "step": 2,
    "loss": None,
    "values": {"rate": 1, "momentum": 0.9},
    "curve": [2.5, None],
    "dampings": [None, None],
    "seen": [{"squares": [[1, 2], [3]], "eigenvalues": {}}],
    "machine": {"date": "2026-01-01T00:00:00+00:00", "load": [1.0, 2.0], "cores": 2},
}
KFAC = {
    "kind": "trial",
    "step": 2,
    "loss": 0.1 + 0.2,
    "values": {"rate": 1e-300, "damping": 1.0},
    "curve": [],
    "dampings": [1, 1e-3],
    "seen": [{"squares": [], "eigenvalues": {"0 a": [-1e-9, 2.0]}}],
    "machine": {"date": "2026-01-02T00:00:00+00:00", "load": None, "cores": 2}
    | {"commit": "abc1234"},
}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "sgd.jsonl", SGD, SGD | {"curve": [1]})
    write(tmp_path / "fixed_1e-02.jsonl", KFAC)
    return tmp_path


def test_records_come_back_as_they_were_written(folder):
    rows = records.query(folder, "FROM runs")
    assert [row["cell"] for row in rows] == ["fixed_1e-02", "sgd", "sgd"]
    fixed, sgd, second = rows
    assert sgd["curve"] == [2.5, None] and second["curve"] == [1.0]
    assert sgd["dampings"] == [None, None] and sgd["loss"] is None
    assert fixed["loss"] == 0.1 + 0.2  # all digits
    assert fixed["values"] == {"rate": 1e-300, "momentum": None, "damping": 1.0}
    for row, written in ((fixed, KFAC), (sgd, SGD)):
        for name in ("values", "seen", "machine"):
            found = records.without_nulls(row[name])
            assert found == records.without_nulls(written[name]), name


def test_rare_keys_and_many_files(tmp_path):
    """Types come from all records of all files; no object becomes a map."""
    for i in range(40):
        one = {"kind": "trial", "step": 0, "values": {f"key {i}": i}}
        write(tmp_path / f"{i:02}.jsonl", one)
    late = {"kind": "trial", "step": 0, "values": {"key 3": 0.5, "new": "x"}}
    write(tmp_path / "99.jsonl", *[one] * 300, late)
    rows = records.query(tmp_path, "FROM runs")
    assert [records.without_nulls(row["values"]) for row in rows[:40]] == [
        {f"key {i}": i} for i in range(40)
    ]
    assert len(rows[0]["values"]) == 41
    assert records.without_nulls(rows[-1]["values"]) == {"key 3": 0.5, "new": "x"}


def test_parameters_and_aggregates(folder):
    sql = """
        SELECT cell, count(*) AS runs, max(coalesce(curve[-1], $worst)) AS last
        FROM runs WHERE "values".rate > $least GROUP BY cell
    """
    rows = records.query(folder, sql, worst=10, least=0.5)
    assert rows == [{"cell": "sgd", "runs": 2, "last": 10.0}]
    # What a file says about its cell is not replaced by its name.
    own = write(
        folder / "other.jsonl", {"kind": "cell", "step": 1, "cell": {"seed": 3}}
    )
    assert records.query(own, "SELECT cell.seed FROM runs") == [{"seed": 3}]


def test_text_is_not_taken_for_dates_or_numbers(tmp_path):
    texts = {"day": "2026-01-01", "at": "2026-01-01T10:00:00+02:00", "n": "012"}
    path = write(tmp_path / "a.jsonl", {"kind": "x", "step": 0, **texts})
    (row,) = records.query(path, "FROM runs")
    assert {name: row[name] for name in texts} == texts


def test_the_line_of_a_killed_run_is_left_out(folder):
    path = folder / "sgd.jsonl"
    path.write_text(path.read_text() + '{"kind": "trial", "st')
    rows = records.query([path], "FROM runs")
    assert len(rows) == 2 == len(metrics.read_records(path))
    assert {row["cell"] for row in rows} == {"sgd"}
    assert path.read_text().endswith('"st')  # the file stays


def test_names_with_wildcards(tmp_path):
    one = write(tmp_path / "a[1].jsonl", SGD)
    write(tmp_path / "a1.jsonl", KFAC)
    (row,) = records.query(one, "FROM runs")
    assert row["cell"] == "a[1]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"nothing.*holds no results"),
        ("", r"holds no results"),
        ('{"kind": "x", "step": 1}\n{"kind": x}\n', r"a\.jsonl cannot be read"),
        ('{"step": 1}\n', r"a\.jsonl: no record has a kind"),
    ],
    ids=["no folder", "empty", "no JSON", "no record"],
)
def test_what_is_no_result(content, message, tmp_path):
    source = tmp_path / "nothing"
    if content is not None:
        source = tmp_path
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(MetricsError, match=message):
        records.query(source, "FROM runs")


def test_parquet_has_the_flat_columns(folder):
    path = folder / "more" / "runs.parquet"
    records.save_parquet(folder, path)
    before = path.read_bytes()
    with duckdb.connect() as base:
        found = base.read_parquet(str(path))
        rows = [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
    fixed, sgd, second = rows
    assert fixed["cell"] == "fixed_1e-02" and fixed["loss"] == 0.1 + 0.2
    assert fixed["values.rate"] == 1e-300 and fixed["values.momentum"] is None
    assert sgd["values.rate"] == 1.0 and sgd["values.damping"] is None
    assert sgd["curve"] == [2.5, None] and fixed["dampings"] == [1.0, 1e-3]
    assert second["machine.load"] == [1.0, 2.0] and second["machine.cores"] == 2
    assert not any(name.startswith("seen") for name in fixed)
    records.save_parquet(folder, path)
    assert path.read_bytes() == before


def test_parquet_is_read_again(folder, tmp_path):
    """What another program has written, with nested columns."""
    path = tmp_path / "a[1].parquet"
    with records.connect(folder) as base:
        base.table("runs").write_parquet(str(path))
    for sql in (
        "FROM runs",
        "SELECT machine.cores, count(*) AS n FROM runs GROUP BY 1",
    ):
        assert records.query(path, sql) == records.query(folder, sql)
    assert records.machines(path) == records.machines(folder)
    assert records.commits(path) == records.commits(folder)
    path.write_bytes(b"no Parquet")
    with pytest.raises(MetricsError, match=r"a\[1\]\.parquet cannot be read as Parq"):
        records.query(path, "FROM runs")


def test_what_the_runs_were_made_with(folder):
    found = records.machines(folder)
    assert found["date"] == [x["machine"]["date"] for x in (SGD, KFAC)]
    assert found["cores"] == 2 and found["load"] == [[1.0, 2.0]]
    assert records.commits(folder) == ("abc1234", "not recorded")
    loads = [SGD | {"machine": {"load": [float(i), 0.0]}} for i in range(9, 13)]
    path = write(folder / "loads.jsonl", *loads)
    assert records.machines(path) == {"load": "from 9 to 12"}
    assert records.commits(path) == ("not recorded",)
