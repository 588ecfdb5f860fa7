"""A run in Weights & Biases: its configuration and scalars, in one W&B run however often it is resumed.

``OUT/wandb.json`` holds the run's id and how far each group of scalars has been sent, as for MLflow. With
``WANDB_MODE=offline`` everything stays in ``OUT/wandb``, and ``wandb sync`` sends it later. Where ``OUT`` is in a
bucket, what ``wandb sync`` reads is sent there with each checkpoint and at the end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ugrl import foreign
from ugrl.errors import ConfigError, DataError
from ugrl.files import replacing
from ugrl.text import line
from ugrl.train.background import Say
from ugrl.train.tracking import Scalar, Tracker, flat

OFFLINE = ("offline", "disabled", "dryrun")
STATUS = {"FINISHED": 0, "KILLED": 130, "FAILED": 1}
HOST = "not told"
START_S = 30.0
CHECK_S = 120.0


def check_wandb(project: str) -> None:
    """Refuse ``train.wandb`` where W&B is not installed, takes no such project, or would ask for a key.

    Raises:
        ConfigError: One of these.
    """
    if not re.fullmatch(r"([\w.-]+/)?[\w. -]{1,128}", project):
        raise ConfigError(f"train.wandb is '{line(project, 80)}'; expected PROJECT or ENTITY/PROJECT, by name")
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"train.wandb is '{project}', but W&B is not installed: pip install wandb")
    if os.environ.get("WANDB_MODE", "") in OFFLINE:
        return
    # In a process of its own that nobody can be asked in: W&B would wait for somebody to type a key.
    words = [sys.executable, "-c", "import sys, wandb; sys.exit(not wandb.login())"]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_S)
    except subprocess.TimeoutExpired:
        return  # a slow machine, which says nothing about a key
    if done.returncode:
        raise ConfigError(
            f"train.wandb is '{project}', but no key of W&B is known: run `wandb login`, set WANDB_API_KEY, or keep "
            "the run here with WANDB_MODE=offline"
        )


class WandbObserver(Tracker):
    """A run's scalars in W&B. A thread sends them; a lost server never stops the training.

    Args:
        project: ``PROJECT`` or ``ENTITY/PROJECT``.
        out: The run's folder, for ``wandb.json`` and W&B's own files.
        name: Name of the run.
        params: Configuration of the run.
        say: Told in one line of trouble; by default it goes to stderr.
    """

    def __init__(self, project: str, out: Path, *, name: str, params: Mapping[str, Any], say: Say | None = None):
        super().__init__(f"W&B project {project}", WandbWriter(project, out, name=name, params=params), say)


class WandbWriter:
    """Sends scalars to W&B; belongs to one :class:`ugrl.train.background.BackgroundWriter`.

    Args:
        project: ``PROJECT`` or ``ENTITY/PROJECT``.
        out: The run's folder.
        name: Name of the run.
        params: Configuration of the run, nested or flat.
    """

    def __init__(self, project: str, out: Path, *, name: str, params: Mapping[str, Any]) -> None:
        self.entity, _, self.project = project.rpartition("/")
        self.out, self.note, self.name, self.params = out, out / "wandb.json", name, flat(params)
        self.id, self.sent = uuid.uuid4().hex[:12], dict[str, int]()
        self._run: Any = None
        try:
            seen = foreign.read_json(self.note)
            if seen["project"] == project:
                sent = {str(k): foreign.as_int(v, "sent") for k, v in foreign.as_dict(seen["sent"], "sent").items()}
                self.id, self.sent = foreign.as_str(seen["id"], "id"), sent
        except (DataError, KeyError, TypeError):
            pass  # none, or not one of ours: a new run is begun

    def write(self, items: Sequence[Scalar]) -> None:
        """Log what was not sent before; opens the run if need be."""
        self._begin()
        new = [s for s in items if s.step > self.sent.get(s.group, -1)]
        steps: dict[tuple[str, int], dict[str, float]] = {}
        for s in new:
            steps.setdefault((s.group, s.step), {})[f"{s.group}/{s.name}"] = s.value
        for (group, step), values in steps.items():
            self._run.log({**values, "step": step})
            self.sent[group] = max(step, self.sent.get(group, -1))
        if new:
            self._write_note()

    def close(self, status: str) -> None:
        """Set the run's final status, and have the rest sent."""
        self._begin()
        self._run.finish(exit_code=STATUS.get(status, 1))

    def _begin(self) -> None:
        """Create the run or continue it; may be called again after it failed."""
        if self._run is not None:
            return
        import wandb

        self.out.mkdir(parents=True, exist_ok=True)
        # Nothing is told of the host, its load, its programs and its output: scalars and the configuration alone.
        private: dict[str, Any] = {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True}
        private |= {"x_save_requirements": False, "save_code": False, "disable_git": True, "host": HOST}
        known = {k: v for k, v in private.items() if k in wandb.Settings.model_fields}  # others have other versions
        settings = wandb.Settings(console="off", silent=True, init_timeout=START_S, **known)
        try:
            self._run = wandb.init(
                entity=self.entity or None, project=self.project, id=self.id, name=self.name, resume="allow",
                dir=str(self.out), config=self.params, settings=settings,
            )  # fmt: skip
        except BaseException:
            wandb.teardown()  # or the next try finds the id in use
            raise
        self._run.define_metric("*", step_metric="step")
        self._write_note()

    def _write_note(self) -> None:
        project = f"{self.entity}/{self.project}" if self.entity else self.project
        with replacing(self.note, durable=False) as draft:
            draft.write_text(json.dumps({"id": self.id, "project": project, "sent": self.sent}) + "\n")
