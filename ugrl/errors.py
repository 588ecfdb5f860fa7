"""The one exception family a user is meant to read."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

# What a full disk, or a spent quota, is called by the system, by SQLite, and by libraries that quote them.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = (*(os.strerror(number) for number in _FULL), "disk is full")
_MOST = 800  # characters of several problems in one line


class UgrlError(Exception):
    """Bad input from outside (a file, a row, a value, a name).

    The message is a single line that names the place, what was found and what was expected; the
    command line prints it without a traceback and exits with the status of its class.
    """

    status = 2

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one line each."""
        return (str(self),)


class ConfigError(UgrlError):
    """A configuration or a search space that cannot be used.

    Args:
        problems: Everything that is wrong with it, one line each.

    >>> error = ConfigError("key 'a' is 1", "key 'b' is 2")
    >>> str(error), error.of("x.yaml").problems
    ("key 'a' is 1; also: key 'b' is 2", ("x.yaml: key 'a' is 1", "x.yaml: key 'b' is 2"))
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)  # all of them are arguments, so that none is lost between processes

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one line each."""
        return self.args

    def __str__(self) -> str:
        text, *more = self.args
        for k, problem in enumerate(more):
            if len(text) + len(problem) > _MOST:
                return f"{text}; and {len(more) - k} more problems"
            text += f"; also: {problem}"
        return str(text)

    def of(self, where: str) -> ConfigError:
        """The same problems of a file, which each of them names."""
        return ConfigError(*(f"{where}: {problem}" for problem in self.problems))


class DataError(UgrlError):
    """A data set, a shard or an image that cannot be used."""


class BusyError(DataError):
    """Another process is writing the same data set at this moment."""


class CheckpointError(UgrlError):
    """A checkpoint or a weight file that cannot be used."""


class NoRoomError(UgrlError):
    """No room on a cluster or a disk, which other work holds; it may be tried again later as it is."""

    status = 3


class ClusterError(UgrlError):
    """A cluster that was lost on the way; what was begun may be continued."""

    status = 4


def is_full(error: BaseException | None) -> bool:
    """Whether a disk without room is behind an error, be it by the words that another process has sent."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL or any(word in str(error) for word in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_text(path: str | os.PathLike[str]) -> str:
    """How much is free on the disk of a path, which may not exist yet."""
    there = Path(path).absolute()
    try:
        while not there.exists():
            there = there.parent
        return f"{shutil.disk_usage(there).free / 2**20:.1f} MiB are free there"
    except OSError:
        return "its disk does not say how much is free"


class AwayError(UgrlError):
    """A storage or a partner that has not answered for as long as was allowed; what was begun may be continued."""

    status = 4


class HungError(AwayError):
    """A thread of this process waits for something that does not come, and cannot be ended: the process is left."""
