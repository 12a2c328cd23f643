"""Records of a survey that nobody ran, with a structure that is known.

Inside a cell the trace of every full matrix orders the runs as the gap does, although
it falls where the gap rises from cell to cell. The Frobenius norm orders them the other
way round, the stable rank in one half of the cells one way and in the other the other.
Cosines are those of `COSINES`.
"""

import json

import numpy as np

from experiments.survey.config import APPROXIMATIONS, MATRICES

COSINES = np.array(
    [
        [1.0, 0.9, 0.8, 0.3],
        [0.9, 1.0, 0.95, 0.4],
        [0.8, 0.95, 1.0, 0.5],
        [0.3, 0.4, 0.5, 1.0],
    ]
)
# Relative errors of the approximations at the last checkpoint; half of it at the first.
ERRORS = {"full": 0.0, "block_diagonal": 0.2, "kronecker": 0.4, "diagonal": 0.8}
MACHINE = {"commit": "abc1234", "date": "2026-01-01T00:00:00+00:00", "cores": 2}
DATASETS = ("digits", "wine", "mnist")
MODELS = ("linear", "mlp")
SETTINGS = tuple(
    {"learning_rate": rate, "batch_size": size, "weight_decay": decay}
    for rate in (0.03, 0.1)
    for size in (16, 64)
    for decay in (0.0, 1e-3)
)
STEPS = (0, 15, 90, 300)


def rounded(value):
    """Four significant digits, in nested lists."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}")


def matrix_row(matrix, approximation, gap, level, share, rng):
    """The part of a row that is about a matrix; `share` is that of the steps taken."""
    i = MATRICES.index(matrix)
    error = ERRORS[approximation] * (0.5 + 0.5 * share)
    eigenvalues = (1 + i + share) * np.exp(-np.arange(10) / 3) * rng.uniform(0.9, 1)
    return {
        "matrix": matrix,
        "approximation": approximation,
        "eigenvalues": rounded(np.sort(eigenvalues)[::-1]),
        "trace": rounded((1 + i) * np.exp(gap - 3 * level) * (1 - 0.5 * error)),
        "frobenius": rounded(1 / (1 + gap)),
        "stable_rank": rounded(5 + (gap - level) * (-1) ** level),
        "effective_dimension": rounded(rng.uniform(10, 50)),
        "condition_number": rounded(rng.lognormal(8, 2)),
        "log_det": rounded(rng.normal(-300, 50)),
        "tic": rounded(rng.lognormal(-2, 1)),
        "error": rounded(error),
        "spectral_error": rounded(0.5 * error),
        "cosine": rounded(1 - 0.5 * error),
        "overlap": rounded(1 - error),
        "cosines": rounded(COSINES[i]),
        "overlaps": rounded(COSINES[i] ** 2),
    }


def make_run(dataset, model, number, setting, steps=STEPS, level=0.0):
    """A record; `number` orders the gaps of a cell from 0, `level` those of cells."""
    name = f"{dataset}-{model}-{number}"
    rng = np.random.default_rng([*name.encode()])
    gap = 0.1 + 0.05 * number + level
    rows = []
    for step in steps:
        share = step / max(steps[-1], 1)
        checkpoint = {
            "step": step,
            "epoch": step / 10,
            "train_loss": rounded(2.3 - 2 * share * rng.uniform(0.5, 1)),
            "train_accuracy": rounded(0.1 + 0.8 * share),
            "test_accuracy": rounded(0.1 + 0.7 * share),
            "gradient_norm": rounded(rng.lognormal()),
            "sharpness": rounded(rng.lognormal()),
        }
        # On the way the gap is another, and larger.
        between = 0.0 if share in (0, 1) else rng.uniform(10, 20)
        found = checkpoint["train_loss"] + gap * share + between
        checkpoint["test_loss"] = rounded(found)
        rows += [
            checkpoint | matrix_row(matrix, approximation, gap, level, share, rng)
            for matrix in MATRICES
            for approximation in APPROXIMATIONS
        ]
    run = {"kind": "run", "step": steps[-1], "run": name}
    run |= {
        "data": dataset.title(),
        "dataset": dataset,
        "model": model,
        "optimizer": "sgd",
        "seed": 0,
    }
    run |= {"num_params": 500, "num_train": 512, "num_test": 1000, "damping": 1e-3}
    shared = {"config": {"steps": steps[-1], "width": 6}, "machine": MACHINE}
    return run | setting | {"seconds": 1.5, "rows": rows, "fingerprint": "f0"} | shared


def make_runs(datasets=DATASETS, models=MODELS, settings=SETTINGS, steps=STEPS):
    """A run for every cell and setting; each cell has an order of the gaps its own."""
    runs = []
    for cell, (dataset, model) in enumerate((d, m) for d in datasets for m in models):
        order = np.random.default_rng(cell).permutation(len(settings))
        for number, setting in zip(order.tolist(), settings, strict=True):
            runs.append(make_run(dataset, model, number, setting, steps, float(cell)))
    return runs


def write_runs(folder, runs):
    """The files of the cells, as the survey writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        with (folder / f"{run['dataset']}-{run['model']}.jsonl").open("a") as file:
            file.write(json.dumps(run) + "\n")
    return folder
