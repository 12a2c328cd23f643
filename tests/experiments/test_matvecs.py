"""The benchmark of curvature products, and that of spectra, at tiny sizes."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import matvecs, spectrum
from experiments.benchmarks.matvecs import (
    EMPIRICAL,
    MC,
    Layer,
    Network,
    carried,
    drawn_labels,
    import_torch,
    make_problem,
    normal_vectors,
    our_operators,
    with_labels,
)
from experiments.datasets import load

TINY = ["--dataset", "mnist5k", "--examples", "6", "--batch-size", "4", "--width", "2"]
SMALL = [*TINY, "--models", "mlp", "--vectors", "2", "--rounds", "2"]
with_peer = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "curvlinops")),
    reason="needs torch and curvlinops",
)


@pytest.fixture(scope="module")
def images():
    return load("mnist5k").first(6)


@pytest.fixture
def problem(images):
    return make_problem("mlp", images, 4, 2)


# ----------------------------------------------------------------- weights for PyTorch


def test_dense_weights_after_flattening_an_image(rng):
    """The layer gives the same on channels-first images."""
    network = Network(None, (Layer("Dense_0", (2, 3, 4)),))
    tree = {"Dense_0": {"kernel": rng.normal(size=(24, 5)), "bias": rng.normal(size=5)}}
    image = rng.normal(size=(2, 3, 4))
    weight, bias = carried(tree, network)
    want = image.reshape(-1) @ tree["Dense_0"]["kernel"]
    np.testing.assert_allclose(weight @ image.transpose(2, 0, 1).reshape(-1), want)
    np.testing.assert_array_equal(bias, tree["Dense_0"]["bias"])


def test_convolution_weights(rng):
    kernel = rng.normal(size=(3, 5, 2, 4))
    tree = {"Conv_0": {"kernel": kernel, "bias": rng.normal(size=4)}}
    weight, _ = carried(tree, Network(None, (Layer("Conv_0"),)))
    assert weight.shape == (4, 2, 3, 5)
    assert weight[3, 1, 2, 4] == kernel[2, 4, 1, 3]


def test_several_vectors_go_last(problem):
    tree = normal_vectors(problem, 0, 3)
    one = jax.tree.map(lambda x: x[1], tree)
    many = carried(tree, problem.network, several=True)
    for x, y in zip(many, carried(one, problem.network), strict=True):
        np.testing.assert_array_equal(x[..., 1], y)


# ------------------------------------------------------------------------ the benchmark


def test_the_labels_that_were_drawn(problem):
    """The empirical Fisher with them is the MC Fisher; with others it is not."""
    makers, v = our_operators(problem), normal_vectors(problem, 1)
    sampled = makers[MC]()
    labels = drawn_labels(sampled)
    again = our_operators(with_labels(problem, labels))[EMPIRICAL]()
    others = our_operators(with_labels(problem, [(y + 1) % 10 for y in labels]))
    flat = lambda op: jax.flatten_util.ravel_pytree(op.mv(v))[0]  # noqa: E731
    np.testing.assert_allclose(flat(sampled), flat(again), rtol=1e-4, atol=1e-6)
    assert not np.allclose(flat(sampled), flat(others[EMPIRICAL]()), rtol=1e-2)


def test_the_difference_of_two_products(problem):
    tree = normal_vectors(problem, 0)

    class Tensor:
        def __init__(self, values):
            self.values = values

        def detach(self):
            return self

        def double(self):
            return self

        def numpy(self):
            return self.values.astype(np.float64)

    theirs = [Tensor(2 * x) for x in carried(tree, problem.network)]
    found = matvecs.relative_difference(tree, theirs, problem, False)
    assert found == pytest.approx(0.5, rel=1e-6)


def test_a_run_without_the_peer(tmp_path, capsys, monkeypatch):
    makers, chosen = matvecs.our_operators, ("GGN", "K-FAC, empirical")
    two = lambda problem: {k: v for k, v in makers(problem).items() if k in chosen}  # noqa: E731
    monkeypatch.setattr(matvecs, "our_operators", two)
    assert not matvecs.main([*SMALL, "--without-peer", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    threads = written["settings"]["threads"]
    assert path.name == f"matvecs_threads_{threads}.json"
    assert "out" not in written["settings"] and "data_dir" not in written["settings"]
    assert written["machine"]["curvlinops_missing"] == "--without-peer"
    found = written["models"]["mlp"]
    assert found["parameters"] == 784 * 2 + 2 + 2 * 2 + 2 + 2 * 10 + 10
    events = [(row["matrix"], row["event"]) for row in found["rows"]]
    assert len(events) == len(set(events)) == 3 * 2
    for row in found["rows"]:
        assert row["ours"]["ms"] == sorted(row["ours"]["ms"])
        assert "theirs" not in row and "ratio" not in row
    out = capsys.readouterr().out
    assert "2 vectors" in out and "curvlinops: missing, --without-peer" in out


def test_products_that_differ_are_told(tmp_path, monkeypatch, capsys):
    rows = [
        {"matrix": "GGN", "event": "1 vector", "agree": True},
        {"matrix": "GGN", "event": "2 vectors", "agree": False},
    ]
    found = {"parameters": 1, "images": "none", "rows": rows}
    monkeypatch.setattr(matvecs, "benchmark", lambda *a: found)
    assert matvecs.main([*SMALL, "--out", str(tmp_path)]) == 1
    told = [x for x in capsys.readouterr().out.splitlines() if x.startswith("PRODUCTS")]
    assert told == ["PRODUCTS DIFFER: mlp, GGN, 2 vectors"]


def test_ratios_and_rounds():
    """Quartiles of the rounds' ratios; the order of the two alternates."""
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("ours", "theirs")}
    row = matvecs.Row("GGN", "1 vector", calls, {"ours": 3.0, "theirs": 4.0}, 1e-2)
    for number in range(3):
        row.run(number)
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    row.seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 2.0]}
    found = row.record()
    assert found["ratio"] == (0.75, 1.0, 1.5)
    assert found["ours"] == {"ms": [1500.0, 2000.0, 3000.0], "first_seconds": 3.0}
    assert found["agree"] is False


def test_more_threads_than_cores():
    with pytest.raises(SystemExit, match="--threads 100000: wanted 1 to"):
        matvecs.main([*SMALL, "--threads", "100000"])


@with_peer
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_products_are_those_of_curvlinops(tmp_path):
    """Every matrix of both networks; exit status 0 says that all agree."""
    argv = [*TINY, "--vectors", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert import_torch()[2] == ""
    assert matvecs.main(argv) == 0
    (path,) = tmp_path.iterdir()
    for model in json.loads(path.read_text())["models"].values():
        differences = [row["difference"] for row in model["rows"][1:3]]
        assert max(differences) < 1e-5


# ------------------------------------------------------------------------- the spectrum


def test_spectrum_of_a_small_network(tmp_path, console, monkeypatch):
    """The eigenvalues are those of the dense matrix."""
    config = spectrum.Config(
        model="mlp", dataset="digits", examples=20, hidden=(2,), k=3, batch_size=8,
        epochs=1, train_batch_size=10, out=tmp_path,
    )  # fmt: skip
    kept = []
    make = spectrum.make_operator
    monkeypatch.setattr(
        spectrum, "make_operator", lambda *a: kept.append(make(*a)) or kept[0]
    )
    result = spectrum.measure(config, console)
    dense = np.asarray(kept[0].to_dense(), np.float64)
    want = np.linalg.eigvalsh(dense)[::-1][:3]
    np.testing.assert_allclose(result["eigenvalues"], want, rtol=1e-4)
    assert result["residuals"].max() < 1e-3 * want[0]
    assert result["parameters"] == 64 * 2 + 2 + 2 * 10 + 10
    assert result["training_steps"] == 2 and result["examples"] == 20
    assert result["products"] >= 3
    assert "training loss" in spectrum.show(result)


def test_spectrum_adds_a_line(tmp_path, monkeypatch):
    seen = []

    def measure(config, console):
        seen.append(config)
        return {"settings": {"matrix": config.matrix}, "eigenvalues": np.ones(2)}

    monkeypatch.setattr(spectrum, "measure", measure)
    monkeypatch.setattr(spectrum, "show", lambda result: "table")
    for matrix in ("ggn", "hessian"):
        out = str(tmp_path / "new")
        assert spectrum.main(["--matrix", matrix, "--out", out]) == 0
    assert [dataclasses.asdict(c)["matrix"] for c in seen] == ["ggn", "hessian"]
    lines = (tmp_path / "new" / spectrum.FILE).read_text().splitlines()
    assert [json.loads(x)["settings"]["matrix"] for x in lines] == ["ggn", "hessian"]
    assert json.loads(lines[0])["eigenvalues"] == [1.0, 1.0]
