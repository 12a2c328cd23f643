"""The code of the README, and of the pages whose sections each go on from it.

Every section of ``docs/recipes.md`` and ``docs/devices.md`` runs by itself after the
quickstart; the other pages run from top to bottom in ``tests/test_docs.py``.
"""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [ROOT / "docs" / "recipes.md", ROOT / "docs" / "devices.md"]
# Its first block is the step that other recipes call.
SHARED = "A step for any transformation"


def blocks(path):
    """The Python blocks by the heading above them, in order."""
    text = path.read_text()
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        heading = re.findall(r"^#+ (.*)$", text[: match.start()], re.M)[-1]
        line = text[: match.start()].count("\n") + 1
        found.append((heading, "\n" * line + match[1]))
    return found


SECTIONS = [(page, *block) for page in PAGES for block in blocks(page)]

pytestmark = pytest.mark.usefixtures("compiled_anew")


@pytest.fixture(scope="module")
def names():
    """The names that the quickstart leaves behind; the recipes go on from them."""
    namespace: dict = {"__name__": "readme"}
    with jax.enable_x64(False):
        exec(compile(blocks(README)[0][1], README, "exec"), namespace)
        shared = next(code for _, heading, code in SECTIONS if heading == SHARED)
        exec(compile(shared, PAGES[0], "exec"), namespace)
    return namespace


def test_quickstart(names):
    ((heading, _),) = blocks(README)
    assert heading == "Quickstart"
    assert float(names["loss"]) < 0.2


def test_quickstart_is_short():
    """Fifteen lines besides the model and its data."""
    code = blocks(README)[0][1].split("\n\n")
    lines = "\n\n".join(code[code.index(next(c for c in code if "tag(" in c)) :])
    assert len([line for line in lines.splitlines() if line.strip()]) <= 15


def test_the_table_is_the_one_that_is_printed(names):
    assert str(names["tagged"]).strip() in README.read_text()


@pytest.mark.parametrize(
    ("page", "heading", "code"),
    SECTIONS,
    ids=[f"{page.stem}: {heading}" for page, heading, _ in SECTIONS],
)
def test_section(names, page, heading, code):
    namespace = dict(names)
    exec(compile(code, page, "exec"), namespace)
    leaves = jax.tree.leaves(namespace["loss"])
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves)
