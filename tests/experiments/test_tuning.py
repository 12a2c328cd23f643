"""Spaces, many trials as one program, and the command end to end."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from experiments.benchmarks import mapped_trials
from experiments.configs import NetConfig
from experiments.configs.tune import TUNED, CurvatureConfig, TuneConfig, default_tuning
from experiments.datasets import batches, load
from experiments.errors import ConfigError
from experiments.main import main, parse
from experiments.tuning.optimisers import make_rule, rate_at
from experiments.tuning.spaces import Choice, Linear, Log, usual_of
from experiments.tuning.trials import Program, in_loop, make_problem, stacked
from tests.experiments.tuning import OPTIONS, records, tiny
from tests.helpers import cases

COLUMNS = {
    "sgd": {"momentum", "weight_decay"},
    "adam": {"beta1"},
    "adamw": {"beta1", "weight_decay"},
    "muon": {"momentum", "weight_decay"},
    "kfac": {"momentum", "weight_decay", "factor_decay", "damping"},
}


@pytest.mark.parametrize("name", TUNED)
def test_spaces_draw_within_their_ranges(name):
    config = default_tuning()
    space = dataclasses.replace(config, optimizer=name).space
    ranges = space.ranges()
    assert set(ranges) == {"learning_rate", "lr_decay", "decay_epoch"} | COLUMNS[name]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [study.ask(space.distributions()).params for _ in range(50)]
    for values in (*drawn, space.usual()):
        assert set(values) == set(ranges)
        for key, value in values.items():
            assert ranges[key].low <= value <= ranges[key].high
    # Log ranges over several decades: half of the draws lie below the middle decade.
    rates = [values["learning_rate"] for values in drawn]
    middle = np.sqrt(space.learning_rate.low * space.learning_rate.high)
    assert 15 <= sum(rate < middle for rate in rates) <= 35


def test_usual_values_are_moved_into_the_range():
    assert usual_of(Log(0.1, 1.0, 0.01)) == 0.1
    assert usual_of(Linear(0.0, 0.5, 0.9)) == 0.5
    assert usual_of(Choice((0.9, 0.99), 0.95)) == 0.9
    assert usual_of(Log(0.1, 1.0)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Log(0.0, 1.0), "low is 0.0; wanted a finite number > 0"),
        (lambda: Linear(1.0, 0.5), "high is 0.5; wanted a finite number >= 1.0"),
        (lambda: Choice(()), "values is empty"),
        (lambda: TuneConfig(optimizer="lion"), "optimizer is 'lion'; wanted one of"),
        (lambda: TuneConfig(batch=0), "batch is 0; wanted an integer >= 1"),
        (lambda: TuneConfig(grace=15), "grace is 15; wanted at least twice"),
        (lambda: TuneConfig(worker=-1), "worker is -1"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_ranges_of_decays_end_below_one():
    space = TuneConfig().sgd
    with pytest.raises(ConfigError, match="momentum is 1.0; wanted .* < 1"):
        dataclasses.replace(space, momentum=Linear(0.5, 1.0))


def test_mapping():
    kfac = TuneConfig(optimizer="kfac")
    assert in_loop(kfac) and not in_loop(dataclasses.replace(kfac, mapping="vmap"))
    sgd = TuneConfig(optimizer="sgd")
    assert not in_loop(sgd) and in_loop(dataclasses.replace(sgd, mapping="loop"))


def test_command_line():
    config = parse(
        ["tune", "--dataset", "digits", "--optimizer", "adam"]
        + ["--adam.beta1.low", "0.8", "--adam.beta1.high", "0.8"]
    )
    assert isinstance(config, TuneConfig)
    assert config.batch_size == 100 and config.net.hidden == (128, 128)
    assert config.space.usual()["beta1"] == 0.8
    # What decides nothing about a trial does not decide the study either.
    other = dataclasses.replace(config, worker=3, trials=7, storage="x://y", batch=2)
    assert other.name() == config.name()
    assert dataclasses.replace(config, epochs=3).name() != config.name()
    sgd = dataclasses.replace(config.sgd, weight_decay=Log(1e-3, 1e-2))
    assert dataclasses.replace(config, sgd=sgd).name() == config.name()


def test_examples_are_held_out_of_the_training_set(tmp_path):
    problem = make_problem(tiny(tmp_path))
    whole = load("digits")
    assert len(problem.data.x_train) == 160 and len(problem.held[0]) == 40
    assert problem.steps == 16 and problem.every == 4
    seen = {x.tobytes() for x in problem.data.x_train}
    held = {x.tobytes() for x in problem.held[0]}
    assert held <= {x.tobytes() for x in whole.x_train}
    assert not held & seen and not held & {x.tobytes() for x in whole.x_test}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation_examples": 190}, "validation-examples is 190; .* has 200"),
        ({"evaluations": 17}, "evaluations is 17; a trial has only 16 steps"),
    ],
)
def test_too_few_examples(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        make_problem(tiny(tmp_path, **values))


def test_learning_rate_decays_once():
    values = {"learning_rate": 0.4, "lr_decay": 0.1, "decay_epoch": 0.5}
    rates = [float(rate_at(values, n, 10)) for n in (0, 4, 5, 9)]
    assert rates == pytest.approx([0.4, 0.4, 0.04, 0.04])


def drawn(config, count):
    """Some draws, after the usual values."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    more = [study.ask(config.space.distributions()).params for _ in range(count - 1)]
    return [config.space.usual(), *more]


def curves(program, trials, seeds):
    """Held-out losses ``[evaluations, trials]`` of a program."""
    values = stacked(trials, program.count)
    carry, losses = program.start(values, seeds), []
    for number in range(0, program.problem.steps, program.problem.every):
        carry, batch_losses = program.advance(carry, values, number)
        assert batch_losses.shape == (program.problem.every, program.count)
        losses.append(program.evaluate(carry)["loss"])
    return np.array(losses)


def curve_alone(problem, values, seed):
    """The same of one trial, step by step and without `vmap`."""
    config = problem.config
    rule = make_rule(config, problem.task, problem.example())
    values = {name: jnp.float32(value) for name, value in values.items()}
    params, model_state = problem.task.init(jax.random.key(seed))
    carry = params, model_state, rule.init(params, values)
    key, losses = jax.random.key(config.seed + 1), []

    @jax.jit
    def step(carry, number, batch):
        rate = rate_at(values, number, problem.steps)
        return rule.step(carry, values, rate, batch, jax.random.fold_in(key, number))

    seen = batches(problem.data, config.batch_size, config.seed, 0, problem.steps)
    for number, batch in enumerate(seen):
        carry, _ = step(carry, number, batch)
        if (number + 1) % problem.every == 0:
            sums = problem.task.evaluate(*carry[:2], *problem.held)
            losses.append(float(sums["loss"]) / len(problem.held[0]))
    return losses


@pytest.mark.parametrize(
    ("name", "mapping"),
    cases(
        [*((name, "vmap") for name in TUNED), ("kfac", "auto")],
        [("sgd", "vmap"), ("adamw", "vmap"), ("kfac", "vmap")],
    ),
)
def test_mapped_trials_are_those_trained_one_by_one(tmp_path, name, mapping):
    problem = make_problem(tiny(tmp_path, optimizer=name, mapping=mapping))
    trials, seeds = drawn(problem.config, 3), [0, 1, 1]
    found = curves(Program(problem, 3), trials, seeds)
    alone = [curve_alone(problem, *pair) for pair in zip(trials, seeds, strict=True)]
    np.testing.assert_allclose(found, np.array(alone).T, rtol=2e-3)
    # They do differ from one another, and they learn.
    assert len(np.unique(found[-1])) == 3 and found[-1, 0] < found[0, 0]


def test_sampled_fisher_with_the_same_labels(tmp_path):
    curvature = CurvatureConfig(fisher="mc")
    config = tiny(tmp_path, optimizer="kfac", curvature=curvature, mapping="vmap")
    problem = make_problem(config)
    trials = drawn(problem.config, 2)
    found = curves(Program(problem, 2), trials, [0, 0])
    alone = [curve_alone(problem, values, 0) for values in trials]
    np.testing.assert_allclose(found, np.array(alone).T, rtol=2e-3)


@pytest.mark.parametrize("name", cases(TUNED, ["sgd", "kfac"]))
def test_a_diverging_trial_leaves_the_others_alone(tmp_path, name):
    # The trust region would keep K-FAC's step finite.
    curvature = CurvatureConfig(kl_clip=None)
    problem = make_problem(
        tiny(tmp_path, optimizer=name, curvature=curvature, mapping="vmap")
    )
    usual = problem.config.space.usual()
    wild = usual | {"learning_rate": 1e38}
    program = Program(problem, 2)
    with_it = curves(program, [usual, wild], [0, 0])
    without = curves(program, [usual, usual], [0, 0])
    assert not np.isfinite(with_it[-1, 1]) or with_it[-1, 1] > 1e3
    np.testing.assert_array_equal(with_it[:, 0], without[:, 0])


def test_one_compilation(tmp_path):
    """Other values, other seeds and later steps run the program there is."""
    problem = make_problem(tiny(tmp_path, optimizer="kfac"))
    program = Program(problem, 2)
    trials = drawn(problem.config, 4)
    curves(program, trials[:2], [0, 0])
    assert program.run._cache_size() == 1  # pyright: ignore
    curves(program, trials[2:], [5, 6])
    assert program.run._cache_size() == 1  # pyright: ignore


@pytest.mark.slow
def test_convolutions_and_batch_norm(tmp_path):
    """A model state, and layers whose kernels differ from trial to trial."""
    net = NetConfig(blocks=(1,), width=4)
    problem = make_problem(tiny(tmp_path, model="resnet", net=net, optimizer="kfac"))
    trials = drawn(problem.config, 2)
    found = curves(Program(problem, 2), trials, [0, 0])
    alone = [curve_alone(problem, values, 0) for values in trials]
    np.testing.assert_allclose(found, np.array(alone).T, rtol=5e-3)


def test_end_to_end(tmp_path, capsys):
    options = [*OPTIONS, "--workdir", str(tmp_path), "--startup-trials", "2"]
    command = ["tune", "--trials", "5", "--batch", "3", *options]
    assert main(command) == 0
    found = records(tmp_path)
    assert [r["number"] for r in found] == [0, 1, 2, 3, 4]
    assert found[0]["values"] == TuneConfig().kfac.usual()
    for record in found:
        assert [p["step"] for p in record["curve"]] == [4, 8, 12, 16]
        assert record["objective"] == record["curve"][-1]["loss"]
        assert 0 <= record["measured"]["accuracy"] <= 1
        assert record["worker"] == 0 and record["retry_of"] == []
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["objective"] == min(r["objective"] for r in found)
    assert best["config"]["data"]["held_out"] == 40
    for plot in ("objective.png", "slices.png"):
        assert (tmp_path / plot).stat().st_size > 1000
    assert "kfac on digits, mlp: best trials" in capsys.readouterr().out
    # Nothing is left to do; more trials go on where it ended.
    assert main(command) == 0
    assert records(tmp_path) == found
    assert main(["tune", "--trials", "6", "--batch", "3", *options]) == 0
    assert records(tmp_path)[:5] == found and len(records(tmp_path)) == 6


def test_wrong_options_are_told(tmp_path, capsys):
    options = [*OPTIONS, "--workdir", str(tmp_path), "--trials", "1"]
    assert main(["tune", *options, "--validation-examples", "190"]) == 2
    assert "validation-examples is 190" in capsys.readouterr().err
    assert main(["tune", *options, "--model", "lm"]) == 2
    assert "lm wants a text" in capsys.readouterr().err


def test_benchmark_of_mapped_trials(tmp_path, capsys):
    argv = ["--datasets", "digits", "--optimizers", "sgd", "--epochs", "1"]
    argv += ["--count", "2", "--rounds", "1", "--out", str(tmp_path)]
    result = mapped_trials.main(argv)
    row = result["rows"]["digits, sgd"]
    together, alone = row["seconds_together"][1], row["seconds_one_by_one"][1]
    assert row["speedup"][1] == pytest.approx(alone / together)
    assert row["steps"] == 8 and row["largest_relative_difference"] < 1e-2
    assert json.loads((tmp_path / "mapped_trials.json").read_text())["rows"]
    assert "one by one" in capsys.readouterr().out
