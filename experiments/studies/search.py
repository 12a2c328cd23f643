"""Searches by Optuna whose finished trials are records of a study.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization", NeurIPS.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

Record = dict[str, Any]


def ask(
    space: Mapping[str, Any],
    known: Sequence[Record],
    score: Callable[[Record], float],
    usual: Mapping[str, Any],
    startup: int,
    seed: int = 0,
    pruner: optuna.pruners.BasePruner | None = None,
    maximize: bool = False,
) -> optuna.Trial:
    """The next trial of a search.

    What is drawn depends on the trials before alone, so that a search can go on where
    it was. The first trial has the usual values, the next ones random values.
    """
    study = optuna.create_study(
        direction="maximize" if maximize else "minimize",
        sampler=optuna.samplers.TPESampler(
            seed=seed + len(known), n_startup_trials=startup
        ),
        pruner=pruner or optuna.pruners.NopPruner(),
    )
    for record in known:
        # Of a diverged run, only the value: its measurements are not its best.
        seen = () if record.get("diverged") else record.get("accuracy", ())
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED
                if record.get("pruned")
                else TrialState.COMPLETE,
                params={name: record["values"][name] for name in space},
                distributions=dict(space),
                value=score(record),
                intermediate_values=dict(enumerate(seen, start=1)),
            )
        )
    if not known:
        study.enqueue_trial(dict(usual))
    return study.ask(dict(space))
