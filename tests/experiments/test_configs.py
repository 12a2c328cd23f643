"""Configurations: what is refused, and what identifies a run."""

import dataclasses
import itertools

import pytest

from experiments.configs import (
    DATASETS,
    MODELS,
    AdamConfig,
    AdamWConfig,
    KFACConfig,
    NetConfig,
    ScheduleConfig,
    SGDConfig,
    TrainConfig,
    default_config,
)
from experiments.errors import ConfigError
from experiments.main import main, parse
from experiments.optimizers import make_momentum, make_schedule


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (TrainConfig, {"dataset": "imagenet"}, "dataset is 'imagenet'; wanted one of"),
        (TrainConfig, {"model": "vgg"}, "model is 'vgg'"),
        (TrainConfig, {"optimizers": ()}, "optimizers is empty"),
        (TrainConfig, {"optimizers": ("kfac", "lion")}, "optimizers is 'lion'"),
        (TrainConfig, {"optimizers": ("sgd", "sgd")}, "a name twice"),
        (TrainConfig, {"epochs": 0}, "epochs is 0; wanted an integer >= 1"),
        (TrainConfig, {"batch_size": 2.5}, "batch-size is 2.5"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
        (TrainConfig, {"train_examples": 0}, "train-examples is 0"),
        (TrainConfig, {"log_every": True}, "log-every is True"),
        (NetConfig, {"hidden": (10, 0)}, "net.hidden is 0"),
        (NetConfig, {"code": ()}, "at least one number"),
        (ScheduleConfig, {"kind": "step"}, "schedule.kind is 'step'"),
        (ScheduleConfig, {"final_scale": 0.0}, "final-scale is 0.0; wanted .* > 0"),
        (
            ScheduleConfig,
            {"kind": "polynomial", "final_scale": -0.1},
            "final-scale is -0.1; wanted .* >= 0",
        ),
        (ScheduleConfig, {"power": 0.0}, "schedule.power is 0.0; wanted .* > 0"),
        (TrainConfig, {"augment": "cutout"}, "augment is 'cutout'; wanted one of"),
        (TrainConfig, {"mixup_alpha": -1.0}, "mixup-alpha is -1.0; wanted .* >= 0"),
        (
            TrainConfig,
            {"dataset": "pydoc", "mixup_alpha": 0.4},
            "augment is none and mixup-alpha 0.4; wanted none and 0, because pydoc",
        ),
        (
            KFACConfig,
            {"damping_schedule": ScheduleConfig("polynomial", final_scale=0.0)},
            "kfac.damping-schedule.final-scale is 0.0; wanted .* > 0",
        ),
        (SGDConfig, {"momentum": 1.0}, "sgd.momentum is 1.0; wanted .* >= 0 and < 1"),
        (AdamConfig, {"learning_rate": float("nan")}, "adam.learning-rate is nan"),
        (AdamWConfig, {"weight_decay": -0.1}, "adamw.weight-decay is -0.1"),
        (KFACConfig, {"damping": 0.0}, "kfac.damping is 0.0"),
        (KFACConfig, {"kl_clip": -1.0}, "kfac.kl-clip is -1.0"),
        (KFACConfig, {"factor_decay": 1.0}, "kfac.factor-decay is 1.0"),
        (KFACConfig, {"inverse": "svd"}, "kfac.inverse is 'svd'"),
        (KFACConfig, {"every": 0}, "kfac.every is 0"),
        (KFACConfig, {"max_interval": 0}, "kfac.max-interval is 0"),
        (
            KFACConfig,
            {"damping_schedule": ScheduleConfig(warmup_steps=5)},
            "the damping must stay positive",
        ),
    ],
)
def test_wrong_values(make, values, message):
    with pytest.raises(ConfigError, match=message):
        make(**values)


@pytest.mark.parametrize(
    ("dataset", "model"), list(itertools.product(DATASETS, MODELS))
)
def test_defaults_are_valid(dataset, model):
    config = default_config(dataset, model)
    assert (config.dataset, config.model) == (dataset, model)
    assert hash(config) == hash(default_config(dataset, model))


def test_command_line():
    arguments = ["train", "--dataset", "mnist", "--model", "autoencoder"]
    config = parse([*arguments, "--kfac.damping", "0.5", "--optimizers", "kfac", "sgd"])
    assert isinstance(config, TrainConfig)
    assert config.kfac.damping == 0.5
    assert config.optimizers == ("kfac", "sgd")
    # What is not given is the default of that data set and model.
    assert config.batch_size == default_config("mnist", "autoencoder").batch_size


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "--dataset", "imagenet"],
        ["train", "--kfac.damping", "-1"],
        ["train", "--no-such-option", "1"],
    ],
    ids=" ".join,
)
def test_bad_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err


def test_errors_are_one_line(capsys):
    assert main(["train", "--dataset", "digits", "--model", "lenet5"]) == 2
    assert capsys.readouterr().err.startswith("error: lenet5 wants images of at least")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(KFACConfig):
        assert field.name.replace("_", "-") in text


def test_folder_is_that_of_the_curve(tmp_path):
    config = default_config()
    same = dataclasses.replace(config, optimizers=("kfac",), data_dir=tmp_path)
    other = dataclasses.replace(config, kfac=KFACConfig(damping=0.123))
    assert config.folder() == same.folder() != other.folder()
    assert config.run_dict("sgd") == other.run_dict("sgd")
    assert config.run_dict("kfac") != other.run_dict("kfac")


@pytest.mark.parametrize(
    "kind", ["constant", "linear", "cosine", "exponential", "polynomial"]
)
def test_schedules(kind):
    config = ScheduleConfig(kind, warmup_steps=10, final_scale=0.1)
    schedule = make_schedule(2.0, config, total_steps=110)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(1.0)
    assert float(schedule(10)) == pytest.approx(2.0)
    last = 2.0 if kind == "constant" else 0.2
    assert float(schedule(110)) == pytest.approx(last, rel=1e-5)


def test_polynomial_schedule_and_the_momentum_tied_to_it():
    """``η₀ (1 − (t − t_start) / (t_end − t_start))^p`` behind the warm-up."""
    decay = ScheduleConfig("polynomial", warmup_steps=10, final_scale=0.0, power=3.5)
    config = KFACConfig(learning_rate=0.3, schedule=decay, momentum=0.97)
    rate = make_schedule(config.learning_rate, decay, total_steps=110)
    momentum = make_momentum(dataclasses.replace(config, tie_momentum=True), 110)
    for t in (0, 3, 10, 11, 60, 109, 110, 200):
        wanted = t / 10 if t < 10 else (1 - (min(t, 110) - 10) / 100) ** 3.5
        assert float(rate(t)) == pytest.approx(0.3 * wanted, rel=1e-4, abs=1e-7)
        assert float(momentum(t)) == pytest.approx(0.97 * wanted, rel=1e-4, abs=1e-7)
    assert make_momentum(config, 110) == 0.97


def test_checkpoints_lie_on_records():
    config = TrainConfig(log_every=30, checkpoint_every=100)
    assert config.checkpoint_steps == 120
