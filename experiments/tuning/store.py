"""Where the trials of a study are kept: a journal file, or a database.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization" (TPE); Golovin
    et al., 2017, "Google Vizier", Sec. 3.2.2 (the median rule).
"""

import contextlib
import copy
import datetime
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc

from experiments.configs.tune import TuneConfig
from experiments.errors import ExperimentError, RunFolderError
from experiments.runfolder import flatten, locked

JOURNAL = "journal.log"
EXAMPLE = "postgresql+psycopg://user@host/database"
PRUNER_STARTUP = 5
# Workers that start together create the tables together, and all but one fail.
ATTEMPTS, PAUSE = 10, 0.5


class StorageError(ExperimentError):
    """A storage that cannot be used, or a study of another configuration."""


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Optuna calls its heartbeats experimental, and warns of them outside optimize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage", append=False)
        yield


def open_storage(config: TuneConfig) -> BaseStorage:
    """Opens the journal file or the database."""
    if config.storage is None:
        path = config.folder() / JOURNAL
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        except OSError as error:
            raise StorageError(f"{path} cannot be used: {error}.") from error
    url = checked_url(config.storage)
    problem: Any = None
    for _ in range(ATTEMPTS):
        try:
            return open_database(config, url)
        except (exc.IntegrityError, exc.ProgrammingError) as error:
            problem = error
            time.sleep(PAUSE)
    raise StorageError(f"{shown(url)}: tables cannot be made: {problem.orig}.")


def open_database(config: TuneConfig, url: sqlalchemy.URL) -> RDBStorage:
    try:
        with experimental():
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=config.heartbeat,
                grace_period=config.grace,
                heartbeat_stale_trial_callback=retry(config),
            )
    except ImportError as error:
        raise StorageError(
            f"{shown(url)} needs a driver that is not installed ({error.__cause__}). "
            "For PostgreSQL: pip install 'kfac_jax_lite[postgres]', and a URL like "
            f"{EXAMPLE}."
        ) from error
    except exc.OperationalError as error:
        raise StorageError(
            f"{shown(url)} cannot be reached: {str(error.orig).strip()}"
        ) from error


def checked_url(text: str) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(text)
        with contextlib.suppress(ImportError):  # told when the database is opened
            url.get_dialect()
        return url
    except exc.NoSuchModuleError as error:
        raise StorageError(
            f"storage is {text.split(':')[0]}://…: no such kind of database, or no "
            f"such driver; wanted a URL like {EXAMPLE}."
        ) from error
    except exc.ArgumentError as error:
        raise StorageError(
            f"storage is not a URL; wanted one like {EXAMPLE}."
        ) from error


def shown(url: sqlalchemy.URL) -> str:
    return url.render_as_string(hide_password=True)


def retry(config: TuneConfig) -> RetryHeartbeatStaleTrialCallback:
    """What puts a trial whose worker died back into the queue."""
    with experimental():
        return RetryHeartbeatStaleTrialCallback(max_retry=config.retries)


def retried(trial: FrozenTrial) -> list[int]:
    """Numbers of the failed trials whose place a trial takes, none for most."""
    with experimental():
        return RetryHeartbeatStaleTrialCallback.retry_history(trial)


def open_study(
    config: TuneConfig, storage: BaseStorage, identity: dict[str, Any]
) -> optuna.Study:
    """Creates the study, or joins it."""
    name = config.name()
    pruner = make_pruner(config, identity["steps"] // config.evaluations)
    try:
        study = optuna.create_study(storage=storage, study_name=name, pruner=pruner)
        ours = True
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
        ours = False
    # Whoever created it says what it is; unless he was killed before he could.
    for _ in range(0 if ours else ATTEMPTS):
        if "identity" in study.user_attrs:
            break
        time.sleep(PAUSE)
    if "identity" not in study.user_attrs:
        study.enqueue_trial(config.space.usual(), skip_if_exists=True)
        study.set_user_attr("identity", identity)
    check_same_study(config, flatten(study.user_attrs["identity"]), flatten(identity))
    return study


def check_same_study(
    config: TuneConfig, seen: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Raises if a study is one of another configuration."""
    for name in {**wanted, **seen}:
        if seen.get(name) != wanted.get(name):
            raise StorageError(
                f"The study {config.name()} is one with {name} = {seen.get(name)!r}; "
                f"wanted {wanted.get(name)!r}. Give another name with --study, or, for "
                "a journal file, another folder with --workdir."
            )


def make_pruner(config: TuneConfig, every: int) -> optuna.pruners.BasePruner:
    """Ends trials that are worse than the median of the finished ones."""
    if not config.prune_from:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(
        n_startup_trials=PRUNER_STARTUP, n_warmup_steps=config.prune_from * every
    )


def make_sampler(config: TuneConfig, place: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial; what it draws depends on the trials before alone."""
    entropy = [config.seed, config.worker, place]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    startup = config.startup_trials
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=startup, constant_liar=True
    )


TAKEN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)


class Claims:
    """The trials of a study as one worker sees them."""

    def __init__(self, config: TuneConfig, identity: dict[str, Any]):
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
    return locked(workers_folder(config) / str(config.worker))
