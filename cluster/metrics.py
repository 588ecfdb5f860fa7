"""The pace of each worker as Ray metrics, which a cluster's Prometheus collects.

Ray prefixes the names (``ray_ugrl_images_per_second``) and serves them from every node's metrics port.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from ugrl.train.progress import LOSSES

GAUGES = {
    "images_per_s": ("ugrl_images_per_second", "Training images a second, of all workers together."),
    "step_s": ("ugrl_step_seconds", "Mean seconds a training step."),
    "data_wait": ("ugrl_data_wait_share", "Share of the time spent waiting for the next batch, 0 to 1."),
    "device_memory_mb": ("ugrl_device_memory_mb", "Most memory that tensors took on the device, in 2**20 bytes."),
}


class RayGauges:
    """Sets this worker's gauges; called with each training line.

    Args:
        run: The run's name: the tag ``run`` of every gauge.
        rank: The tag ``rank``.
    """

    def __init__(self, run: str, rank: int) -> None:
        tags = {"run": run, "rank": str(rank)}

        def gauge(name: str, text: str, *more: str) -> Gauge:
            made = Gauge(name, description=text, tag_keys=(*tags, *more))
            made.set_default_tags(tags)
            return made

        self._gauges = {key: gauge(name, text) for key, (name, text) in GAUGES.items()}
        self._step = gauge("ugrl_step", "Training steps done.")
        self._loss = gauge("ugrl_loss", "Losses of the global batch, one series a term.", "term")

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Steps done, and a training line's values; those without a gauge are ignored."""
        self._step.set(step)
        for key, gauge in self._gauges.items():
            if key in values:
                gauge.set(values[key])
        for term in LOSSES:
            if term in values:
                self._loss.set(values[term], tags={"term": term})
