"""What a run has recorded, compared between runs."""

import numpy as np
import pytest

from experiments import metrics
from experiments.train import train

# Sums over the batch are taken in another order: float32 rounding, grown over the run.
TOLERANCE = 2e-4
EXACT = ("kind", "step", "epoch", "mean_interval", "bytes_reduced")


def records_of(config, optimizer, kind):
    """The records of a kind."""
    path = config.folder() / optimizer / metrics.FILE_NAME
    return [r for r in metrics.read_records(path) if r["kind"] == kind]


def curve(config, optimizer):
    """Everything recorded of the losses, without the times."""
    return [
        {name: value for name, value in record.items() if name != "seconds"}
        for kind in ("train", "eval")
        for record in records_of(config, optimizer, kind)
    ]


def close_curves(actual, expected):
    """Assert the same records, intervals and refreshes, and losses to rounding."""
    assert [r.keys() for r in actual] == [r.keys() for r in expected]
    for one, other in zip(actual, expected, strict=True):
        for name, value in one.items():
            if name in EXACT:
                assert value == other[name], (name, one, other)
            else:
                np.testing.assert_allclose(
                    value, other[name], rtol=TOLERANCE, err_msg=f"{name} in {one}"
                )


def interrupted(config, console, monkeypatch, after):
    """Train until the first record of a step that is not before `after`."""
    append = metrics.MetricsFile.append

    def kill(self, kind, step, **values):
        append(self, kind, step, **values)
        if kind in ("train", "eval") and step >= after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsFile, "append", kill)
        with pytest.raises(KeyboardInterrupt):
            train(config, console)
