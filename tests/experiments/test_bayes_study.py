"""The Bayesian study: its parts against numbers by hand, a small study, its page."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from experiments.errors import ConfigError, MetricsError
from experiments.main import main
from experiments.studies.bayes import (
    active,
    calibration,
    config,
    problem,
    regression,
    report,
    run,
)
from experiments.studies.bayes import config as configs
from experiments.studies.training import orders
from experiments.tuning.trials import as_floats
from kfac_jax_lite import bayes

SMALLEST = dataclasses.replace(config.TINY, seeds=1, epochs=1, search_samples=1)
CELLS = ("digits_mlp_adam", "digits_mlp_noisy_kfac", "digits_mlp_adam_last_layer")
CELLS += ("digits_mlp_adam_ensemble", "active_bald", "regression_noisy_kfac")
ARGUMENTS = ["study", "bayes", "--size", "tiny", "--seeds", "2", "--only", *CELLS]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(found, wanted, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
        found,
        wanted,
    )


@pytest.fixture(scope="module")
def images():
    return problem.load(SMALLEST, "digits")


@pytest.fixture(scope="module")
def network(images):
    return problem.network_of(SMALLEST, "mlp", images)


@pytest.mark.parametrize("config", config.SIZES.values(), ids=config.SIZES)
def test_adam_has_the_most_trials(config):
    counts = {m: len(config.trials(m)) for m in configs.TRAINED}
    assert max(counts.values()) == counts["adam"]
    every = config.trials("noisy_kfac")
    assert len({tuple(v.values()) for v in every}) == len(every)


def test_a_grid_larger_than_adams_is_refused():
    grid = configs.PointGrid((0.1, 0.2, 0.3), (1e-3,))
    with pytest.raises(ConfigError, match="sgd has 3 trials; wanted from 1 to 2"):
        dataclasses.replace(config.TINY, sgd=grid)


def test_grid_is_the_product():
    grid = configs.PointGrid((1.0, 2.0), (3.0, 4.0))
    pairs = [(v["learning_rate"], v["weight_decay"]) for v in grid.trials()]
    assert pairs == [(1, 3), (1, 4), (2, 3), (2, 4)]


@pytest.mark.parametrize("method", configs.POSTERIORS)
def test_program_is_the_optimiser_with_its_prior(method, images, network):
    """One step equals that of the library's optimiser made for these numbers."""
    values = {"learning_rate": 0.05, "prior_precision": 20.0, "temperature": 0.3}
    values |= {"initial": 0.2} if method == configs.IVON else {}
    settings = problem.Settings(method, 256, 10, refresh_every=1)
    x, y = images.data.x_train[:32], images.data.y_train[:32]
    program = problem.make_program(settings, network.task, (x, y))
    numbers = as_floats(values)
    params, model_state, state = program.start(3, numbers)
    tagged = problem.tag_for(settings, network.task, (x, y))
    shared, prior = (256, 0.05), {"prior_precision": 20.0, "temperature": 0.3}
    if method == configs.NOISY:
        tx = bayes.noisy_kfac(
            tagged.layers, *shared, **prior, damping=0.03, kl_clip=1e-2
        )
    elif method == configs.VOGN:
        tx = bayes.vogn(tagged.layers, *shared, **prior, damping=1e-3)
    else:
        tx = bayes.ivon(*shared, **prior, initial=0.2, decay=0.999)
    own = tx.init(params)
    np.testing.assert_allclose(state.variance, own.variance)
    np.testing.assert_allclose(state.damping, own.damping)
    key = jax.random.fold_in(jax.random.key(4), 0)
    loss = network.task.loss if tagged is None else tagged
    given = {"opt_state": own, "key": key, "has_aux": True}
    _, grads, found = bayes.value_and_grad(loss, params, model_state, x, y, **given)
    updates, _ = tx.update(grads, own, params, statistics=found)
    wanted = jax.tree.map(lambda p, u: p + u, params, updates)
    rows, at = np.arange(32, dtype=np.int32), jnp.int32(0)
    carry = params, model_state, state
    (after, _, _), _ = program.step(
        carry, numbers, jnp.asarray(x), jnp.asarray(y), rows, at, jax.random.key(4)
    )
    close(after, wanted, rtol=1e-4)


def test_number_of_data_as_a_value():
    settings = problem.Settings(configs.IVON, 100, 10)
    values = {"temperature": 0.5, "prior_precision": 8.0, "learning_rate": 0.1}
    for more, wanted in (({}, (0.005, 0.04)), ({"num_data": 10}, (0.05, 0.4))):
        tx = problem.make_tx(settings, None, {**values, "initial": 0.3, **more})
        state = tx.init({"w": jnp.zeros(2)})
        np.testing.assert_allclose((state.variance, state.damping), wanted, rtol=1e-6)
        np.testing.assert_allclose(state.hessian["w"], 0.3, rtol=1e-6)


def test_orders_are_permutations_of_every_epoch():
    epochs = orders(10, 3, 2, seed=1)
    assert [e.shape for e in epochs] == [(3, 3)] * 2
    for epoch in epochs:
        assert len(set(epoch.ravel())) == 9
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(epochs[0], orders(10, 3, 1, seed=1)[0])


def test_images_are_apart_and_shifted(images):
    data, (held, _) = images.data, images.held
    shape = data.x_train.shape[1:]
    assert held.shape == (64, *shape) and data.x_test.shape == (100, *shape)
    seen = {image.tobytes() for image in data.x_train}
    assert not any(image.tobytes() in seen for image in held)
    ((severity, (moved, labels)),) = images.shifted.items()
    np.testing.assert_array_equal(labels, data.y_test[:50])
    assert moved.min() >= 0 and moved.max() <= data.maximum
    inner = (moved > 0) & (moved < data.maximum)
    spread = (moved - data.x_test[:50])[inner].std() / data.maximum
    assert spread == pytest.approx(severity, rel=0.3)
    noise = images.strange[problem.NOISE]
    assert noise.shape == (50, *shape)
    assert noise.mean() == pytest.approx(data.maximum / 2, rel=0.05)


def test_measures_of_an_oracle_and_of_chance(images):
    """Labels are known for test images; everything else gets equal probabilities."""
    data = images.data

    def oracle(x):
        if x is data.x_test:
            return np.eye(10)[data.y_test]
        return np.full((len(x), 10), 0.1)

    found = problem.measure(SMALLEST, images, oracle)
    assert found["test"]["accuracy"] == 1 and found["test"]["ece"] == 0
    assert found["strange"]["noise"]["auroc"] == 1
    assert found["strange"]["noise"]["fpr95"] == 0
    assert found["shifted"]["nll"] == [pytest.approx(np.log(10))]
    assert found["shifted"]["auroc"] == [1]
    assert sum(found["bins"]["count"]) == len(data.y_test)


def test_model_state_is_not_drawn():
    class Shift:
        def draw(self, params, key):
            return params + 1

    drawn = problem.WithState(Shift()).draw((2, "state"), None)
    assert drawn == (3, "state")


def test_weights_come_back(tmp_path, network):
    tree = network.task.init(jax.random.key(1))
    path = tmp_path / "folder" / "cell_1.npz"
    run.save(path, tree)
    close(run.read(path, jax.eval_shape(lambda: tree)), tree, rtol=0)
    with pytest.raises(MetricsError, match="another network"):
        run.read(path, {"w": jnp.ones(3)})
    with pytest.raises(MetricsError, match="run first"):
        run.read(tmp_path / "none.npz", tree)


def test_ensemble_is_the_mean_of_probabilities(network, images):
    members = [network.task.init(jax.random.key(seed)) for seed in range(2)]
    x = images.data.x_test[:5]
    each = [jax.nn.softmax(network.logits(member, x)) for member in members]
    found = run.ensemble(network, members)(x)
    np.testing.assert_allclose(found, (each[0] + each[1]) / 2, rtol=1e-5)


def test_which_images_are_labelled():
    rng = np.random.default_rng(0)
    p = np.full((2, 4, 2), 0.5)
    p[:, 1] = [0.9, 0.1]  # sure
    p[0, 2], p[1, 2] = [1, 0], [0, 1]  # the draws contradict each other
    random = active.chosen("active_random", None, 4, 3, rng)
    assert len(set(random)) == 3
    # Only the third image has any mutual information.
    assert active.chosen("active_bald", p, 4, 1, rng).tolist() == [2]
    assert active.chosen("active_entropy", p, 4, 3, rng).tolist() == [0, 2, 3]


def test_informative_images_are_labelled_more_often():
    """In proportion to the mutual information, here ln 2 and half of it or so."""
    p = np.full((2, 2, 2), 0.5)
    p[0, 0], p[1, 0] = [1, 0], [0, 1]
    p[0, 1], p[1, 1] = [0.95, 0.05], [0.15, 0.85]
    scores = calibration.mutual_information(p)
    rng = np.random.default_rng(0)
    first = [active.chosen("active_bald", p, 2, 1, rng)[0] for _ in range(400)]
    wanted = scores[0] / scores.sum()
    assert np.mean(np.array(first) == 0) == pytest.approx(wanted, abs=0.07)


def test_regions_of_the_regression_example():
    grid = np.array([-1.2, -0.5, 0.0, 0.1, 0.5])
    deviation = np.sqrt(np.array([4.0, 1.0, 9.0, 1.0, 4.0]) + 0.25)
    found = regression.uncertainty(grid, deviation, 0.5)
    assert found == {
        "outside": pytest.approx(2),
        "data": pytest.approx(1.5),
        "gap": pytest.approx(2),
    }
    x, y = regression.points(configs.Regression(examples=400))
    assert 0.3 <= np.abs(x).min() and np.abs(x).max() <= 1
    assert (y - regression.truth(x)).std() == pytest.approx(0.1, rel=0.1)


def result(method, accuracy, nll, ece):
    """A cell with runs of these figures."""
    cell = configs.Cell("digits", "mlp", method)
    names = ("accuracy", "nll", "ece")
    runs = [
        {"test": dict(zip(names, figures, strict=True)), "seed": seed}
        for seed, figures in enumerate(zip(accuracy, nll, ece, strict=True))
    ]
    return {cell: report.Result(cell, [], runs)}


ADAM = result("adam", [0.8, 0.81, 0.8], [0.6, 0.61, 0.62], [0.05, 0.06, 0.055])


def test_comparison_is_welchs_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=5), 3 * rng.normal(size=4) + 1
    found = report.compare(ours, theirs)
    wanted = scipy.stats.ttest_ind(ours, theirs, equal_var=False)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    assert report.compare(ours[:1], theirs).p is None
    assert report.compare(np.ones(3), np.zeros(3)).p is None


@pytest.mark.parametrize(
    ("accuracy", "nll", "ece", "wins"),
    [
        ([0.8, 0.8, 0.81], [0.5, 0.51, 0.52], [0.01, 0.02, 0.015], True),
        ([0.7, 0.7, 0.71], [0.5, 0.51, 0.52], [0.01, 0.02, 0.015], False),
        ([0.8, 0.8, 0.81], [0.6, 0.61, 0.62], [0.01, 0.02, 0.015], False),
        ([0.8, 0.8, 0.81], [0.5, 0.51, 0.52], [0.08, 0.09, 0.085], False),
    ],
    ids=["better", "less accurate", "equal loss", "worse calibrated"],
)
def test_answer_follows_from_the_numbers(accuracy, nll, ece, wins):
    both = ADAM | result("noisy_kfac", accuracy, nll, ece)
    text = report.answer(both)
    assert ("1 of 1 methods have" in text) == wins
    assert ("none of 1 methods has" in text) == (not wins)
    assert ("noisy K-FAC: NLL -0.1000 (p = " in text) == wins


def test_answer_without_adam():
    lone = result("noisy_kfac", [0.8, 0.9], [0.5, 0.6], [0.1, 0.2])
    assert "nothing can be compared with Adam yet" in report.answer(lone)


def test_winner_is_the_least_loss_and_never_a_diverged_one():
    trials = [{"nll": None}, {"nll": 0.5}, {"nll": 0.4}, {"nll": 0.4}]
    assert run.winner_of(trials) is trials[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of a whole study of a moment."""
    out = tmp_path_factory.mktemp("bayes")
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_records(folder):
    for name in CELLS[:2]:
        records = lines(folder / f"{name}.jsonl")
        trials = [r for r in records if r["kind"] == "trial"]
        seeds = [r for r in records if r["kind"] == "seed"]
        assert [r["values"] for r in trials] == config.TINY.trials(trials[0]["method"])
        best = min(trials, key=run.of_trial)["values"]
        assert [(r["seed"], r["values"]) for r in seeds] == [(1, best), (2, best)]
        assert all(("mean_weights" in r) == ("noisy" in name) for r in seeds)
    last = lines(folder / "digits_mlp_adam_last_layer.jsonl")
    assert [r["seed"] for r in last] == [1, 2]
    assert all(r["precision"] > 0 for r in last)
    (ensemble,) = lines(folder / "digits_mlp_adam_ensemble.jsonl")
    assert ensemble["test"]["accuracy"] >= 0
    curve = lines(folder / "active_bald.jsonl")[0]
    assert curve["labelled"] == [10, 15] and len(curve["nll"]) == 2


def test_page(folder):
    page = (folder / "page.md").read_text()
    for name in ("reliability", "shift", "active", "regression"):
        assert f"{name}.png" in page
        assert (folder / f"{name}.png").stat().st_size > 1000
    assert (folder / "runs.parquet").exists()
    seeds = lines(folder / "digits_mlp_noisy_kfac.jsonl")[-2:]
    values = [r["test"]["nll"] for r in seeds]
    assert f"{np.mean(values):.4f} ± {scipy.stats.sem(values):.4f}" in page
    facts = json.loads((folder / "summary.json").read_text())
    assert facts["answer"] == report.answer(report.read_results(folder))


def test_finished_runs_are_not_run_again(folder):
    before = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
    assert main([*ARGUMENTS, "--out", str(folder)]) == 0
    assert before == {path: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_report_prints_table_and_answer(folder, console: Console):
    report.save_report(configs.BayesReport(folder), console)
    text = console.file.getvalue()  # pyright: ignore
    assert "| digits | mlp | noisy K-FAC | 2 |" in text
    assert "On digits with mlp" in text


def test_what_is_made_of_others_weights_wants_them(tmp_path, capsys):
    arguments = ["study", "bayes", "--size", "tiny", "--out", str(tmp_path)]
    assert main([*arguments, "--only", "digits_mlp_adam_ensemble"]) == 2
    assert "run first" in " ".join(capsys.readouterr().err.split())


def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert main(["study", "bayes-report", "--folder", str(tmp_path)]) == 2
    assert "holds no results" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "wrong", [["--epochs", "0"], ["--severities", "-1"], ["--only", "x"]], ids=str
)
def test_wrong_values_are_told(wrong, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, *wrong, "--out", str(tmp_path)])
    assert stopped.value.code == 2


@pytest.mark.slow
def test_every_method(tmp_path):
    """The whole tiny study."""
    arguments = ["study", "bayes", "--size", "tiny", "--out", str(tmp_path)]
    assert main(arguments) == 0
    for cell in config.TINY.all_cells():
        assert lines(tmp_path / f"{cell.name}.jsonl")
    for name in configs.FURTHER:
        assert lines(tmp_path / f"{name}.jsonl")
    page = (tmp_path / "page.md").read_text()
    for title in report.TITLES.values():
        assert title in page
