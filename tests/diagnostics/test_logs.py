"""Logs: what arrives in the file, at the writer, on the screen."""

import csv
import importlib.util
import io
import sys
import types

import pytest

from kfac_jax_lite.diagnostics import logs
from kfac_jax_lite.diagnostics.report import report
from tests.diagnostics.test_report import trained


def cells(record):
    """A record as CSV holds it."""
    return {k: "" if v is None else str(v) for k, v in record.items()}


def test_csv(tmp_path):
    layers, state = trained()
    path = tmp_path / "run.csv"
    with logs.CSV(path, layers) as log:
        log.write(1, state)
        assert len(path.read_text().splitlines()) == 3  # at once, not at the end
    with logs.CSV(path, layers) as log:  # a run that goes on
        log.write(2, state)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("step") for row in rows] == ["1", "1", "2", "2"]
    wanted = [cells(record) for record in report(state, layers)]
    assert rows == wanted + wanted
    assert {row["retreats"] for row in rows} == {""}
    with logs.CSV(path) as log, pytest.raises(ValueError, match="effective_rank_a"):
        log.write(3, state)


class Writer:
    """Stands in for a ``SummaryWriter``."""

    def __init__(self, folder=None):
        self.folder, self.scalars, self.closed = folder, {}, False

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def close(self):
        self.closed = True


def test_tensorboard():
    _, state = trained()
    writer = Writer()
    with logs.TensorBoard(writer) as log:
        log.write(7, state)
    assert not writer.closed  # it is the caller's
    for record in report(state):
        numbers = {k for k, v in record.items() if v is not None and k != "name"}
        for key in numbers:
            assert writer.scalars.pop((f"{record['name']}/{key}", 7)) == record[key]
    assert not writer.scalars


def test_tensorboard_makes_a_writer_for_a_folder(tmp_path, monkeypatch):
    made = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", made)
    with logs.TensorBoard(tmp_path) as log:
        log.write(0, trained()[1])
    assert log.writer.folder == str(tmp_path)
    assert log.writer.scalars
    assert log.writer.closed


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None, reason="needs tensorboardX"
)
def test_tensorboardx_itself(tmp_path):
    with logs.TensorBoard(tmp_path) as log:
        log.write(3, trained()[1])
    (events,) = tmp_path.iterdir()
    assert b"layer0/since_refresh" in events.read_bytes()


def test_table():
    console = pytest.importorskip("rich.console")
    layers, state = trained()
    screen = io.StringIO()
    terminal = console.Console(file=screen, width=140)
    with logs.Table(layers, spectra=True, console=terminal) as log:
        log.write(12, state)
    shown = screen.getvalue()
    first = report(state, layers, spectra=True)[0]
    for wanted in ("step 12", "damping 0.03", "layer0", "layer1", "rank of A"):
        assert wanted in shown
    assert f"{first['condition']:.3g}" in shown


@pytest.mark.parametrize("name", ["rich.live", "tensorboardX"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    package = name.split(".")[0]
    with pytest.raises(ImportError, match=f"pip install {package}"):
        logs.Table() if package == "rich" else logs.TensorBoard("folder")


def test_spectra_want_layers(tmp_path):
    with pytest.raises(ValueError, match="tagged.layers"):
        logs.CSV(tmp_path / "x.csv", spectra=True)
