"""What a tagged loss covers, as JSON values: counted in parameters, not in layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.common import write_json
from kfac_jax_lite.core.types import LayerTag

FALLBACK = "diagonal"


def coverage(layers: Sequence[LayerTag]) -> dict[str, Any]:
    """Counts the parameters under Kronecker, embedding and unit-wise blocks.

    Returns:
        JSON values: ``share`` is the part of the parameters in blocks, ``kinds`` the
        layers and parameters of each kind, ``fallback`` the parameters in no block and
        why, ``notes`` what else the table says of a layer in a block.
    """
    kinds: dict[str, dict[str, int]] = {}
    for layer in layers:
        kind = kinds.setdefault(layer.kind, {"layers": 0, "parameters": 0})
        kind["layers"] += 1
        kind["parameters"] += layer.elements
    total = sum(layer.elements for layer in layers)
    lost = [layer for layer in layers if layer.kind == FALLBACK]
    noted = [layer for layer in layers if layer.kind != FALLBACK and layer.note]
    return {
        "layers": len(layers),
        "parameters": total,
        "share": 1 - sum(layer.elements for layer in lost) / total,
        "kinds": kinds,
        "fallback": [record(layer) for layer in lost],
        "notes": [record(layer) for layer in noted],
    }


def save(path: Path, result: dict[str, Any], console: Console) -> None:
    """Writes a result and says where it is."""
    write_json(path, result)
    console.print(f"Result: {path}", soft_wrap=True, highlight=False)


def record(layer: LayerTag) -> dict[str, Any]:
    """A layer's parameters, their number and its note."""
    return {
        "params": list(layer.params),
        "parameters": layer.elements,
        "note": layer.note,
    }


def reasons(records: Sequence[dict[str, Any]]) -> list[str]:
    """Sums up fallbacks by their reason, the greatest first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in records:
        groups.setdefault(item["note"], []).append(item)
    sizes = {
        note: sum(i["parameters"] for i in items) for note, items in groups.items()
    }
    lines = []
    for note in sorted(groups, key=lambda note: -sizes[note]):
        items = groups[note]
        names = [", ".join(item["params"]) for item in items[:2]]
        more = ["…"] if len(items) > 2 else []
        shown = ", ".join(names + more)
        lines.append(f"{note}: {sizes[note]:,} in {len(items)} ({shown})")
    return lines


def percent(share: float) -> str:
    """A share with two decimals, never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def show_fallbacks(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints which parameters are in no block, and why."""
    for row in rows.values():
        for line in reasons(row["fallback"]):
            text = f"{row['title']}: {line}"
            console.print(text, soft_wrap=True, highlight=False, markup=False)
