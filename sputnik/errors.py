"""Errors a user can mend. Each message is one line that names the fix; the command line prints it and exits with 2.

So does it with the system's word on a file that cannot be used. Anything else is a bug of ours and keeps its traceback.
"""


class SputnikError(ValueError):
    """A mistake in what we were given: configuration, data, checkpoint, task."""


class ConfigError(SputnikError):
    """Unknown key, wrong type or sizes that do not fit together."""


class DataError(SputnikError):
    """A corpus, prompt file or run directory that cannot be used as it is."""


class CheckpointError(SputnikError):
    """A checkpoint that is missing, truncated or of another shape."""


class TaskError(SputnikError):
    """A task whose problems or verifier break their own contract."""


class MissingPackage(SputnikError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run `pip install 'sputnik[{extra}]'`")
