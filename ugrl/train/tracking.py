"""A run in MLflow: its parameters and scalars, in one MLflow run however often it is resumed.

``OUT/mlflow.json`` holds the run's id and how far each group of scalars has been sent, so that steps that a resumed run
repeats are not sent twice.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ugrl import foreign
from ugrl.errors import ConfigError, DataError
from ugrl.eval.evaluate import EvalResult
from ugrl.files import replacing
from ugrl.secrets import masked, public
from ugrl.train.background import BackgroundWriter, Say, Writer
from ugrl.train.observer import Observer

EXPERIMENT = "ugrl"
METRICS_A_CALL = 500
PARAMS_A_CALL = 100
LONGEST_PARAM = 500
# A server that does not answer is asked again later, by the thread that sends: no need to wait for long. And a run
# tells nobody but its user how it goes.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value of one step, at a time in seconds since 1970."""

    group: str
    name: str
    value: float
    step: int
    at: float


def check_mlflow(where: str) -> None:
    """Refuse ``train.mlflow`` where MLflow is not installed, or cannot use the folder.

    Raises:
        ConfigError: MLflow is not installed, or the folder has a name that it cannot use.
    """
    if "://" not in where and re.search("[?]|%[0-9a-fA-F]{2}", str(Path(where).absolute())):
        raise ConfigError(f"train.mlflow is '{where}': MLflow takes no folder with ? or %20 in its name")
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(f"train.mlflow is '{public(where)}', but MLflow is not installed: pip install mlflow-skinny")


def tracking_uri(where: str) -> str:
    """A URI as it is; a folder as the SQLite database ``mlflow.db`` in it.

    >>> tracking_uri("https://mlflow.example.org")
    'https://mlflow.example.org'
    >>> tracking_uri("/runs/tracked")
    'sqlite:////runs/tracked/mlflow.db'
    """
    if where == "databricks" or "://" in where or where.startswith("file:"):
        return where
    return f"sqlite:///{Path(where).absolute() / 'mlflow.db'}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping with dotted keys and values as text.

    >>> flat({"seed": 1, "train": {"lr": 0.1, "mlflow": None}})
    {'seed': '1', 'train.lr': '0.1', 'train.mlflow': 'None'}
    """
    out: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = masked(value)[:LONGEST_PARAM]
    return out


class Tracker(Observer):
    """A run's scalars elsewhere. A thread sends them; a lost server never stops the training.

    Args:
        name: For messages: where they go.
        writer: What sends them.
        say: Told in one line of trouble; by default it goes to stderr.
    """

    def __init__(self, name: str, writer: Writer[Scalar], say: Say | None = None) -> None:
        self.writer: BackgroundWriter[Scalar] = BackgroundWriter(name, writer, say)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """One point per value under ``group/``."""
        self.writer.put(scalars_of(group, values, step))

    def on_log(self, done: int, values: Mapping[str, float]) -> None:
        """Points under ``train/``."""
        self.scalars("train", values, done)

    def on_eval(self, done: int, result: EvalResult) -> None:
        """Points under ``val/``, and one for each class."""
        for group, values in points_of(result).items():
            self.scalars(group, values, done)

    def leave(self, status: str) -> None:
        """Have the rest sent, and the run's final status."""
        self.writer.leave(status)

    def close(self) -> None:
        """Wait for it."""
        self.writer.close()


class MlflowObserver(Tracker):
    """A run's scalars in MLflow.

    Args:
        where: A tracking URI, or a folder.
        note: ``OUT/mlflow.json``, which keeps the run's id.
        name: Name of the run.
        params: Configuration of the run.
        say: Told in one line of trouble; by default it goes to stderr.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self, where: str, note: Path, *, name: str, params: Mapping[str, Any], say: Say | None = None) -> None:
        writer = MlflowWriter(where, note, name=name, params=params)
        super().__init__(f"MLflow at {public(where)}", writer, say)


class MlflowWriter:
    """Sends scalars to MLflow; belongs to one :class:`ugrl.train.background.BackgroundWriter`.

    Args:
        where: A tracking URI, or a folder. The experiment is ``ugrl``, or what ``MLFLOW_EXPERIMENT_NAME`` says.
        note: ``OUT/mlflow.json``.
        name: Name of the run.
        params: Configuration of the run, nested or flat.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self, where: str, note: Path, *, name: str, params: Mapping[str, Any]) -> None:
        check_mlflow(where)
        self.where, self.note, self.name, self.params = where, note, name, flat(params)
        self._client: Any = None
        self._run: str | None = None
        self._open = False
        self._seen: dict[str, Any] = {}
        try:
            seen = foreign.read_json(note)
            if seen["uri"] == public(tracking_uri(where)):
                sent = {str(k): foreign.as_int(v, "sent") for k, v in foreign.as_dict(seen["sent"], "sent").items()}
                run = foreign.as_str(seen["run_id"], "run_id")
                self._seen = {"run_id": run, "uri": seen["uri"], "params": seen["params"] is True, "sent": sent}
        except (DataError, KeyError, TypeError):
            pass  # none, or not one of ours: a new run is begun

    def write(self, items: Sequence[Scalar]) -> None:
        """Log what was not sent before; opens the run if need be."""
        self._begin()
        from mlflow.entities import Metric

        sent: dict[str, int] = self._seen["sent"]
        new = [s for s in items if s.step > sent.get(s.group, -1)]
        for k in range(0, len(new), METRICS_A_CALL):
            part = [
                Metric(_key(f"{s.group}/{s.name}"), s.value, int(1000 * s.at), s.step)
                for s in new[k : k + METRICS_A_CALL]
            ]
            self._client.log_batch(self._run, metrics=part)
        for s in new:
            sent[s.group] = max(s.step, sent.get(s.group, -1))
        if new:
            self._write_note()

    def close(self, status: str) -> None:
        """Set the run's final status."""
        self._begin()
        self._client.set_terminated(self._run, status=status)

    def _begin(self) -> None:
        """Connect, and create the run or continue it; may be called again after it failed."""
        if self._open:
            return
        for key, value in DEFAULTS.items():
            os.environ.setdefault(key, value)
        for logger in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = tracking_uri(self.where)
        if uri.startswith("sqlite:///") and "://" not in self.where:
            Path(self.where).mkdir(parents=True, exist_ok=True)
        self._client = self._client or MlflowClient(tracking_uri=uri)
        self._run = self._known_run()
        if self._run is None:
            made = self._client.create_run(self._experiment(), run_name=self.name)
            self._run = made.info.run_id
            self._seen = {"run_id": self._run, "uri": public(uri), "params": False, "sent": {}}
            self._write_note()
        else:
            self._client.update_run(self._run, status="RUNNING")
        if not self._seen["params"]:
            pairs = [Param(_key(k), v) for k, v in self.params.items()]
            for k in range(0, len(pairs), PARAMS_A_CALL):
                self._client.log_batch(self._run, params=pairs[k : k + PARAMS_A_CALL])
            self._seen["params"] = True
            self._write_note()
        self._open = True

    def _known_run(self) -> str | None:
        """The run of before, unless somebody deleted it."""
        from mlflow.exceptions import MlflowException

        known = self._seen.get("run_id")
        if known is None:
            return None
        try:
            info = self._client.get_run(known).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return str(known) if info.lifecycle_stage == "active" else None

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id) if found else str(self._client.create_experiment(name))

    def _write_note(self) -> None:
        with replacing(self.note, durable=False) as draft:
            draft.write_text(json.dumps(self._seen) + "\n", encoding="utf-8")


def points_of(result: EvalResult) -> dict[str, dict[str, float]]:
    """The scores of a validation by group; a class that no image shows has no score."""
    groups = {"val": dict(result.metrics)}
    for name, table in result.classes.items():
        groups[f"val_{name}"] = {k: v for k, v in table.items() if math.isfinite(v)}
    return groups


def scalars_of(group: str, values: Mapping[str, float], step: int) -> list[Scalar]:
    """The values of a step, as of now."""
    now = time.time()
    return [Scalar(group, name, float(value), step, now) for name, value in values.items()]


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]
