"""The one exception family a user is meant to read."""

from __future__ import annotations


class UgrlError(Exception):
    """Bad input from outside (a file, a row, a value, a name).

    The message is a single line that names the place, what was found and what was expected; the
    command line prints it without a traceback and exits with the status of its class.
    """

    status = 2


class ConfigError(UgrlError):
    """A configuration or a search space that cannot be used."""


class DataError(UgrlError):
    """A data set, a shard or an image that cannot be used."""


class BusyError(DataError):
    """Another process is writing the same data set at this moment."""


class CheckpointError(UgrlError):
    """A checkpoint or a weight file that cannot be used."""


class NoRoomError(UgrlError):
    """A cluster whose other work leaves no room; it may be tried again later as it is."""

    status = 3


class ClusterError(UgrlError):
    """A cluster that was lost on the way; what was begun may be continued."""

    status = 4


class AwayError(UgrlError):
    """A storage or a partner that has not answered for as long as was allowed; what was begun may be continued."""

    status = 4


class HungError(AwayError):
    """A thread of this process waits for something that does not come, and cannot be ended: the process is left."""
