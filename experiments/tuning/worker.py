"""One worker of a search: asks for trials, trains them together, tells the results."""

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from experiments import metrics
from experiments.configs.tune import TuneConfig
from experiments.tuning.results import save_report, write_trials
from experiments.tuning.store import TAKEN, Claims, StorageError, working
from experiments.tuning.trials import Problem, Program, make_problem, stacked

POLL = 5.0
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclasses.dataclass
class Lane:
    """A trial among those that are trained together."""

    trial: optuna.Trial  # to report to
    loss: float = math.inf  # the last held-out loss; infinite once one was not finite
    # What else was evaluated last, by name.
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    pruned: bool = False  # whether it is worse than the median
    lost: bool = False  # whether another worker has taken it over

    def report(self, step: int, found: dict[str, float]) -> None:
        """Reports an evaluation and asks whether to go on."""
        self.measured = found
        loss = found["loss"]
        self.loss = loss if math.isfinite(loss) else math.inf
        try:
            self.trial.report(self.loss, step)
            self.pruned = self.trial.should_prune()
        except optuna.exceptions.UpdateFinishedTrialError:
            self.lost = True

    @property
    def ended(self) -> bool:
        """Whether nothing is reported any more."""
        return self.pruned or self.lost

    def tell(self, study: optuna.Study, facts: dict[str, Any]) -> None:
        if self.lost:
            return
        try:
            for name, value in facts.items():
                self.trial.set_user_attr(name, value)
            self.trial.set_user_attr("measured", metrics.to_json(self.measured))
        except optuna.exceptions.UpdateFinishedTrialError:
            return
        if self.pruned:
            study.tell(self.trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            study.tell(self.trial, self.loss, skip_if_finished=True)


def search(config: TuneConfig, console: Console) -> Path:
    """Works on a study until all its trials are finished, and reports."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = make_problem(config)
    count, noun = len(problem.data.x_train), problem.data.noun
    console.print(
        f"Data: {problem.data.title}, {count} {noun} to train, "
        f"{len(problem.held[0])} held out, {problem.data.source}",
        soft_wrap=True,
        highlight=False,
    )
    identity = problem.identity()
    with working(config), contextlib.closing(Claims(config, identity)) as claims:
        console.print(f"Study: {config.name()}, in {config.folder()}", soft_wrap=True)
        try:
            work(claims, problem, console)
        except optuna.exceptions.StorageInternalError as error:
            raise StorageError(
                f"The storage was lost ({error.__cause__}). The same command goes on "
                "when it is back."
            ) from error
        save_report(claims.study, config, identity, console)
    return config.folder()


def work(claims: Claims, problem: Problem, console: Console) -> None:
    """Trains batches of trials until none is left, of this worker or another."""
    config = claims.config
    program = Program(problem, min(config.batch, config.trials))
    with progress_bars(console) as bars:
        total = max(config.trials, len(claims.trials(*TAKEN)))
        whole = bars.add_task("trials", total=total, text="")
        part = bars.add_task("evaluations", total=config.evaluations, text="")
        while True:
            again = claims.recover()
            if again:
                line = f"{again} trials of workers that ended are queued again"
                console.print(line, highlight=False)
            bars.update(whole, completed=len(claims.trials(*FINISHED)))
            trials = claims.ask()
            if trials:
                bars.update(part, completed=0, text="compiling or training")
                lanes = train(claims, program, trials, lambda: bars.advance(part))
                write_trials(claims.study, config, problem.identity())
                tell_user(claims, lanes, console)
            elif claims.trials(TrialState.RUNNING):
                bars.update(part, text="waiting for other workers")
                time.sleep(min(POLL, config.heartbeat))
            else:
                return


def progress_bars(console: Console) -> Progress:
    """Bars of trials and evaluations; none where there is no terminal."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=not console.is_terminal,
    )


def train(
    claims: Claims, program: Program, trials: list[optuna.Trial], advanced: Any
) -> list[Lane]:
    """Trains some trials together and tells what came of them.

    Trials are told in their order, when all have ended: what the sampler proposes next
    then depends on finished batches alone, however often a worker is killed.

    Args:
        claims: the study.
        program: trains at least as many at once.
        trials: the trials.
        advanced: called after every evaluation.

    Returns:
        The trials with their results.
    """
    problem, config = program.problem, claims.config
    lanes = [Lane(trial) for trial in trials]
    values = stacked([trial.params for trial in trials], program.count)
    seeds = [start_seed(config, trial) for trial in trials]
    seeds += seeds[-1:] * (program.count - len(seeds))
    began, number = time.perf_counter(), 0
    with claims.heartbeats([trial.number for trial in trials]):
        carry = program.start(values, seeds)
        while number < problem.steps and not all(lane.ended for lane in lanes):
            carry, _ = program.advance(carry, values, number)
            number += problem.every
            found = program.evaluate(carry)
            for i, lane in enumerate(lanes):
                if not lane.ended:
                    here = {name: float(value[i]) for name, value in found.items()}
                    lane.report(number, here)
            advanced()
        seconds = time.perf_counter() - began
        facts = {
            "device": jax.devices()[0].device_kind,
            "together": len(lanes),
            "seconds_together": seconds,
        }
        for lane in lanes:
            lane.tell(claims.study, facts)
    return lanes


def start_seed(config: TuneConfig, trial: optuna.Trial) -> int:
    """The seed of a trial's initial parameters."""
    if config.common_start:
        return config.seed
    entropy = [config.seed, trial.user_attrs["place"]]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def tell_user(claims: Claims, lanes: list[Lane], console: Console) -> None:
    finished = claims.trials(*FINISHED)
    best = min((t.value for t in finished if t.value is not None), default=math.inf)
    pruned = sum(lane.pruned for lane in lanes)
    lowest = min(lane.loss for lane in lanes)
    console.print(
        f"[{len(finished)}/{claims.config.trials}] {len(lanes)} trials, {pruned} "
        f"pruned, lowest held-out loss {lowest:.4g}; of all {best:.4g}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
