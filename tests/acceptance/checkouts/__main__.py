"""How much of public examples gets a block, their own losses unmodified.

    python -m tests.acceptance.checkouts --checkouts <folder>

The folder holds the checkouts under their repositories' names. An example's modules are
imported from there as they are; packages for data and logging are replaced by stubs.
Parameters and batches are shapes. Terms of the mean loss are always given, because the
losses mark no output; what else had to be adapted is in the result.
"""

import contextlib
import dataclasses
import io
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kfac_jax_lite as kfac
from experiments.benchmarks.common import OUT, machine, without_paths
from experiments.progress import ended, open_console
from tests.acceptance.checkouts import (
    equinox_examples,
    flax_examples,
    haiku_examples,
    transformers,
)
from tests.acceptance.checkouts.checkout import Client, commit_of, importing
from tests.acceptance.coverage.counts import coverage, percent, save, show_fallbacks

PROGRAM = "python -m tests.acceptance.checkouts"
CLIENTS: dict[str, Client] = {
    **flax_examples.CLIENTS,
    **haiku_examples.CLIENTS,
    **equinox_examples.CLIENTS,
    **transformers.CLIENTS,
}
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(CLIENTS)]


@dataclasses.dataclass(frozen=True)
class Config:
    """Tags the losses of public examples, unmodified."""

    checkouts: Path
    """Folder of the checkouts, each under its repository's name."""
    only: tuple[Name, ...] = tuple(CLIENTS)
    """The examples."""
    out: Path = OUT
    """Folder of the result."""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps what examples print and warn of to themselves."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def measure(client: Client, folder: Path) -> dict[str, Any]:
    """Tags an example's loss and traces the tagged gradient."""
    with importing(folder) as stubbed, silence():
        case = client.make(folder)
        start = time.perf_counter()
        tagged = kfac.tag(
            case.loss,
            case.params,
            *case.args,
            has_aux=case.has_aux,
            num_examples=case.num_examples,
        )
        seconds = time.perf_counter() - start
        jax.eval_shape(tagged.value_and_grad, case.params, *case.args)
    return {
        "num_examples": case.num_examples,
        "stubbed": sorted(stubbed),
        "trace_and_tag_seconds": seconds,
        **coverage(tagged.layers),
    }


def examine(client: Client, checkouts: Path) -> dict[str, Any]:
    """Measures an example if its checkout is there."""
    facts = {"title": client.title, "repository": client.repository}
    folder = client.checkout(checkouts) / client.folder
    if not folder.is_dir():
        return facts | {"skipped": client.clone}
    facts |= {"commit": commit_of(folder), "adapted": client.adapted}
    try:
        return facts | measure(client, folder.resolve())
    except Exception as error:  # noqa: BLE001 - an example may fail in any way
        return facts | {"failed": without_paths(f"{type(error).__name__}: {error}")}


def show(rows: dict[str, dict[str, Any]]) -> Table:
    """The table of all examples."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("example", no_wrap=True)
    for title in ("parameters", "layers", "in blocks", "trace + tag s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows.values():
        if "share" not in row:
            status = "skipped" if "skipped" in row else "failed"
            table.add_row(row["title"], "-", "-", status, "-")
            continue
        table.add_row(
            row["title"],
            f"{row['parameters']:,}",
            str(row["layers"]),
            percent(row["share"]),
            f"{row['trace_and_tag_seconds']:.2f}",
        )
    return table


def show_troubles(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints how to make the missing checkouts, and what failed."""
    for command in sorted({r["skipped"] for r in rows.values() if "skipped" in r}):
        console.print(f"Missing: {command}", soft_wrap=True, highlight=False)
    for row in rows.values():
        if "failed" in row:
            text = f"{row['title']} failed: {row['failed']}"
            console.print(text, soft_wrap=True, markup=False, style="red")


def benchmark(config: Config, console: Console) -> dict[str, Any]:
    """Measures the examples in turn and writes the result."""
    rows = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(config.only))
        for name in config.only:
            progress.update(task, description=CLIENTS[name].title)
            rows[name] = examine(CLIENTS[name], config.checkouts)
            progress.advance(task)
    console.print(show(rows))
    show_fallbacks({n: r for n, r in rows.items() if "share" in r}, console)
    show_troubles(rows, console)
    result = {"machine": machine(), "clients": rows}
    path = config.out / "clients.json"
    save(path, result, console)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    console = open_console()
    doc = (__doc__ or "").split("\n")[0]
    config = tyro.cli(Config, prog=PROGRAM, description=doc, args=arguments)
    result = benchmark(config, console)
    return int(any("failed" in row for row in result["clients"].values()))


if __name__ == "__main__":
    sys.exit(ended(main))
