"""Plots of the loss against steps and against seconds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.errors import MetricsError
from experiments.reports.reading import RunRecords

# One colour per optimiser, the same in every plot; told apart by colour-blind readers.
COLOURS = {
    "kfac": "#d55e00",
    "sgd": "#009e73",
    "adam": "#0072b2",
    "adamw": "#cc79a7",
}
AXES = {"steps": ("step", "steps"), "seconds": ("seconds", "seconds of training")}


def save_plots(runs: Sequence[RunRecords], folder: Path) -> list[Path]:
    """Writes ``loss_vs_steps.png`` and ``loss_vs_seconds.png``."""
    paths = []
    for name, (field, label) in AXES.items():
        figure = draw(runs, field, label)
        path = folder / f"loss_vs_{name}.png"
        try:
            FigureCanvasAgg(figure).print_png(path)
        except OSError as error:
            raise MetricsError(f"{path} cannot be written: {error}.") from error
        paths.append(path)
    return paths


def draw(runs: Sequence[RunRecords], field: str, label: str) -> Figure:
    """Draws training and test loss side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    first = runs[0].config
    figure.suptitle(f"{first['data']['title']}, {first['config']['model']}")
    axes = figure.subplots(1, 2)
    for axis, split in zip(axes, ("train", "test"), strict=True):
        for run in runs:
            points = [
                (record[field], record[f"{split}_loss"])
                for record in run.evals
                if record[f"{split}_loss"] is not None
            ]
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=run.title,
                color=COLOURS.get(run.optimizer),
                marker=".",
            )
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(f"{'training' if split == 'train' else 'test'} loss")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    return figure
