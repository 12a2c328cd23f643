"""Which trials a worker trains, and what becomes of those whose worker died.

A worker asks for a batch of trials and claims each by writing its number into it. A
trial of a worker that is dead is failed and put back into the queue with its values. A
database tells by heartbeats who is dead. A journal file has none; there a worker holds
a lock in the run folder, which the system takes from it when it ends in any way.
"""

import contextlib
import copy
import datetime
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from experiments.configs.tune import TuneConfig
from experiments.errors import RunFolderError
from experiments.runfolder import locked
from experiments.tuning.store import (
    experimental,
    make_sampler,
    open_storage,
    open_study,
    retried,
    retry,
)

TAKEN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)


class Claims:
    """The trials of a study as one worker sees them."""

    def __init__(self, config: TuneConfig, identity: dict[str, Any]):
        """Opens the storage and the study."""
        self.config = config
        self.storage: BaseStorage = open_storage(config)
        self.study = open_study(config, self.storage, identity)
        self.study_id = self.storage.get_study_id_from_name(config.name())

    def close(self) -> None:
        """Ends the connections to a database."""
        if isinstance(self.storage, RDBStorage):
            self.storage.remove_session()
            self.storage.engine.dispose()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in some states, all if none is given, in order."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def ask(self) -> list[optuna.Trial]:
        """Claims the next trials: first those of dead workers, then new ones."""
        config = self.config
        taken = self.trials(*TAKEN)
        lost = [t for t in self.trials(TrialState.WAITING) if retried(t)]
        mine = sum(t.user_attrs.get("worker") == config.worker for t in taken)
        room = max(config.trials - len(taken), len(lost))
        count = min(room, config.batch - mine % config.batch)
        claimed = [self.claim() for _ in range(count)]
        return [trial for trial in claimed if not self.surplus(trial)]

    def claim(self) -> optuna.Trial:
        """Asks for one trial and writes who has it."""
        place = len(self.trials(*TAKEN))
        self.study.sampler = make_sampler(self.config, place)
        with experimental():
            trial = self.study.ask(self.config.space.distributions())
        self.sign(trial.number)
        if "place" not in trial.user_attrs:
            trial.set_user_attr("place", place)
        trial.set_user_attr("worker", self.config.worker)
        trial.set_user_attr("claimed", trial.number)
        return trial

    def surplus(self, trial: optuna.Trial) -> bool:
        """Gives back a trial for which another worker left no room."""
        numbers = [t.number for t in self.trials(*TAKEN)]
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        if retried(frozen) or numbers.index(trial.number) < self.config.trials:
            return False
        self.study.tell(trial, state=TrialState.FAIL)
        return True

    def sign(self, number: int) -> None:
        """Tells a database that a trial's worker is alive."""
        if isinstance(self.storage, RDBStorage):
            number = self.storage.get_trial_id_from_study_id_trial_number(
                self.study_id, number
            )
            self.storage.record_heartbeat(number)

    @contextlib.contextmanager
    def heartbeats(self, numbers: list[int]) -> Iterator[None]:
        """Signs of life in the background, for a database."""
        if not isinstance(self.storage, RDBStorage):
            yield
            return
        stop = threading.Event()

        def beat():
            while not stop.wait(self.config.heartbeat):
                for number in numbers:
                    # One that is late does no harm, and a lost server shows elsewhere.
                    with contextlib.suppress(optuna.exceptions.StorageInternalError):
                        self.sign(number)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def recover(self) -> int:
        """Puts the trials of dead workers back into the queue."""
        before = len(self.trials(TrialState.WAITING))
        if isinstance(self.storage, RDBStorage):
            with experimental():
                optuna.storages.fail_stale_trials(self.study)
        alive = self.others_alive()
        for trial in self.trials(TrialState.RUNNING):
            if self.is_dead(trial, alive):
                self.requeue(trial)
        return len(self.trials(TrialState.WAITING)) - before

    def is_dead(self, trial: FrozenTrial, alive: set[int]) -> bool:
        """Whether nobody trains a running trial."""
        claimed = trial.user_attrs.get("claimed") == trial.number
        if not isinstance(self.storage, RDBStorage):
            if claimed:
                return trial.user_attrs["worker"] not in alive
            if not alive:
                return True
        began = trial.datetime_start
        grace = datetime.timedelta(seconds=self.config.grace)
        late = began is not None and datetime.datetime.now() - began > grace
        return not claimed and late

    def requeue(self, trial: FrozenTrial) -> None:
        """Fails a trial, and queues its values again unless they are incomplete."""
        drawn = trial.user_attrs.get("claimed") == trial.number
        drawn = drawn or "fixed_params" in trial.system_attrs or bool(retried(trial))
        again = [t for t in self.trials() if trial.number in retried(t)]
        if drawn and not again:
            # First the copy: killed in between, this is done once more.
            retry(self.config)(self.study, copy.deepcopy(trial))
        with contextlib.suppress(ValueError):  # another worker was faster
            self.study.tell(trial.number, state=TrialState.FAIL)

    def others_alive(self) -> set[int]:
        """Other workers of this run folder that run now."""
        numbers = (
            int(folder.name)
            for folder in workers_folder(self.config).glob("*")
            if folder.name.isdigit()
        )
        return {n for n in numbers if n != self.config.worker and is_held(self, n)}


def is_held(claims: Claims, number: int) -> bool:
    """Whether the worker of a number runs."""
    try:
        with locked(workers_folder(claims.config) / str(number)):
            return False
    except RunFolderError:
        return True


def workers_folder(config: TuneConfig) -> Path:
    """Where workers hold their locks."""
    return config.folder() / "workers"


def working(config: TuneConfig) -> contextlib.AbstractContextManager[None]:
    """Holds this worker's lock."""
    return locked(workers_folder(config) / str(config.worker))
