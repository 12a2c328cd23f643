"""Examples tagged from their checkouts: a small one of our own, and the page."""

import io
import json
import sys

import jax
import pytest
from absl import flags
from rich.console import Console

from tests.acceptance.checkouts import __main__ as clients
from tests.acceptance.checkouts import stubs
from tests.acceptance.checkouts.checkout import (
    KEY,
    Case,
    Client,
    array,
    handed_over,
    importing,
    inside,
    integers,
    load,
    loss_of,
    on_one_device,
    run_cells,
)
from tests.acceptance.coverage import page as coverage_page

EXAMPLE = """
import functools
import jax
import jax.numpy as jnp
import ml_collections
import optax
import tensorflow as tf
import tensorflow.compat.v2 as tf2
from absl import flags
from clu import metric_writers

tf.random.set_seed(0)
flags.DEFINE_integer("example_width", 3, "")
config = ml_collections.ConfigDict({"model": {"classes": 5}})
options = tf.data.Options().autotune.enabled

def data(x: tf.Tensor | None) -> tf2.Tensor:
    return x

class Writer(metric_writers.Writer):
    pass

@functools.partial(jax.pmap, axis_name="batch")
def train_step(params, x, y):
    y = y + jax.lax.axis_index("batch")
    def loss_fn(params):
        logits = x @ params["w"] + params["b"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, logits
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, jax.lax.pmean(grads, "batch")
"""


def make(folder):
    train = load("train")
    shape = train.flags.FLAGS.example_width, train.config.model.classes
    params = {"w": array(*shape), "b": array(shape[1])}
    loss = on_one_device(loss_of(train.train_step.__wrapped__), "batch")
    return Case(loss, params, (array(4, 3), integers(4)), 4, has_aux=True)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Makes a checkout and makes it the only client; returns the folder of both."""
    (tmp_path / "own" / "src").mkdir(parents=True)
    (tmp_path / "own" / "src" / "train.py").write_text(EXAMPLE)
    own = Client("Own", "somebody/own", "src", make, "nothing | at all")
    other = Client("Other", "somebody/other", ".", make, "")
    monkeypatch.setattr(clients, "CLIENTS", {"own": own, "other": other})
    return tmp_path


def run(example, *names):
    console = Console(file=io.StringIO(), width=110)
    result = clients.benchmark(clients.Config(example, names, example), console)
    assert json.loads((example / "clients.json").read_text()).keys() == result.keys()
    return result["clients"], console.file.getvalue()


def test_an_example_is_tagged_as_it_is(example):
    rows, _ = run(example, "own")
    row = rows["own"]
    assert row["share"] == 1 and row["parameters"] == 20 and row["layers"] == 1
    assert row["commit"] is None and row["num_examples"] == 4
    assert row["stubbed"] == ["clu", "ml_collections", "tensorflow"]


def test_imports_leave_nothing_behind(example):
    before, path = set(sys.modules), list(sys.path)
    run(example, "own")
    assert sys.path == path and "train" not in sys.modules
    assert not any(stubs.belongs_to_stub(m) for m in set(sys.modules) - before)
    assert not any(isinstance(finder, stubs.Finder) for finder in sys.meta_path)
    assert "example_width" not in flags.FLAGS


def test_a_missing_checkout_is_told_with_the_command(example):
    rows, text = run(example, "other")
    command = "git clone https://github.com/somebody/other"
    assert rows["other"]["skipped"] == command and command in text


def test_a_failing_example_is_a_result(example):
    (example / "own" / "src" / "train.py").write_text("1 / 0")
    rows, text = run(example, "own")
    assert rows["own"]["failed"] == "ZeroDivisionError: division by zero"
    assert "division by zero" in text


def test_a_step_without_a_gradient_is_an_error():
    with pytest.raises(RuntimeError, match="differentiates nothing"):
        handed_over(lambda: jax.vmap(abs))


def test_modules_of_a_checkout_are_recognised(tmp_path):
    (tmp_path / "some_module_of_ours.py").write_text("")
    with importing(tmp_path):
        load("some_module_of_ours")
        assert inside("some_module_of_ours", tmp_path) and not inside("jax", tmp_path)
    assert "some_module_of_ours" not in sys.modules


def test_cells_of_a_notebook_run(tmp_path):
    cells = ["a = start + 1", "1 / 0", "def f(x: nothing | None): return x + a"]
    notebook = {"cells": [{"source": [cell]} for cell in cells]}
    (tmp_path / "n.ipynb").write_text(json.dumps(notebook))
    assert run_cells(tmp_path / "n.ipynb", (0, 2), start=1)["f"](1) == 3


def test_config_dict():
    config = stubs.ConfigDict({"a": {"b": 1}}, c=2)
    config.d = {"e": 3}
    assert (config.a.b, config.c, config["d"]["e"], len(config)) == (1, 2, 3, 3)
    assert config.lock().get("x", 4) == 4 and not hasattr(config, "x")
    del config["c"]
    assert list(config) == ["a", "d"]


def test_every_client_has_a_folder_of_its_own_repository():
    for client in clients.CLIENTS.values():
        assert client.repository.count("/") == 1
        assert client.clone.endswith(client.repository)
    assert KEY.shape == (2,)


def test_the_page_is_made_of_the_committed_results(request):
    root = request.config.rootpath
    wanted = coverage_page.page(root / coverage_page.RESULTS)
    assert (root / coverage_page.PAGE).read_text(encoding="utf-8") == wanted


def test_the_page_tells_of_what_is_missing(example, capsys):
    (example / "own" / "src" / "train.py").write_text("1 / 0")
    run(example, "own", "other")
    page = example / "docs" / "page.md"
    coverage_page.main(["--results", str(example), "--page", str(page)])
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "`git clone https://github.com/somebody/other`" in text
    assert "division by zero" in text and "## Architectures" not in text


def test_the_page_shows_an_example(example):
    run(example, "own")
    text = coverage_page.page(example)
    assert "| Own | [?](https://github.com/somebody/own) | 20 | 100 % | 1 |" in text
    assert "nothing \\| at all" in text and "Every parameter is in a block." in text
