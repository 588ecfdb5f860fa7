"""What ``import ugrl`` offers beside the parts of the method: prepare, train, tune and load, each in one call.

They do what the commands do, by the same functions, and raise :class:`ugrl.errors.UgrlError` where a command prints one
line. Nothing here is imported before it is used, see :mod:`ugrl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ugrl import config as configs
from ugrl.command import folder_for
from ugrl.config import Config
from ugrl.data.cli import layout
from ugrl.data.mask_folder import TaughtSource
from ugrl.data.prepare import inventory_of
from ugrl.data.prepare import prepare as write_shards
from ugrl.data.shards import MANIFEST
from ugrl.data.source import open_source
from ugrl.errors import ConfigError, DataError
from ugrl.ownership import own
from ugrl.predict.model import Model
from ugrl.storage import Place, is_uri
from ugrl.terminal import Terminal
from ugrl.text import brief, line, plain
from ugrl.train import checkpoint
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks
from ugrl.train.run import plan_run

Where = str | Path | Place


def load(where: Where | Run, *, best: bool = False, device: str | None = None) -> Model:
    """A trained network, ready to predict.

    Args:
        where: A run's folder, or one of its ``checkpoints/step_…``: a path or a URI. What :func:`train` returns, too.
        best: Take the best checkpoint of the run instead of the newest.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; a GPU where there is one by default.

    Returns:
        A model. Its :meth:`~ugrl.predict.model.Model.predict` takes paths, folders, Pillow images, arrays and lists.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
        ConfigError: There is no such device.

    Example::

        model = ugrl.load("run")
        prediction = model.predict("photos/images/a.jpg")
        prediction.save("masks/a.png")
    """
    return Model(where.path if isinstance(where, Run) else where, best=best, device=device)


def prepare(
    root: str | Path,
    out: str | Path | None = None,
    *,
    source: str | None = None,
    tune_val: float | int = 0.1,
    on_error: Literal["raise", "skip"] = "raise",
    seed: int = 0,
    reuse: bool = False,
    quiet: bool = False,
    teacher: str | Path | None = None,
    **options: Any,
) -> Path:
    """Write a data set to shards, as ``ugrl prepare`` does; work that was stopped continues.

    Args:
        root: Folder of the data set: ``images`` and ``tags.csv``, or VOC, or COCO in their layouts.
        out: The folder to write; ``root/shards`` by default.
        source: ``folder``, ``voc`` or ``coco``; by default what lies in ``root``.
        tune_val: Share (below 1) or number of training images held out for searches; 0 for none.
        on_error: Stop at an image that cannot be used, or leave it out and count it.
        seed: Of the held-out choice.
        reuse: Take ``out`` as it is where it exists already, though ``root`` may have changed since.
        quiet: No progress, no census and no warnings.
        teacher: Folder of masks of another method, ``ID.png`` each, that ``method.pseudo.source`` may learn from.
        options: Those of the source, such as ``year=2017``.

    Returns:
        The folder, for :func:`train` and :func:`tune`.

    Raises:
        DataError: The data set cannot be used, or ``out`` exists.
        ConfigError: ``out`` cannot be a folder.

    Example::

        data = ugrl.prepare("photos", "shards")
    """
    root = Path(root)
    out = folder_for(root / "shards" if out is None else Path(out), "out")
    if reuse and (out / MANIFEST).is_file():
        return out
    if (out / MANIFEST).is_file():
        raise DataError(f"{line(out)}: is prepared already; reuse=True takes it as it is, or choose another out")
    images = open_source(source or layout(root), root, **options)
    made = write_shards(
        images if teacher is None else TaughtSource(images, Path(teacher)),
        out,
        tune_val=tune_val,
        on_error=on_error,
        seed=seed,
        progress=not quiet,
    )
    if not quiet:
        console = Terminal(stderr=True)
        inventory = inventory_of(made)
        console.print(inventory.table())
        for text in inventory.warnings():
            console.print(plain(f"warning: {text}", style="yellow"), soft_wrap=True)
    return out


@dataclass(frozen=True)
class Run:
    """A training run that has ended.

    Attributes:
        path: Its folder, or its URI.
        metrics: Metrics of the last validation by name, shares of 1.
        objective: Metric that its best checkpoint was chosen by.
        best: The best value of it.
    """

    path: str
    metrics: dict[str, float]
    objective: str
    best: float

    def load(self, *, best: bool = False, device: str | None = None) -> Model:
        """The network of its newest (or best) checkpoint, see :func:`load`."""
        return load(self.path, best=best, device=device)


def train(
    config: str | Path | Config | Mapping[str, Any] = "shapes",
    overrides: Mapping[str, Any] | None = None,
    *,
    data: Where | None = None,
    out: Where | None = None,
    resume: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Run:
    """Train one model in this process, as ``ugrl-train`` does.

    Args:
        config: Name of a shipped configuration (``own``, ``shapes``, ``voc``, …), a YAML file, a tree of keys and
            values, or a :class:`ugrl.config.Config`.
        overrides: Single values by their path, such as ``{"train.steps": 200}``.
        data: Prepared shards: what :func:`prepare` returns, a path or a URI. Shapes are generated without it.
        out: Folder of the run; ``runs/<name of the config>`` by default.
        resume: Continue what is in ``out`` from its last checkpoint.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; a GPU where there is one by default.
        quiet: No progress.

    Returns:
        The run.

    Raises:
        ConfigError: The configuration cannot be used, names workers, or ``out`` exists and ``resume`` is not set.
        DataError: The shards cannot be used.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written first, and ``resume=True`` continues.

    Example::

        run = ugrl.train("own", {"train.steps": 10}, data=ugrl.prepare("photos"), out="run")
        run.metrics["tag_map"]
        run.load().predict("photos/images/a.jpg").save("mask.png")
    """
    cfg = _config(config, overrides or {})
    if cfg.cluster.workers >= 1 or cfg.cluster.address:
        raise ConfigError("ugrl.train is one process: for workers of Ray Train take the command ugrl-train --workers N")
    if out is not None and not is_uri(out):
        folder_for(str(out), "out")
    console = Terminal(stderr=True)
    plan = plan_run(cfg, data=data, out=out, resume=resume, console=None if quiet else console)
    with own(plan.out) as held:
        trainer = Trainer(
            plan.cfg,
            shards=plan.shards,
            out=plan.out,
            hooks=Hooks(before_write=held.check),
            resume_from=plan.checkpoint,
            console=console,
            quiet=quiet,
            device=device,
        )
        trainer.fit()
    ranked = checkpoint.ranking(plan.out / "checkpoints")
    metrics = {k: v for k, v in trainer.metrics.items() if k != "step"}
    best = ranked[0].value if ranked else metrics.get(trainer.objective, float("nan"))
    return Run(plan.out.where, metrics, trainer.objective, best)


def _config(config: str | Path | Config | Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        return configs.build(configs.override(configs.to_dict(config), dict(overrides)))
    if isinstance(config, Mapping):
        return configs.build(configs.override(dict(config), dict(overrides)))
    if not isinstance(config, str | Path):
        raise ConfigError(f"config is {brief(config)}; expected a name, a file, a tree or a Config")
    cfg = configs.load(config, overrides)
    configs.check_revealed(cfg, config)
    return cfg


def tune(space: str | Path = "shapes", overrides: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Search hyperparameters on Ray Tune and Optuna, as ``ugrl-tune`` does.

    The package ``tuning`` does it, which is built around ``ugrl``; so it is looked up when this is called, and ``ugrl``
    itself works where neither it nor Ray is installed.

    Args:
        space: Name of a shipped search space, or a YAML file.
        overrides: Changes of its base configuration by their path, such as ``{"train.steps": 200}``.
        options: Those of :func:`tuning.api.tune`: ``data``, ``out``, ``trials``, ``workers``, ``concurrent``,
            ``config``, ``storage``, ``resume``, ``address``, ``wait``, ``quiet``.

    Returns:
        A :class:`tuning.api.Search`: its folder, the best values, and the files of its report.

    Raises:
        ConfigError: Ray or another package of a search is not installed; the space cannot be used.
        UgrlError: As the command says it.
    """
    try:
        return import_module("tuning.api").tune(space, overrides, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ugrl.tune needs the package '{error.name}', which is not installed; install ugrl with its requirements"
        ) from None
