"""Where the trials of a study are kept: a journal file, or a database.

References:
    Bergstra et al., 2011, "Algorithms for hyper-parameter optimization" (TPE); Golovin
    et al., 2017, "Google Vizier", Sec. 3.2.2 (the median rule).
"""

import contextlib
import time
import warnings
from collections.abc import Iterator
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
from optuna.trial import FrozenTrial
from sqlalchemy import exc

from experiments.configs.tune import TuneConfig
from experiments.errors import ExperimentError
from experiments.runfolder import flatten

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
    """Connects once."""
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
    """Parses the URL of a database."""
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
    """The URL without its password."""
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
