"""A failed run of Ray Train as one error of this project, with one line."""

from __future__ import annotations

import ray

from cluster.ray_internals import NOT_HEALTHY, NOT_STARTED
from ugrl.errors import ClusterError, UgrlError
from ugrl.storage import Place


def not_started(error: BaseException) -> bool:
    """Whether Ray Train gave up since the workers could not be started."""
    return type(getattr(error, "controller_failure", None)).__name__ in NOT_STARTED


def as_ours(error: Exception, out: Place) -> UgrlError:
    """The bad input that a worker met, or else the last message of the first worker that failed.

    Args:
        error: Ray Train's ``TrainingFailedError``.
        out: The run's folder, whose name stands in the message.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {}) or {}
    causes = [_root(failure) for _, failure in sorted(failures.items())]
    for cause in causes:
        if isinstance(cause, UgrlError):
            return cause
    text = str(causes[0] if causes else getattr(error, "controller_failure", error)).strip()
    line = text.splitlines()[-1] if text else type(error).__name__
    rank = f"worker {min(failures)}" if failures else "the controller"
    if causes and _lost(causes[0]):
        return ClusterError(f"run '{out.name}': {rank} was lost: {line}; continue with --resume")
    return UgrlError(f"run '{out.name}': {rank} failed: {line}")


def _lost(error: BaseException) -> bool:
    """Whether a worker ended with its process, its node or its partners, and not by a fault of its own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    hung = bool(names & {*NOT_HEALTHY, "DistError"})
    return hung or isinstance(error, ray.exceptions.RayError) or "gloo/transport" in str(error)


def _root(error: BaseException) -> BaseException:
    """The first error of a chain."""
    for name in ("_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error
