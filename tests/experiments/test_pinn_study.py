"""The PINN study: its residuals against formulas, a whole tiny study, its page."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.main import main
from experiments.studies.pinn import config as configs
from experiments.studies.pinn import report, run

SMALLEST = dataclasses.replace(
    configs.TINY, width=4, interior=2, boundary=1, step_sizes=3, seconds=1e-3
)
ARGUMENTS = ["study", "pinn", "--size", "tiny", "--width", "4", "--interior", "2"]
ARGUMENTS += ["--boundary", "1", "--step-sizes", "3", "--seconds", "1e-3"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_laplacian_is_the_trace_of_the_hessian():
    with jax.enable_x64(True):
        params, (x, _, _) = run.start(SMALLEST, 0), run.points(SMALLEST)
        u = lambda y: run.network(params, y[None])[0]  # noqa: E731
        wanted = [jnp.trace(jax.hessian(u)(y)) for y in x]
        np.testing.assert_allclose(run.laplacian(params, x), wanted, rtol=1e-10)


def test_loss_of_the_solution_is_zero(monkeypatch):
    """And that of zero is the mean square of ``f``; the boundary adds nothing."""
    with jax.enable_x64(True):
        config = dataclasses.replace(SMALLEST, interior=64, boundary=3)
        batch = run.points(config)
        monkeypatch.setattr(run, "network", lambda _, x: run.solution(x))
        assert float(run.loss(None, *batch)) < 1e-25
        assert float(run.error(None)) == 0
        monkeypatch.setattr(run, "network", lambda _, x: 0 * x[:, 0])
        # The square of sin πx sin πy has the mean 1/4.
        np.testing.assert_allclose(
            run.loss(None, *batch), 0.5 * (2 * np.pi**2) ** 2 / 4, rtol=1e-10
        )
        monkeypatch.setattr(run, "network", lambda _, x: 1 + 0 * x[:, 0])
        more = run.loss(None, *batch) - 0.5 * (2 * np.pi**2) ** 2 / 4
        np.testing.assert_allclose(more, 0.5 * config.boundary_weight, rtol=1e-10)


@pytest.mark.parametrize("method", configs.METHODS)
def test_steps_lower_the_loss_of_the_equation(method):
    """From the same start, every method is a descent method here."""
    with jax.enable_x64(True):
        config = dataclasses.replace(SMALLEST, step_sizes=20)
        program = run.make_program(config, method)
        value = SMALLEST.settings(method)[-1]
        carry = program.start(0, value)
        before, _ = program.measure(carry)
        after, _ = program.measure(program.advance(carry, value))
    assert after < before


def test_best_step_is_the_best_of_those_tried():
    with jax.enable_x64(True):
        batch, params = run.points(SMALLEST), run.start(SMALLEST, 0)
        direction = jax.grad(run.loss)(params, *batch)
        found = run.best_step(SMALLEST, batch, params, direction)
        tried = [
            jax.tree.map(lambda p, d, r=rate: p - r * d, params, direction)
            for rate in (1.0, 0.5, 0.25)
        ]
        losses = [float(run.loss(p, *batch)) for p in tried]
        assert float(run.loss(found, *batch)) == pytest.approx(min(losses))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of a whole study of a moment."""
    out = tmp_path_factory.mktemp("pinn")
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return out


def test_every_method_has_its_trials_and_runs(folder):
    for method in configs.METHODS:
        records = lines(folder / f"{method}.jsonl")
        trials = [r for r in records if r["kind"] == "trial"]
        assert [r["value"] for r in trials] == list(SMALLEST.settings(method))
        best = min(trials, key=run.final)["value"]
        (other,) = [r for r in records if r["kind"] == "run"]
        assert (other["value"], other["seed"]) == (best, 0)
        for record in records:
            sizes = {len(record[k]) for k in ("steps", "seconds", "losses", "errors")}
            assert len(sizes) == 1
            assert record["steps"][1] == run.STEPS[method]
            assert record["step"] == record["steps"][-1]


def test_page_and_table(folder):
    page = (folder / "page.md").read_text()
    assert "errors.png" in page and (folder / "errors.png").stat().st_size > 1000
    assert (folder / "runs.parquet").exists()
    for method in configs.METHODS:
        record = lines(folder / f"{method}.jsonl")[-1]
        assert report.TITLES[method][0] in page
        assert f"{record['errors'][-1]:.1e}" in page
    assert "| boundary\\_weight | 100 |" in page or "| boundary_weight | 100 |" in page


def test_finished_runs_are_not_run_again(folder):
    before = (folder / "dual.jsonl").read_bytes()
    assert main([*ARGUMENTS, "--only", "dual", "--out", str(folder)]) == 0
    assert (folder / "dual.jsonl").read_bytes() == before


def test_seconds_to_an_error():
    record = {"seconds": [0.0, 1.0, 2.0, 3.0], "errors": [1.0, None, 0.01, 0.001]}
    assert report.seconds_to(record, 0.05) == 2.0
    assert np.isinf(report.seconds_to(record, 1e-5))
    assert np.isinf(run.final({"errors": [1.0, None]}))


def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert main(["study", "pinn-report", "--folder", str(tmp_path)]) == 2
    assert "holds no results" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "wrong", [["--seconds", "0"], ["--rates", "-1"], ["--width", "0"]], ids=str
)
def test_wrong_values_are_told(wrong, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, *wrong, "--out", str(tmp_path)])
    assert stopped.value.code == 2


def test_report_prints_the_table(folder, console: Console):
    report.save_report(configs.PinnReport(folder), console)
    assert "natural gradient (dual)" in console.file.getvalue()  # pyright: ignore
