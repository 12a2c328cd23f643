"""Stand-ins for the data pipelines and loggers that public examples import.

An example's model and loss need none of them, but its modules import them at the top.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, MutableMapping
from typing import Any

NAMES = frozenset(
    {
        "clu",
        "datasets",
        "diffusers",
        "diffrax",
        "flaxformer",
        "grain",
        "gymnasium",
        "ale_py",
        "cv2",
        "jraph",
        "kagglehub",
        "ml_collections",
        "pandas",
        "sentencepiece",
        "tensorboard",
        "tensorflow",
        "tensorflow_datasets",
        "tensorflow_text",
        "tiktoken",
        "torch",
        "torchvision",
        "tqdm",
        "transformers",
        "wandb",
    }
)


class ConfigDict(MutableMapping):
    """A mapping whose keys are attributes, as ``ml_collections`` has it."""

    def __init__(self, values: Any = (), **more: Any) -> None:
        """Takes the first entries."""
        for key, value in (dict(values) | more).items():
            self[key] = value

    def __getitem__(self, key: str) -> Any:
        """An entry."""
        return self.__dict__[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets an entry; a dictionary becomes one of these."""
        self.__dict__[key] = ConfigDict(value) if isinstance(value, dict) else value

    __setattr__ = __setitem__

    def __delitem__(self, key: str) -> None:
        """Removes an entry."""
        del self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self.__dict__)

    def __len__(self) -> int:
        """The number of entries."""
        return len(self.__dict__)

    def __getattr__(self, name: str) -> Any:
        """Tells of an entry that is not there."""
        raise AttributeError(name)

    def lock(self) -> "ConfigDict":
        """Returns itself."""
        return self


class Empty:
    """The classes of stubs: any arguments, any attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores its arguments."""

    def __getattr__(self, name: str) -> Any:
        """A stub."""
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(name)


class Stub(types.ModuleType):
    """A module in which every name exists and does nothing; in capitals, classes."""

    def __init__(self, name: str) -> None:
        """Is a package, so that modules can be imported from it."""
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        """Another stub, or an empty class."""
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = Stub(f"{self.__name__}.{name}")
        if name[0].isupper():
            found = type(name, (Empty,), {})
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        """Another stub."""
        return Stub(self.__name__)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports stubs, and remembers the names of the packages."""

    def __init__(self) -> None:
        """Has imported nothing yet."""
        self.used: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Finds the packages of `NAMES`, installed or not."""
        if fullname.split(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Stub:
        """A new stub."""
        self.used.add(spec.name.split(".")[0])
        stub: Any = Stub(spec.name)
        if spec.name == "ml_collections":
            stub.ConfigDict = stub.config_dict.ConfigDict = ConfigDict
            stub.config_dict.create = ConfigDict
        return stub

    def exec_module(self, module: types.ModuleType) -> None:
        """A stub has no code."""


def belongs_to_stub(name: str) -> bool:
    """Whether a module is a stub, or a library's module that keeps one."""
    return name.split(".")[0] in NAMES or name == "flax.metrics.tensorboard"


def take_out(names: set[str]) -> dict[str, types.ModuleType]:
    """Removes modules from ``sys.modules`` and returns them."""
    return {name: sys.modules.pop(name) for name in names}
