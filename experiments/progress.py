"""What the user sees during a run."""

import os
import sys
import types
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

# What a shell reports of a program that SIGPIPE has ended.
BROKEN_PIPE = 128 + 13


def ended(main: Callable[[], Any]) -> Any:
    """Runs a program; a pipe that was closed ends it without a traceback."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, not when Python ends and nothing is caught
    except BrokenPipeError:
        # What is still buffered goes nowhere when Python closes its files.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


# Without a terminal the table would be cut at 80 columns.
WIDTH_OF_FILES = 110


def format_bytes(count: float) -> str:
    """Formats a number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class RunProgress:
    """A progress bar for one run; plain lines where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, start: int):
        self.console = console
        self.title = title
        self.total = total
        self.texts = {"loss": "", "score": "", "speed": "", "kfac": ""}
        self.progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            title, total=total, completed=start, text="compiling"
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float, steps_per_second: float) -> None:
        """Shows the batch loss and the speed."""
        self.texts["loss"] = f"loss {loss:.4g}"
        self.texts["speed"] = f"{steps_per_second:.3g} steps/s"
        self.draw(step)

    def evaluated(self, step: int, values: dict[str, Any]) -> None:
        """Shows an evaluation; without a terminal, prints it."""
        if values.get("test_accuracy") is not None:
            self.texts["score"] = f"test accuracy {values['test_accuracy']:.2%}"
        elif values.get("test_squared_error") is not None:
            self.texts["score"] = f"test error {values['test_squared_error']:.4g}"
        elif values.get("test_bits_per_character") is not None:
            bits = values["test_bits_per_character"]
            self.texts["score"] = f"test bits per character {bits:.4g}"
        if "mean_interval" in values:
            saved = values["bytes_if_every_step"] - values["bytes_reduced"]
            self.texts["kfac"] = (
                f"interval {values['mean_interval']:.3g}, "
                f"factor bytes saved {format_bytes(saved)}"
            )
        self.draw(step)
        if not self.console.is_terminal:
            train_loss, test_loss = values["train_loss"], values["test_loss"]
            self.console.print(
                f"{self.title}: step {step}/{self.total}, "
                f"{values['seconds']:.1f} s, train loss {train_loss:.4g}, "
                f"test loss {test_loss:.4g}, {self.text('score', 'speed', 'kfac')}",
                soft_wrap=True,
                highlight=False,
            )

    def text(self, *names: str) -> str:
        """Joins the texts that are there."""
        return ", ".join(self.texts[name] for name in names if self.texts[name])

    def draw(self, step: int) -> None:
        text = self.text("loss", "score", "speed", "kfac")
        self.progress.update(self.task, completed=step, text=text)


def open_console() -> Console:
    """The terminal, or a file wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_FILES)
