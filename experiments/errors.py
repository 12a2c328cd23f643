"""The errors a user of the command line can cause; `main` prints them in one line."""


class ExperimentError(Exception):
    """Base class: the message alone tells what is wrong and what to do."""


class ConfigError(ExperimentError, ValueError):
    """A configuration value, or a combination of values, that cannot run."""


class DataError(ExperimentError):
    """Data that is missing, unreadable or not what its name says."""


class CheckpointError(ExperimentError):
    """A checkpoint that could not be written, read or matched to this run."""


class MetricsError(ExperimentError):
    """A metrics file that could not be written or read."""


class RunFolderError(ExperimentError):
    """A run folder that is in use or belongs to another configuration."""


class ProcessError(ExperimentError):
    """Processes that should train together and cannot."""
