"""Writes docs/coverage.md from the results of `coverage` and `clients`.

python -m tests.acceptance.coverage.page
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.progress import ended
from tests.acceptance.coverage.counts import percent, reasons

RESULTS = Path("experiments/benchmarks/results")
PAGE = Path("docs/coverage.md")
INTRODUCTION = """\
# Coverage

Share of the parameters that are under a Kronecker, embedding or unit-wise block. The
others are preconditioned by their squared gradients, and `print(tagged)` says why.
Everything on this page is traced with `jax.ShapeDtypeStruct`: no weight is made.

Made from `coverage.json` and `clients.json` in `experiments/benchmarks/results` by

```sh
python -m tests.acceptance.coverage.page
```
"""
ARCHITECTURES = """\
## Architectures

Full size, definitions in `experiments/models/architectures.py`. "Trace" is
`jax.make_jaxpr` of the loss from empty caches, "tag" what `kfac.tag` takes beyond it;
medians of {runs} runs. "Compile" is lowering and compiling
`tagged.value_and_grad` with all layers due, as a ratio to `jax.value_and_grad`, with
the seconds of both (medians of {compile_runs} runs in turn) and the ratio of processor
time. Measured on {machine}.

```sh
python -m tests.acceptance.coverage --out experiments/benchmarks/results \\
    --compile {compile}
```
"""
CLIENTS = """\
## Public examples

Models and losses imported from the repositories at the given commits, unmodified except
for what the table says; packages for data and logging are replaced by stubs. These
losses mark no output: `num_examples` is given. "Local loss caught" means that the loss
is local to the training step, which runs until it hands it to `jax.value_and_grad`.

```sh
python -m tests.acceptance.checkouts --checkouts <folder> \\
    --out experiments/benchmarks/results
```
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the page on coverage."""

    results: Path = RESULTS
    """Folder of the results."""
    page: Path = PAGE
    """The file to write."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escaped(text: str) -> str:
    """Text as a table's cell takes it."""
    return text.replace("|", "\\|").replace("*", "\\*")


def listed(rows: Iterable[dict[str, Any]], field: str) -> list[str]:
    """Lines on a field of each network's coverage."""
    return [
        f"- {row['title']}: {escaped(line)}"
        for row in rows
        for line in reasons(row.get(field, []))
    ]


def remarks(rows: Iterable[dict[str, Any]]) -> str:
    """What has no block, and why; what is noted of those that have one."""
    rows = list(rows)
    lost, partly = listed(rows, "fallback"), listed(rows, "notes")
    parts = ["In no block:", "\n".join(lost)] if lost else []
    if partly:
        parts += [
            "What the table notes of parameters in a block:",
            "\n".join(partly),
        ]
    return "\n\n".join(parts or ["Every parameter is in a block."]) + "\n"


def machine_of(facts: dict[str, Any]) -> str:
    """The machine, and how busy it was."""
    load = f", load average {facts['load'][0]:.0f}" if facts["load"] else ""
    text = f"{facts['cores']} cores of {facts['processor']}, jax {facts['jax']}"
    return text + load


def kinds(row: dict[str, Any]) -> str:
    """Layers by kind."""
    counts = {kind: value["layers"] for kind, value in row["kinds"].items()}
    return ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))


def architectures(result: dict[str, Any]) -> str:
    """The section on architectures."""
    rows, settings = result["models"], result["settings"]
    facts = result["machine"]
    head = ARCHITECTURES.format(
        runs=settings["runs"],
        compile_runs=settings["compile_runs"],
        compile=" ".join(settings["compile"]),
        machine=machine_of(facts),
    )
    header = ["network", "parameters", "in blocks", "layers", "trace s", "tag s"]
    cells = []
    for row in rows.values():
        compiled = row.get("compile")
        ratio = "–"
        if compiled:
            both = f"{compiled['tagged_seconds']:.1f} / {compiled['plain_seconds']:.1f}"
            ratio = f"{compiled['ratio']:.2f} ({both})"
            ratio += f", {compiled['processor_ratio']:.2f}"
        cells.append(
            [
                row["title"],
                f"{row['parameters']:,}",
                percent(row["share"]),
                kinds(row),
                f"{row['jaxpr_seconds']:.2f}",
                f"{row['tag_seconds']:.3f}",
                ratio,
            ]
        )
    body = table([*header, "compile"], cells)
    return "\n".join([head, body, remarks(rows.values())])


def client_row(row: dict[str, Any]) -> list[str]:
    """One example's cells."""
    link = f"https://github.com/{row['repository']}"
    if "skipped" in row:
        return [row["title"], "–", "–", "no checkout", "–", f"`{row['skipped']}`"]
    commit = row["commit"] or ""
    source = f"[{commit[:7]}]({link}/tree/{commit})" if commit else f"[?]({link})"
    adapted = escaped(row["adapted"]) or "nothing"
    if "failed" in row:
        return [row["title"], source, "–", "failed", "–", escaped(row["failed"])]
    share, count = percent(row["share"]), f"{row['parameters']:,}"
    return [row["title"], source, count, share, str(row["layers"]), adapted]


def clients(result: dict[str, Any]) -> str:
    """The section on public examples."""
    rows = result["clients"].values()
    header = ["example", "commit", "parameters", "in blocks", "layers", "adapted"]
    body = table(header, [client_row(row) for row in rows])
    return "\n".join([CLIENTS, body, remarks(rows)])


def page(results: Path) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    sections = {"coverage.json": architectures, "clients.json": clients}
    for name, section in sections.items():
        if (results / name).is_file():
            parts.append(section(json.loads((results / name).read_text())))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    doc = (__doc__ or "").split("\n")[0]
    program = "python -m tests.acceptance.coverage.page"
    config = tyro.cli(Config, prog=program, description=doc, args=arguments)
    config.page.parent.mkdir(parents=True, exist_ok=True)
    config.page.write_text(page(config.results), encoding="utf-8")
    print(f"Page: {config.page}")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
