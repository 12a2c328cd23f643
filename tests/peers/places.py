"""Where our optimiser goes in the peers' test files."""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from flax.training import train_state

from tests.peers import adapter

# Ours in their lists: name and keywords; damping 1 makes gradient descent of it where
# gradients vanish, which is what their targets want near the minimum.
LISTED = (
    ("kfac", {"learning_rate": 2e-3}),
    ("kfac_ekfac", {"learning_rate": 2e-3}),
    ("kfac_units", {"learning_rate": 2e-3}),
)
WRAPPED = (
    ("kfac", {"learning_rate": 2e-3}, "reduce_on_plateau", {}),
    ("kfac", {"learning_rate": 1e-2}, "schedule_free", {"learning_rate": 1e-2}),
    ("kfac", {"learning_rate": 1.0}, "mechanize", {"weight_decay": 0.0}),
)
# What optax offers and the tests ask for by name.
NAMES = ("sgd", "adam", "adamw", "adagrad", "rmsprop", "lion")


@dataclasses.dataclass(frozen=True)
class File:
    """A test file of a peer.

    Attributes:
        peer: whose.
        path: in the source distribution.
        kind: ``"list"``: optimisers under test are listed; ``"place"``: the tests ask
            optax for optimisers by name; ``"payload"``: checkpoints.
        classes: test classes to run, all by default.
        why: what is left out, and why.
    """

    peer: str
    path: str
    kind: str
    classes: tuple[str, ...] = ()
    why: str = ""

    @property
    def variants(self) -> tuple[str, ...]:
        """The runs to compare."""
        return (
            ("control", "ours")
            if self.kind == "list"
            else ("theirs", "control", "ours")
        )


FILES = (
    File("optax", "optax/_src/alias_test.py", "list", ("AliasTest",),
         "LBFGSTest is about L-BFGS's own numbers and line search"),
    File("optax", "optax/contrib/_common_test.py", "list"),
    File("optax", "optax/_src/sharding_test.py", "list"),
    File("optax", "optax/transforms/_accumulation_test.py", "place"),
    File("optax", "optax/transforms/_masking_test.py", "place"),
    File("optax", "optax/transforms/_conditionality_test.py", "place"),
    File("optax", "optax/transforms/_combining_test.py", "place"),
    File("optax", "optax/transforms/_freezing_test.py", "place"),
    File("optax", "optax/transforms/_layouts_test.py", "place"),
    File("optax", "optax/transforms/_monitoring_test.py", "place"),
    File("optax", "optax/tree_utils/_state_utils_test.py", "place"),
    File("optax", "optax/contrib/_schedule_free_test.py", "place"),
    File("flax", "tests/checkpoints_test.py", "payload"),
    File("flax", "tests/serialization_test.py", "place"),
    File("flax", "tests/traverse_util_test.py", "place"),
    File("flax", "tests/cursor_test.py", "place"),
    File("flax", "tests/nnx/optimizer_test.py", "place"),
    File("flax", "tests/nnx/helpers_test.py", "place"),
    File("flax", "tests/nnx/ema_test.py", "place"),
    File("flax", "tests/nnx/integration_test.py", "place"),
)  # fmt: skip


def factories(variant: str) -> dict[str, Callable]:
    """The optimisers that take part, by the names in the lists."""
    if variant == "ours":
        return adapter.FACTORIES

    def adam(learning_rate: optax.ScalarOrSchedule, b1: float = 0.9):
        del learning_rate
        return adapter.counted(optax.adam(0.1, b1))

    return dict.fromkeys(adapter.FACTORIES, adam)


def listed(first: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Entries in place of theirs, with the keys that theirs have."""
    rows = [(name, options, None, None) for name, options in LISTED]
    keys = ("opt_name", "opt_kwargs")
    if "wrapper_name" in first:
        rows, keys = [*rows, *WRAPPED], (*keys, "wrapper_name", "wrapper_kwargs")
    return tuple(dict(zip(keys, row, strict=False)) for row in rows)


@contextlib.contextmanager
def lists_replaced(variant: str) -> Iterator[None]:
    """While a module is imported: its parametrised lists of optimisers are ours."""
    product, named = parameterized.product, parameterized.named_parameters

    def is_list(values: Any) -> bool:
        rows = isinstance(values, (list, tuple)) and len(values) > 0
        return rows and all(isinstance(v, dict) and "opt_name" in v for v in values)

    def our_product(*args, **kwargs):
        swapped = [listed(v[0]) if is_list(v) else v for v in args]
        return product(*swapped, **kwargs)

    def our_named(*args):
        rows = list(args[0]) if len(args) == 1 and not callable(args[0]) else []
        if rows and all(
            isinstance(r, tuple) and hasattr(r[-1], "update") for r in rows
        ):
            made = factories(variant)
            name = "kfac_elementwise"
            return named((name, made[name](learning_rate=1.0)))
        return named(*args)

    parameterized.product, parameterized.named_parameters = our_product, our_named
    try:
        yield
    finally:
        parameterized.product, parameterized.named_parameters = product, named


class Stand:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any):
        self.__dict__["module"] = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def told_version(module: types.ModuleType) -> None:
    """Of a module that skips tests for old versions of JAX, and compares text.

    ``"0.10.2" < "0.7.2"``: without this all of them would be skipped.
    """
    if "jax" in vars(module):
        module.jax = Stand(jax, __version__="0.9.9")  # type: ignore


def put(module: types.ModuleType, file: File, variant: str) -> None:
    """Puts the optimiser of a variant into an imported test module."""
    if file.kind == "list":
        made = factories(variant)
        if hasattr(module, "_get_opt"):
            theirs = module._get_opt
            module._get_opt = lambda self, name: made.get(name) or theirs(self, name)
        if hasattr(module, "_get_opt_factory"):
            module._get_opt_factory = made.__getitem__
    elif file.kind == "payload":
        module.checkpoints = with_payload(module.checkpoints, variant)
    else:
        make = adapter.in_place if variant == "ours" else adapter.control
        names = dict.fromkeys(NAMES, make)
        for name in ("alias", "optax"):
            if hasattr(module, name):
                held = getattr(module, name)
                setattr(module, name, Stand(held, **names))


# ------------------------------------------------------------------------- checkpoints


def train_states(variant: str) -> list[Any]:
    """A flax ``TrainState`` before and after one, two and three steps."""
    make = adapter.in_place if variant == "ours" else adapter.control
    weights = jnp.arange(12, dtype=jnp.float32).reshape(4, 3) / 10
    params = {"kernel": weights, "bias": jnp.ones(3)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=make(0.1))
    found = [state]
    for _ in range(3):
        state = state.apply_gradients(grads=state.params)
        found.append(state)
    return found


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def with_payload(checkpoints: Any, variant: str) -> Stand:
    """``flax.training.checkpoints`` that saves a ``TrainState`` beside each target.

    What is restored must be, bit for bit, one of the states saved; the tests see their
    own part. Targets that are a single array or empty go as they are: what is done with
    those is what their tests are about.
    """
    states = train_states(variant)
    saved = [0]

    def plain(target: Any) -> bool:
        return not isinstance(target, (dict, list, tuple)) or not target

    def save(ckpt_dir, target, *args, **kwargs):
        if plain(target):
            return checkpoints.save_checkpoint(ckpt_dir, target, *args, **kwargs)
        saved[0] += 1
        state = states[1 + saved[0] % 3]
        both = {"theirs": target, "state": state}
        return checkpoints.save_checkpoint(ckpt_dir, both, *args, **kwargs)

    def restore(ckpt_dir, target, *args, **kwargs):
        both = target
        if target is not None and not plain(target):
            both = {"theirs": target, "state": states[0]}
        found = checkpoints.restore_checkpoint(ckpt_dir, both, *args, **kwargs)
        if not (isinstance(found, dict) and set(found) == {"theirs", "state"}):
            return found
        check(found["state"])
        return found["theirs"]

    def check(state: Any) -> None:
        adapter.CALLS["update"] += 1
        seen = flax.serialization.to_state_dict(state)
        wanted = flax.serialization.to_state_dict(states[int(seen["step"])])
        # By path: orbax gives back nothing where a part of the state is empty.
        for name, leaf in by_path(wanted).items():
            np.testing.assert_array_equal(by_path(seen)[name], leaf)

    return Stand(checkpoints, save_checkpoint=save, restore_checkpoint=restore)
