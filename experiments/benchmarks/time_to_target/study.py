"""The study: targets, searches, seeds; every finished run is a line of the records.

For each task:

1. SGD and AdamW are searched with half of their trials, with the whole budget as
   horizon, for the lowest held-out loss that a run has anywhere. The lowest of all,
   plus a slack, is the target; it is fixed from then on.
2. Every optimiser is searched with equally many trials for the fewest steps to the
   target, by the tree-structured Parzen estimator. Of SGD and AdamW the trials of the
   first part count, scored anew.
3. The best trial of each is run with further seeds until the target or the end of the
   budget; for each seed, all optimisers one after the other.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization", NeurIPS;
    Dahl et al., 2023, arXiv:2306.07179 (AlgoPerf: time to a target that is fixed).
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optuna
from rich.console import Console
from rich.progress import Progress

from experiments import metrics
from experiments.benchmarks.common import machine
from experiments.benchmarks.time_to_target import problem
from experiments.benchmarks.time_to_target.config import (
    FIRST_ORDER,
    OptimiserName,
    Study,
    TaskName,
    space_of,
)
from experiments.errors import MetricsError

STARTUP_TRIALS = 3
SEARCH_SEED = 0
Record = dict[str, Any]


class Records:
    """The file of the records: what is there, and what is added."""

    def __init__(self, study: Study):
        self.study, rung = study, study.rung
        metrics.keep_until(study.lines, max(t.steps for t in rung.tasks.values()))
        forget(study.lines, study.redo)
        self.found: dict[tuple[Any, ...], Record] = {}
        for record in metrics.read_records(study.lines):
            wanted = facts(study, record["task"], record.get("optimiser"))
            if any(record[name] != value for name, value in wanted.items()):
                raise MetricsError(
                    f"{study.lines} holds runs of another configuration "
                    f"({record['task']}, {record.get('optimiser')}): "
                    f"{[record[n] for n in wanted]}, not {list(wanted.values())}. Give "
                    "another folder with --out, or --redo that optimiser."
                )
            self.found[key_of(record)] = record
        self.file = metrics.MetricsFile(study.lines)
        self.machine = machine()

    def get(self, make: Callable[[], Record], **key: Any) -> Record:
        """A record that is there, or a new one."""
        record = self.found.get(key_of(key))
        if record is None:
            same = facts(self.study, key["task"], key.get("optimiser"))
            values = same | key | make()
            kind = values.pop("kind")
            record = {"kind": kind, **metrics.to_json(values)}
            step = record.get("curve", [{"step": 0}])[-1]["step"]
            record["machine"] = self.machine
            fields = {k: v for k, v in record.items() if k != "kind"}
            self.file.append(kind, step, **fields)
            self.found[key_of(key)] = record
        return record

    def close(self) -> None:
        self.file.close()


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(k) for k in ("kind", "task", "optimiser", "number"))


def forget(path: Path, names: Sequence[str]) -> None:
    """Drops the records of some optimisers."""
    records = metrics.read_records(path)
    kept = [r for r in records if r.get("optimiser") not in names]
    if len(kept) < len(records):
        content = "".join(json.dumps(record) + "\n" for record in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(content)
        os.replace(temporary, path)


def facts(study: Study, task: TaskName, optimiser: str | None) -> Record:
    """What must be the same for all records of an optimiser on a task."""
    return {
        "size": study.size,
        "fingerprint": study.rung.tasks[task].fingerprint(optimiser),
        "slack": study.slack,
    }


class TaskRun:
    """A task of the study, with the programs compiled so far."""

    def __init__(self, study: Study, name: TaskName, records: Records, tell: Callable):
        self.study, self.records, self.tell = study, records, tell
        self.name: TaskName = name
        self.size = study.rung.tasks[name]
        self.programs: dict[str, problem.Program] = {}
        self.problem: problem.Problem | None = None

    def loaded(self) -> problem.Problem:
        if self.problem is None:
            self.problem = problem.make_problem(self.size, self.study.data_dir)
        return self.problem

    def program(self, optimiser: OptimiserName) -> problem.Program:
        if optimiser not in self.programs:
            names = tuple(space_of(self.name, optimiser).distributions())
            made = problem.make_program(optimiser, self.loaded(), names)
            self.programs[optimiser] = made
        return self.programs[optimiser]

    def run(
        self,
        kind: str,
        optimiser: OptimiserName,
        number: int,
        values: Record,
        target: float | None,
    ) -> Record:
        """A run, new or from the records."""

        def make():
            seed = SEARCH_SEED if kind == "trial" else number
            program, start = self.program(optimiser), time.perf_counter()
            result = problem.train(self.loaded(), program, values, seed, target)
            self.tell(
                f"{self.name}, {optimiser}, {kind} {number}: "
                f"{result['curve'][-1]['step']} steps, best {result['best_loss']}, "
                f"{time.perf_counter() - start:.1f} s"
            )
            data = self.loaded().data
            source = re.sub(r"\S*/", "", data.source)
            found = {"title": data.title, "source": source}
            return {"values": values, "data": found, **result}

        key = {"task": self.name, "optimiser": optimiser, "number": number}
        return self.records.get(make, kind=kind, **key)

    def target(self) -> float:
        """Searches the first-order optimisers for the lowest loss; fixes the target."""
        early = [run for name in FIRST_ORDER for run in self.lowest(name)]

        def make():
            best = min(
                (r for r in early if r["best_loss"] is not None),
                key=lambda r: r["best_loss"],
            )
            lowest = best["best_loss"]
            self.tell(f"{self.name}: lowest first-order loss {lowest:.5g}")
            return {
                "target": lowest + self.study.slack * abs(lowest),
                "lowest": lowest,
                "set_by": best["optimiser"],
                "trial": best["number"],
            }

        return self.records.get(make, kind="target", task=self.name)["target"]

    def lowest(self, optimiser: OptimiserName) -> list[Record]:
        """The first half of a first-order optimiser's trials, for the lowest loss."""
        search = optuna.create_study(direction="minimize")
        runs = []
        for number in range(self.study.rung.trials // 2):
            usual = space_of(self.name, optimiser).usual if number == 0 else {}
            search.enqueue_trial({**usual, "horizon": 1.0})
            trial = ask(self.name, optimiser, search, number)
            runs.append(self.run("trial", optimiser, number, trial.params, None))
            found = runs[-1]["best_loss"]
            search.tell(trial, 1e6 if found is None else min(found, 1e6))
        return runs

    def fastest(self, optimiser: OptimiserName, target: float) -> Record:
        """Searches for the fewest steps to the target."""
        search = optuna.create_study(direction="minimize")
        runs = self.lowest(optimiser) if optimiser in FIRST_ORDER else []
        space = space_of(self.name, optimiser)
        for run in runs:
            known = optuna.trial.create_trial(
                params=run["values"],
                distributions=space.distributions(),
                value=problem.score(run, target, self.size.steps),
            )
            search.add_trial(known)
        if not runs:
            search.enqueue_trial({**space.usual, "horizon": 0.5})
        for number in range(len(runs), self.study.rung.trials):
            trial = ask(self.name, optimiser, search, number)
            runs.append(self.run("trial", optimiser, number, trial.params, target))
            search.tell(trial, problem.score(runs[-1], target, self.size.steps))
        return min(runs, key=lambda r: problem.score(r, target, self.size.steps))


def ask(
    task: TaskName, optimiser: OptimiserName, search: optuna.Study, number: int
) -> optuna.Trial:
    """Draws a trial; what it draws depends on the trials before alone."""
    search.sampler = optuna.samplers.TPESampler(
        seed=1000 + number, n_startup_trials=STARTUP_TRIALS
    )
    return search.ask(space_of(task, optimiser).distributions())


def run_study(study: Study, console: Console) -> Path:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rung, shown = study.rung, console.is_terminal
    each = rung.trials + rung.seeds
    with (
        contextlib.closing(Records(study)) as records,
        Progress(console=console, disable=not shown) as bar,
    ):
        total = len(study.tasks) * len(study.optimisers) * each
        whole = bar.add_task("runs", total=total)

        def tell(text: str) -> None:
            done = sum(key[0] in ("trial", "seed") for key in records.found)
            bar.update(whole, completed=done, description=text[:40])
            console.print(f"[{done}/{total}] {text}", soft_wrap=True, markup=False)

        for name in study.tasks:
            if name in rung.tasks:
                run_task(TaskRun(study, name, records, tell))
                jax.clear_caches()
    return study.lines


def run_task(task: TaskRun) -> None:
    """Target, searches and seeds of a task."""
    target, winners = task.target(), {}
    for optimiser in task.study.optimisers:
        try:
            winners[optimiser] = task.fastest(optimiser, target)
        except (ImportError, problem.MissingError) as error:
            task.tell(f"{task.name}, {optimiser}: missing, {error}")
            key = {"kind": "missing", "task": task.name, "optimiser": optimiser}
            task.records.get(lambda why=str(error): {"reason": why}, **key)
    for seed in range(1, task.study.rung.seeds + 1):
        for optimiser, best in winners.items():
            task.run("seed", optimiser, seed, best["values"], target)
