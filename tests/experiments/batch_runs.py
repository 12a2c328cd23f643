"""Records as of runs of the batch-size study."""

import json

from experiments.studies.batch_size.config import TINY


def lines(path):
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_record(kind, number, accuracy, seed=0, **values):
    """A record as of a run of two epochs."""
    common = {
        "step": 4, "optimizer": "sgd", "batch_size": 64, "seed": seed,
        "values": {"learning_rate": 0.1}, "diverged": False, "pruned": False,
        "wall": [0.5, 0.5], "processor": [0.5, 0.5], "loss": [1.0, 1.0],
        "train_accuracy": [0.2, 0.9], "train_loss": [1.0, 0.5], "fingerprint": "x",
        "config": TINY.shared(), "machine": {"date": "2000-01-01", "jax": "0"},
    }  # fmt: skip
    own = {"kind": kind, "number": number, "accuracy": [0.1, accuracy]}
    return common | own | values


def write(folder, name, records):
    """Writes the file of a cell."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(text)


def write_two_cells(folder, ours, theirs, batch_size=64):
    """K-FAC and SGD with the given test accuracies by seed."""
    for optimizer, accuracies in (("kfac", ours), ("sgd", theirs)):
        cell = {"optimizer": optimizer, "batch_size": batch_size}
        seeds = [make_record("seed", 0, a, s, **cell) for s, a in accuracies.items()]
        trial = make_record("trial", 0, 0.5, **cell)
        write(folder, f"{optimizer}_{batch_size}", [trial, *seeds])
