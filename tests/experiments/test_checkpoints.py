"""Checkpoints: the same bits back, and nothing lost when one cannot be written."""

import errno
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints, metrics
from experiments.configs import TrainConfig
from experiments.errors import CheckpointError, MetricsError
from experiments.main import continuation, main
from experiments.train import train


class Inner(NamedTuple):
    a: jax.Array
    none: None
    empty: jax.Array


def make_state(scale=1.0):
    values = jax.random.normal(jax.random.key(0), (3, 2)) * scale
    return {
        "x/y": Inner(values, None, jnp.zeros((0, 4))),
        "half": values.astype(jnp.bfloat16),
        "flag": jnp.array([True, False]),
        "count": jnp.int32(7 * scale),
        "seconds": np.float64(0.1 * scale),
    }


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_same_bits(tmp_path):
    state = make_state()
    checkpoints.save(tmp_path, 3, state)
    restored = checkpoints.restore(tmp_path, 3, make_state(0.0))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert np.asarray(old).dtype == np.asarray(new).dtype
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoints.save(tmp_path, step, make_state())
    assert checkpoints.complete(tmp_path) == [3, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": jnp.zeros(2)}, r"\['more'\] is missing in the checkpoint"),
        ({"flag": jnp.zeros(3, bool)}, r"\['flag'\] is \(\(2,\), 'bool'\)"),
        (
            {"half": jnp.zeros((3, 2), jnp.float32)},
            r"\['half'\] is .*bfloat16.*wanted .*float32",
        ),
    ],
    ids=["more", "shape", "dtype"],
)
def test_other_state_is_refused(tmp_path, change, message):
    checkpoints.save(tmp_path, 1, make_state())
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(tmp_path, 1, make_state() | change)


def test_damaged_checkpoint(tmp_path):
    checkpoints.save(tmp_path, 1, make_state())
    for path in checkpoints.path_of(tmp_path, 1).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="begin anew; there is no earlier one"):
        checkpoints.restore(tmp_path, 1, make_state())
    for path in (tmp_path / "step_00000001").rglob("*"):
        if path.is_file():
            path.write_bytes(b"nonsense")
    (tmp_path / "step_00000000").mkdir()
    with pytest.raises(CheckpointError, match="continue from step 0") as error:
        checkpoints.restore(tmp_path, 1, make_state())
    text = str(error.value)
    assert "NoneType" not in text and "\n" not in text and len(text) < 400


def test_a_damaged_checkpoint_is_told_in_one_sentence(tmp_path, capsys):
    """By the command that was to continue from it."""
    arguments = ["train", "--dataset", "digits", "--optimizers", "sgd"]
    arguments += ["--train-examples", "100", "--epochs", "1", "--net.hidden", "4"]
    arguments += ["--batch-size", "50", "--workdir", str(tmp_path)]
    assert main(arguments) == 0
    folder = tmp_path / "sgd"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    capsys.readouterr()
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: The checkpoint ") and told.count("\n") == 1


def test_interruption_before_the_first_checkpoint(tmp_path):
    """Nothing is promised that is not there."""
    config = TrainConfig(workdir=str(tmp_path), checkpoint_every=7, log_every=7)
    assert "begins anew" in continuation(config)
    assert "after 7 steps" in continuation(config)
    (tmp_path / "sgd" / "checkpoints" / "step_3.orbax-checkpoint-tmp-1").mkdir(
        parents=True
    )
    assert "begins anew" in continuation(config)
    checkpoints.save(tmp_path / "sgd" / "checkpoints", 7, make_state())
    assert "continues from the last checkpoint" in continuation(config)
    assert continuation(None) == ""


def test_unfinished_checkpoint_is_not_seen(tmp_path):
    checkpoints.save(tmp_path, 1, make_state())
    source = checkpoints.path_of(tmp_path, 1)
    shutil.copytree(source, tmp_path / "step_00000002.orbax-checkpoint-tmp")
    assert checkpoints.complete(tmp_path) == [1]


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    state = make_state()
    checkpoints.save(tmp_path, 1, state)
    monkeypatch.setattr(checkpoints, "write", full_disk)
    with pytest.raises(CheckpointError, match="step 2 .*no space left.*that of step 1"):
        checkpoints.save(tmp_path, 2, make_state(2.0))
    restored = checkpoints.restore(tmp_path, 1, make_state(0.0))
    np.testing.assert_array_equal(restored["x/y"].a, state["x/y"].a)


def test_full_disk_does_not_stop_training(tiny, console, monkeypatch):
    monkeypatch.setattr(checkpoints, "write", full_disk)
    config = tiny(optimizers=("adam",))
    folder, problems = train(config, console)
    assert len(problems) == 2
    assert "no space left" in problems[0] and "no earlier" in problems[0]
    kinds = [r["kind"] for r in metrics.read_records(folder / "adam" / "metrics.jsonl")]
    assert kinds.count("train") == 4 and kinds.count("note") == 2
    assert kinds[-1] == "end"


def test_full_disk_is_told_at_the_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkpoints, "write", full_disk)
    arguments = ["train", "--dataset", "digits", "--optimizers", "sgd"]
    arguments += ["--train-examples", "100", "--epochs", "1", "--net.hidden", "4"]
    assert main([*arguments, "--workdir", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "SGD + momentum" in printed.out and "loss_vs_steps.png" in printed.out
    assert "no space left on the device" in printed.err


class Disk:
    """A file on a disk that is full while `full` is set."""

    full = False

    def __init__(self, file):
        self.file = file

    def write(self, content):
        if Disk.full:
            self.file.write(content[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_metrics_survive_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(Disk, "full", False)
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    file.file = Disk(file.file)  # pyright: ignore[reportAttributeAccessIssue]
    file.append("train", 1, loss=1.0)
    monkeypatch.setattr(Disk, "full", True)
    file.append("train", 2, loss=float("nan"))
    assert [r["step"] for r in metrics.read_records(file.path)] == [1]
    monkeypatch.setattr(Disk, "full", False)
    file.append("train", 3, loss=np.float32(0.5))
    assert [r["step"] for r in metrics.read_records(file.path)] == [1, 2, 3]
    assert [r["loss"] for r in metrics.read_records(file.path)] == [1.0, None, 0.5]
    monkeypatch.setattr(Disk, "full", True)
    file.append("end", 4, status="finished")
    with pytest.raises(MetricsError, match='cannot be written.*\n.*"end"'):
        file.close()


def test_damaged_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "config", "step": 0}\nnonsense\n')
    with pytest.raises(MetricsError, match="line 2 is not a metrics record"):
        metrics.read_records(path)
