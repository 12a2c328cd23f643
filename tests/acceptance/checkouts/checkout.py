"""Imports examples from a checkout, unmodified, and catches their losses."""

import __future__

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.io
import flax.training.checkpoints
import jax
import orbax.checkpoint
from absl import flags

from tests.acceptance.checkouts import stubs

# Imported before any stub: they keep what they find of TensorFlow.
del flax.io, flax.training.checkpoints, orbax.checkpoint

CAUGHT = "local loss caught"
AXIS = "axis of devices bound to one"
KEY = jax.ShapeDtypeStruct((2,), "uint32")


@dataclasses.dataclass(frozen=True)
class Case:
    """What an example trains.

    Attributes:
        loss: ``(params, *args) -> loss`` or ``(loss, aux)``.
        params: parameters, as shapes.
        args: further arguments, as shapes.
        num_examples: terms of the mean loss.
        has_aux: whether the loss returns more than its value.
    """

    loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    num_examples: int
    has_aux: bool = False


@dataclasses.dataclass(frozen=True)
class Client:
    """An example of a public repository.

    Attributes:
        title: what tables call it.
        repository: ``owner/name`` on GitHub; ``name`` is the checkout's folder.
        folder: what goes on the Python path, inside the checkout.
        make: finds parameters and loss; gets the folder.
        adapted: what had to be done, besides giving ``num_examples``.
    """

    title: str
    repository: str
    folder: str
    make: Callable[[Path], Case]
    adapted: str

    def checkout(self, checkouts: Path) -> Path:
        """The folder of the checkout."""
        return checkouts / self.repository.split("/")[1]

    @property
    def clone(self) -> str:
        """The command that makes the checkout."""
        return f"git clone https://github.com/{self.repository}"


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout; None if it is no git repository."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[set[str]]:
    """Puts a folder and the stubs first in line for imports, and cleans up."""
    finder = stubs.Finder()
    kept = stubs.take_out({m for m in sys.modules if stubs.belongs_to_stub(m)})
    before, defined = set(sys.modules), set(flags.FLAGS)
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield finder.used
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(finder)
        new = {m for m in sys.modules if m not in before}
        stubs.take_out(
            {m for m in new if stubs.belongs_to_stub(m) or inside(m, folder)}
        )
        sys.modules.update(kept)
        for name in set(flags.FLAGS) - defined:
            delattr(flags.FLAGS, name)


def inside(name: str, folder: Path) -> bool:
    """Whether a module comes from a folder."""
    module = sys.modules[name]
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    return any(p and Path(p).is_relative_to(folder) for p in places)


def load(name: str) -> Any:
    """Imports a module of the example; its flags have their defaults."""
    module = importlib.import_module(name)
    flags.FLAGS.mark_as_parsed()
    return module


class Handed(Exception):
    """A loss on its way to be differentiated."""

    def __init__(self, loss: Callable[..., Any], args: tuple[Any, ...]):
        """Keeps the loss and its arguments."""
        super().__init__()
        self.loss, self.args = loss, args


def handed_over(step: Callable[[], Any]) -> Handed:
    """Runs a training step until it differentiates its loss."""

    def differentiate(loss: Callable, *_: Any, **__: Any) -> Callable:
        def call(*args: Any) -> Any:
            raise Handed(loss, args)

        return call

    with (
        mock.patch.object(jax, "grad", differentiate),
        mock.patch.object(jax, "value_and_grad", differentiate),
    ):
        try:
            step()
        except Handed as handed:
            return handed
    raise RuntimeError("the training step differentiates nothing.")


def loss_of(step: Callable[..., Any]) -> Callable[..., Any]:
    """The loss inside a training step, with the step's arguments as its own."""

    def loss(params: Any, *args: Any) -> Any:
        handed = handed_over(lambda: step(params, *args))
        return handed.loss(*handed.args)

    return loss


def on_one_device(loss: Callable[..., Any], axis: str) -> Callable[..., Any]:
    """A loss that names an axis of devices, with that axis bound to a single one."""
    bound = jax.vmap(loss, in_axes=None, axis_name=axis, axis_size=1)

    def whole(*args: Any) -> Any:
        return jax.tree.map(lambda x: x[0], bound(*args))

    return whole


def run_cells(notebook: Path, cells: tuple[int, ...], **names: Any) -> dict[str, Any]:
    """Runs some code cells of a notebook, without evaluating annotations."""
    module = types.ModuleType("example_notebook")
    vars(module).update(names)
    sources = json.loads(notebook.read_text())["cells"]
    with mock.patch.dict(sys.modules, {module.__name__: module}):
        for number in cells:
            code = "".join(sources[number]["source"])
            flags_of = __future__.annotations.compiler_flag
            exec(compile(code, f"cell {number}", "exec", flags_of), vars(module))
    return vars(module)


def array(*shape: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array of integers."""
    return array(*shape, dtype="int32")
