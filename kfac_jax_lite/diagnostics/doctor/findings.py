"""What ``doctor`` says: a finding, and the text of several."""

from collections.abc import Sequence
from typing import Any, NamedTuple

ERROR, WARNING, NOTICE = "error", "warning", "notice"


class Finding(NamedTuple):
    """Something that looks wrong.

    Attributes:
        severity: ``"error"`` (the run is not what you want), ``"warning"`` (it is
            likely to suffer) or ``"notice"`` (worth a look).
        kind: A stable name of the complaint, for programs.
        layer: The layer's name, or None for the whole run.
        message: What is wrong, in plain words.
        advice: What to try.
        numbers: What this rests on.
    """

    severity: str
    kind: str
    layer: str | None
    message: str
    advice: str
    numbers: dict[str, Any]


class Findings(list[Finding]):
    """Findings, the gravest first; ``print`` them."""

    def __str__(self) -> str:
        """One paragraph per complaint, with the layers that share it."""
        if not self:
            return "No findings."
        groups: dict[str, list[Finding]] = {}
        for finding in self:
            groups.setdefault(finding.kind, []).append(finding)
        return "\n".join(paragraph(group) for group in groups.values())


def paragraph(group: Sequence[Finding]) -> str:
    """The text of a complaint: the first in full, the others by their layers."""
    first = group[0]
    where = "" if first.layer is None else f" layer {first.layer}:"
    lines = [f"[{first.severity}] {first.kind}:{where} {first.message}"]
    if len(group) > 1:
        others = ", ".join(str(finding.layer) for finding in group[1:])
        lines.append(f"  the same in: {others}")
    numbers = ", ".join(f"{k} {number(v)}" for k, v in first.numbers.items())
    return "\n".join([*lines, f"  try: {first.advice}", f"  from: {numbers}"])


def number(value: Any) -> str:
    """Three digits of a float."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
