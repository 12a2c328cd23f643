"""The code in the README runs as it stands, from the first block to the last."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks():
    """The Python blocks by the heading above them, in order."""
    text = README.read_text()
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        heading = re.findall(r"^#+ (.*)$", text[: match.start()], re.M)[-1]
        line = text[: match.start()].count("\n") + 1
        found.append((heading, "\n" * line + match[1]))
    return found


BLOCKS = blocks()

pytestmark = pytest.mark.usefixtures("compiled_anew")


@pytest.fixture(scope="module")
def names():
    """The names that the quickstart leaves behind; the recipes go on from them."""
    namespace: dict = {"__name__": "readme"}
    with jax.enable_x64(False):
        exec(compile(BLOCKS[0][1], README, "exec"), namespace)
    return namespace


def test_quickstart(names):
    assert BLOCKS[0][0] == "Quickstart"
    assert float(names["loss"]) < 0.2


def test_quickstart_is_short():
    """Fifteen lines besides the model and its data."""
    code = BLOCKS[0][1].split("\n\n")
    lines = "\n\n".join(code[code.index(next(c for c in code if "tag(" in c)) :])
    assert len([line for line in lines.splitlines() if line.strip()]) <= 15


def test_the_table_is_the_one_that_is_printed(names):
    assert str(names["tagged"]).strip() in README.read_text()


@pytest.mark.parametrize(
    ("heading", "code"), BLOCKS[1:], ids=[h for h, _ in BLOCKS[1:]]
)
def test_recipe(names, heading, code):
    namespace = dict(names)
    exec(compile(code, README, "exec"), namespace)
    leaves = jax.tree.leaves(namespace["loss"])
    assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in leaves)
