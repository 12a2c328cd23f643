"""The table of layers that a user reads before training."""

from collections.abc import Sequence

from kfac_jax_lite.core.types import LayerTag, Shape


def table(layers: Sequence[LayerTag]) -> str:
    """Layer, kind, parameters, factor shapes, elements; coverage; what fell back."""
    head = ("layer", "kind", "parameters", "factor A", "factor G", "elements")
    rows: list[tuple[str, ...]] = [head]
    for layer in layers:
        rows.append(
            (
                layer.name,
                layer.kind,
                ", ".join(layer.params),
                shape_text(layer.a_shape),
                shape_text(layer.g_shape) if layer.g_shape else "-",
                f"{layer.elements:,}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [line(row, widths) for row in rows]
    lines.insert(1, "  ".join("─" * w for w in widths))
    total = sum(t.elements for t in layers)
    covered = sum(t.elements for t in layers if not t.fallback)
    lines.append(lines[1])
    elements = sum(t.factor_elements for t in layers)
    share = 100 * covered / total if total else 0.0
    lines.append(
        f"{total:,} parameters in {len(layers)} layers, {share:.2f} % under Kronecker, "
        f"embedding or unit-wise blocks; {elements:,} factor elements"
    )
    notes = [f"  {t.name} ({', '.join(t.params)}): {t.note}" for t in layers if t.note]
    if any(t.fallback for t in layers):
        lines.append("Diagonal layers fell back to the squared gradient.")
    if notes:
        lines += ["Notes:", *notes]
    return "\n".join(lines)


def fingerprint(layers: Sequence[LayerTag]) -> str:
    """One line per layer, the same on every machine and for every batch size."""
    lines = []
    for t in layers:
        shapes = shape_text(t.a_shape), shape_text(t.g_shape) if t.g_shape else "-"
        kind = f"{t.kind}, tied" if t.tied else t.kind
        lines.append(f"{kind}: {t.name} {' '.join(shapes)} {', '.join(t.params)}")
    return "\n".join(lines)


def line(row: tuple[str, ...], widths: list[int]) -> str:
    """One row, numbers to the right."""
    cells = [cell.ljust(w) for cell, w in zip(row[:-1], widths[:-1], strict=True)]
    return "  ".join([*cells, row[-1].rjust(widths[-1])]).rstrip()


def shape_text(shape: Shape) -> str:
    """``(785, 785)`` as ``785×785``."""
    return "×".join(map(str, shape)) or "1"
