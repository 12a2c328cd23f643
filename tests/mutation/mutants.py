"""Mutants: drawn by cosmic-ray's operators, and the formulas' written by hand."""

import ast
import dataclasses
import hashlib
import itertools
import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "kfac_jax_lite"
FORMULAS = HERE / "formulas.toml"
# Everything a K-FAC step runs through, and what is said about it; the laboratory
# (curvature, ntk), the posteriors (bayes) and the prose (doctor, logs) are left out.
OUTSIDE = ("bayes", "curvature", "ntk", "diagnostics")
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Pow", "Mod"}
BITS = {"BitOr", "BitAnd", "BitXor"}
KINDS = (
    "ReplaceBinaryOperator_",
    "ReplaceComparisonOperator_",
    "ReplaceUnaryOperator_",
    "NumberReplacer",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "AddNot",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ZeroIterationForLoop",
)


@dataclass(frozen=True)
class Mutant:
    """One wrong change of one module.

    Attributes:
        module: Its path below the repository.
        line: The first line that differs, from 1.
        name: cosmic-ray's operator, or what the hand says is wrong.
        kind: ``drawn``, ``formula`` or ``control`` (nothing is changed).
        source: The whole module, changed.
        original: The module as it is.
    """

    module: str
    line: int
    name: str
    kind: str
    source: str
    original: str

    @property
    def identity(self) -> str:
        """Twelve characters that tell it from every other one."""
        where = definition_at(self.original, self.line)
        text = "\0".join((where, self.name, *self.change))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def differing(self) -> list[tuple[int, str, str]]:
        """The lines that differ: number, as they are, as they would be."""
        texts = self.original.splitlines(), self.source.splitlines()
        pairs = itertools.zip_longest(*texts, fillvalue="")
        numbered = [(number, *pair) for number, pair in enumerate(pairs, 1)]
        return [line for line in numbered if line[1] != line[2]]

    @property
    def change(self) -> list[str]:
        """Pairs of the lines that differ, one after the other."""
        return [text.strip() for _, *pair in self.differing for text in pair]


def definitions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of functions and classes, outer ones first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno, node.end_lineno or node.lineno


def definition_at(source: str, line: int) -> str:
    """The innermost definition around a line."""
    around = [n for n, first, last in definitions(source) if first <= line <= last]
    return around[-1] if around else ""


def places(text: str, definition: str = "") -> list[tuple[Path, int]]:
    """Where a text stands in the package: file and character.

    Args:
        text: What to look for.
        definition: The function or class around it, where one place is not enough.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source, start = path.read_text(), -1
        while (start := source.find(text, start + 1)) >= 0:
            line = source.count("\n", 0, start) + 1
            if definition in ("", definition_at(source, line)):
                found.append((path, start))
    return found


def core() -> list[Path]:
    """The core modules."""
    found = sorted(PACKAGE.rglob("*.py"))
    names = [path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in found]
    return [
        path for path, name in zip(found, names, strict=True) if name not in OUTSIDE
    ]


def plausible(operator: str) -> bool:
    """Whether a person could have written the change: arithmetic stays arithmetic."""
    name = operator.removeprefix("core/")
    if not name.startswith("ReplaceBinaryOperator_"):
        return name.startswith(KINDS)
    pair = set(name.removeprefix("ReplaceBinaryOperator_").split("_"))
    return pair <= ARITHMETIC or pair <= BITS


def silent(source: str) -> set[int]:
    """Lines without a meaning at run time: annotations, decorators, raised texts."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts += node.decorator_list
        if isinstance(node, ast.AnnAssign | ast.arg):
            parts.append(node.annotation)
        if isinstance(node, ast.FunctionDef):
            parts.append(node.returns)
        if isinstance(node, ast.Raise):
            parts.append(node)
        for part in parts:
            if part is not None:
                lines.update(range(part.lineno, part.end_lineno + 1))
    return lines


def sites(path: Path) -> Iterator[tuple[tuple[int, int], str, int]]:
    """Every (position, operator, occurrence) at which a module can be changed."""
    source = path.read_text()
    skipped, tree = silent(source), get_ast(source)
    for operator in filter(plausible, plugins.operator_names()):
        acts = plugins.get_operator(operator)
        if acts.arguments():
            continue
        places = (
            (node, start)
            for node in ast_nodes(tree)
            for start, _ in acts().mutation_positions(node)
        )
        for occurrence, (node, start) in enumerate(places):
            if start[0] not in skipped and ASTQuery(node).get_definition_name():
                yield start, operator, occurrence


def drawn(count: int, seed: int) -> Iterator[Mutant]:
    """Mutants at positions drawn from all core modules, one at each.

    Args:
        count: How many.
        seed: Of the draw.

    Yields:
        Mutants whose module still compiles.
    """
    if not count:
        return
    places: dict[tuple[Path, tuple[int, int]], list[tuple[str, int]]] = {}
    for path in core():
        for position, operator, occurrence in sites(path):
            places.setdefault((path, position), []).append((operator, occurrence))
    chance = random.Random(seed)
    order = sorted(places)
    chance.shuffle(order)
    for path, position in order:
        operator, occurrence = chance.choice(places[path, position])
        acts = plugins.get_operator(operator)()
        original = path.read_text()
        source = mutate_code(original, acts, occurrence)
        if source is None or not compiles(source):
            continue
        name = operator.removeprefix("core/")
        module = str(path.relative_to(ROOT))
        yield Mutant(module, position[0], name, "drawn", source, original)
        count -= 1
        if not count:
            return


def replayed(row: Mapping[str, Any]) -> Mutant | None:
    """A drawn mutant of earlier results, in the code as it is now.

    Args:
        row: Its record.

    Returns:
        The mutant; None if its line is not there exactly once any more.
    """
    before, after = row["change"][:2]
    found = [
        (path, i)
        for path in core()
        for i, line in enumerate(path.read_text().splitlines())
        if line.strip() == before
    ]
    if len(found) != 1 or len(row["change"]) != 2:
        return None
    ((path, place),) = found
    original = path.read_text()
    lines = original.splitlines()
    lines[place] = lines[place].replace(before, after)
    source, module = "\n".join([*lines, ""]), str(path.relative_to(ROOT))
    return Mutant(module, place + 1, row["name"], "drawn", source, original)


def compiles(source: str) -> bool:
    """Whether a text is Python."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def formulas() -> Iterator[Mutant]:
    """The mutants written by hand.

    Yields:
        Mutants in the order of `formulas.toml`.

    Raises:
        ValueError: A text to be replaced is not there exactly once, or the change is
            not Python.
    """
    for entry in tomllib.loads(FORMULAS.read_text())["mutant"]:
        old, new = entry["old"], entry["new"]
        found = places(old, entry.get("definition", ""))
        if len(found) != 1:
            raise ValueError(f"{old!r} stands in {len(found)} places, not in one.")
        ((path, start),) = found
        before = path.read_text()
        source = before[:start] + new + before[start + len(old) :]
        if not compiles(source) or source == before:
            raise ValueError(f"{path.name}: {new!r} instead of {old!r} is no mutant.")
        line = before.count("\n", 0, start) + 1
        module = str(path.relative_to(ROOT))
        yield Mutant(module, line, entry["name"], "formula", source, before)


def controls(count: int, seed: int) -> Iterator[Mutant]:
    """Mutants that change nothing: a test that fails on one fails by itself."""
    for mutant in drawn(count, seed + 1):
        name = f"nothing at line {mutant.line}"
        yield dataclasses.replace(
            mutant, name=name, kind="control", source=mutant.original
        )
