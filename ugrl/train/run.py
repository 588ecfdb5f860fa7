"""From a configuration and two folders to a run that may start: everything is checked first."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ugrl import config as config_mod
from ugrl import foreign
from ugrl.config import Config
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import Manifest
from ugrl.errors import AwayError, BusyError, ConfigError, DataError
from ugrl.storage import Place, place
from ugrl.text import line
from ugrl.train import checkpoint
from ugrl.train.check import check_run
from ugrl.train.tracking import check_mlflow
from ugrl.train.wandb_tracking import check_wandb

# May differ between a run and its resumption: nothing in them changes what is computed.
FREE: tuple[str, ...] = ("name", "data.shards", "data.threads", "data.prefetch", "data.cache_dir", "data.cache_disk_mb")
FREE += ("train.cpu_threads", "train.log_every", "train.micro_batch", "train.nan_patience", "train.record_ids")
FREE += ("train.stall_s", "train.mlflow", "train.wandb", "train.keep_best", "data.storage_patience_s")
FREE_SECTIONS = ("cluster.", "eval.", "train.keep_checkpoints", "train.picture_every", "train.checkpoint_every")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run that was checked as a whole: paths are absolute, shards exist, ``out`` is free or resumed."""

    cfg: Config
    shards: Place
    out: Place
    resume: bool

    @property
    def checkpoint(self) -> Place | None:
        """Where to continue from, if there is anything."""
        return checkpoint.latest(self.out) if self.resume else None


def generated_root() -> Path:
    """Where generated data sets are kept: ``$UGRL_DATA`` or ``./data``."""
    return Path(os.environ.get("UGRL_DATA", "data")).absolute()


def ensure_shards(cfg: Config, data: str | Path | Place | None, *, console: Console | None = None) -> Place:
    """The prepared folder of a run; ``shapes`` is generated where it is not there yet.

    Raises:
        ConfigError: No shards were named and the source is not ``shapes``.
        DataError: The folder is not a prepared one.
    """
    named = data or cfg.data.shards
    if named is not None:
        Manifest.load(named)
        return place(named)
    if cfg.data.source != "shapes":
        raise ConfigError("no shards: name a prepared folder with --data (made by `ugrl prepare`), or set data.shards")
    s = cfg.data.shapes
    digest = hashlib.blake2b(json.dumps(asdict(s), sort_keys=True).encode(), digest_size=4).hexdigest()
    out = generated_root() / f"shapes-{s.size}px-{digest}"
    if not out.is_dir() and console:
        console.print(f"generating {s.train + s.val} images of shapes into {out}", soft_wrap=True)
    until, told = time.monotonic() + cfg.data.storage_patience_s, False
    while not out.is_dir():
        spec = ShapesSpec(train=s.train, val=s.val, size=s.size, difficulty=s.difficulty, seed=s.seed)
        try:
            prepare(ShapesSource(spec), out, tune_val=s.tune_val, seed=s.seed, progress=False)
        except DataError as error:
            if not isinstance(error, BusyError) and not out.is_dir():
                raise
            # A run that was started at the same moment makes the same images.
            if time.monotonic() > until:
                raise AwayError(f"{error}, for {cfg.data.storage_patience_s:g} s (data.storage_patience_s)") from None
            if not told and console and not out.is_dir():
                limit = f"{cfg.data.storage_patience_s:g} s (data.storage_patience_s)"
                console.print(f"{error}; waiting up to {limit}", soft_wrap=True)
                told = True
            time.sleep(0.2)
    Manifest.load(out)
    return place(out)


def plan_run(
    cfg: Config,
    *,
    data: str | Path | Place | None,
    out: str | Path | Place | None,
    resume: bool,
    console: Console | None = None,
) -> RunPlan:
    """Check a run as a whole; creates nothing but generated shards.

    Args:
        cfg: Configuration of the run.
        data: Prepared folder, or ``None`` (see :func:`ensure_shards`).
        out: Run folder; ``<cluster.storage or runs>/<name>`` by default. A path or a URI, as ``data``.
        resume: Continue what is in ``out``; it may be empty or absent.
        console: For a line when data are generated.

    Raises:
        ConfigError: ``out`` exists and ``resume`` was not asked for; the resumed run has another
            configuration; the objective cannot be supplied.
        DataError: The shards cannot be used.
        CheckpointError: The resumed run began with other images.
    """
    out = place(out or place(cfg.cluster.storage or "runs") / cfg.name)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder to write the run to")
    if out.names() and not resume:
        raise ConfigError(
            f"run '{out.name}' exists already ({out}); choose another --out, or continue it with --resume"
        )
    if resume and (out / "config.yaml").exists():
        check_same(cfg, stored_config(out), out)
    shards = ensure_shards(cfg, data, console=console)
    manifest = Manifest.load(shards)
    check_run(cfg, manifest, fresh=not resume or checkpoint.latest(out) is None)
    if cfg.train.mlflow is not None:
        check_mlflow(cfg.train.mlflow)
    if cfg.train.wandb is not None:
        check_wandb(cfg.train.wandb)
    if resume and (found := checkpoint.latest(out)) is not None:
        now = manifest.fingerprint(cfg.data.train_split, cfg.data.val_split)
        checkpoint.check_data(checkpoint.read_state(found), now, shards)
    return RunPlan(replace(cfg, data=replace(cfg.data, shards=shards.public)), shards, out, resume)


def stored_config(out: Place) -> Config:
    """The configuration that a run was started with.

    Raises:
        ConfigError: The file is no valid configuration.
        StorageError: The file cannot be read.
    """
    file = out / "config.yaml"
    where = line(file)
    data = file.read_small("configuration", most=foreign.MOST_YAML, error=ConfigError)
    tree = config_mod.as_tree(foreign.decode_text(data, where, error=ConfigError), where)
    if not tree:
        raise ConfigError(f"{where}: is empty; expected the configuration that the run was started with")
    try:
        return config_mod.build(tree)
    except ConfigError as error:
        raise error.of(where) from None


def check_same(new: Config, old: Config, out: Path | Place) -> None:
    """Refuse to continue a run with a configuration that would change what it computes.

    Raises:
        ConfigError: Names the first key that differs, with both values.
    """
    for path in config_mod.paths():
        if path in FREE or path.startswith(FREE_SECTIONS):
            continue
        a, b = config_mod.get(old, path), config_mod.get(new, path)
        if a != b:
            raise ConfigError(f"{out}: was started with {path}={_show(a)}, not {_show(b)}; a run is resumed as it was")


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
