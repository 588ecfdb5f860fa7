"""From Ray Train's reports to Tune's: one for each validation, never one for a checkpoint."""

from __future__ import annotations

from typing import Any

from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.worker import EVALUATED
from tuning.trial import LOGGED, Reports


class Relay(TuneReportCallback):
    """Pass rank 0's validations on to the trial that started the run.

    Args:
        reports: Makes them.
    """

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports
        self._step = -1.0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called by the controller once all ranks have reported."""
        found = metrics[0]
        # A run that was repaired repeats the validations since its checkpoint.
        if found.get(EVALUATED) and found["step"] > self._step:
            self._step = found["step"]
            scores = {k: v for k, v in found.items() if k not in (EVALUATED, *LOGGED)}
            self._reports.log(found)
            super().after_report(run_context, [self._reports.made(int(found["step"]), scores)], None)
