"""The arms of ``bench.real``: a setting, or what a file says, with a seed; and what of them is done."""

from __future__ import annotations

import argparse
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.real_measure import stamp, trained
from bench.real_table import ORDER
from ugrl import config as configs
from ugrl.config import Config
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError, DataError
from ugrl.storage import place
from ugrl.text import line, nearest
from ugrl.train import checkpoint
from ugrl.train.check import check_run
from ugrl.train.run import check_same, stored_config

# The dearest first, so that the cores end together.
COSTS = ("IV", "III", "II", "I", "Base", "Full")
SHORT = ("Base", "IV", "Full")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_-]{0,40}")


@dataclass(frozen=True)
class Arm:
    """One setting with one seed.

    Attributes:
        setting: Value of ``method.setting``, or the name that ``--arms`` gives it.
        seed: Of the run.
        cfg: The whole configuration.
        out: The folder of the benchmark.
    """

    setting: str
    seed: int
    cfg: Config = field(compare=False)
    out: Path

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.setting}-{self.seed}"

    @property
    def run(self) -> Path:
        """Folder of its training."""
        return self.out / "runs" / self.name

    @property
    def result(self) -> Path:
        """What was measured."""
        return self.out / "results" / f"{self.name}.json"

    def file(self, suffix: str) -> Path:
        """Of its process: ``yaml``, ``log`` or ``progress``."""
        return self.out / "arms" / f"{self.name}.{suffix}"

    def steps(self) -> int:
        """Steps that are done, by its log."""
        if trained(self.run, self.cfg):
            return self.cfg.train.steps
        with suppress(OSError, ValueError, IndexError, KeyError):
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                return int(json.loads(file.read().splitlines()[-1])["step"])
        return 0

    def images(self) -> int:
        """Images that are measured."""
        with suppress(OSError, ValueError):
            return int(self.file("progress").read_text())
        return 0

    def scores(self) -> dict[str, float | None] | None:
        """What was measured, if it is of the last checkpoint and of this configuration."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            tree = json.loads(self.result.read_text())
            wanted = json.loads(json.dumps(stamp(self.cfg, self.cfg.train.steps)))
            if all(tree[key] == value for key, value in wanted.items()) and trained(self.run, self.cfg):
                return dict(tree["scores"])
        return None


def base_of(args: argparse.Namespace) -> Config:
    """The configuration that all arms share.

    Raises:
        ConfigError: It cannot be read, or sets what the benchmark sets.
    """
    values = configs.parse_overrides(args.overrides)
    for key in ("method.setting", "seed", "data.shards"):
        if key in values:
            raise ConfigError(f"{key}={values[key]}: the benchmark sets it; use --settings, --seeds, --voc")
    if args.steps is not None:
        values["train.steps"] = args.steps
    base = configs.load(args.config, values)
    for key in ("mlflow", "wandb"):
        if getattr(base.train, key) is not None:
            raise ConfigError(f"train.{key}: arms are not tracked; leave it out")
    return base


def arms_of(args: argparse.Namespace, base: Config, shards: Path) -> list[Arm]:
    """All arms, checked before anything starts: seed by seed, the dearest first.

    Raises:
        UgrlError: The configuration cannot be trained on these shards, or an arm was begun with another one.
    """
    manifest, found = Manifest.load(shards), []
    changed = {name: _changed(base, name, args.variants[name]) for name in args.settings}
    for seed in range(args.seeds):
        for setting in sorted(changed, key=lambda name: COSTS.index(changed[name].method.setting)):
            cfg = replace(changed[setting], name=f"{setting}-{seed}", seed=seed)
            arm = Arm(setting, seed, cfg, args.out)
            check_run(cfg, manifest, fresh=checkpoint.latest(arm.run) is None)
            if (arm.run / "config.yaml").exists():
                check_same(cfg, stored_config(place(arm.run)), arm.run)
            found.append(arm)
    if any(manifest.split(s).with_masks < manifest.rows(s) for s in (base.data.train_split, base.data.val_split)):
        raise DataError(f"{shards}: an image has no mask; the benchmark needs one for every image of train and val")
    return found


def _changed(base: Config, name: str, values: dict[str, Any]) -> Config:
    """The configuration with what an arm changes.

    Raises:
        ConfigError: It cannot be; the message names the arm.
    """
    tree = configs.to_dict(base)
    for key, value in values.items():
        part = tree
        for word in key.split(".")[:-1]:
            part = part[word]
        part[key.rpartition(".")[2]] = value
    try:
        return configs.build(tree)
    except ConfigError as error:
        raise ConfigError(f"arm {line(name, 40)}: {error}") from None


def variants_of(file: Path | None, within: tuple[Path, ...] = ()) -> dict[str, dict[str, Any]]:
    """What each arm changes, by its name: the settings, or what a file says.

    ``like`` begins with what another arm changes, of those above or of another file. ``within`` are the files that are
    being read.

    Raises:
        ConfigError: The file cannot be read, or is no table of such arms.
    """
    if file is None:
        return {setting: {"method.setting": setting} for setting in ORDER}
    tree, known, found = configs.read_yaml(file), sorted(configs.paths()), dict[str, dict[str, Any]]()
    for name, values in tree.items():
        where = f"{line(file)}: {line(str(name), 40)}"
        if not NAME.fullmatch(str(name)) or not isinstance(values, dict) or not values:
            raise ConfigError(f"{where}: expected a name of letters, digits, + - _, with the keys that the arm changes")
        begun = _like(values.pop("like"), file, found, where, within) if "like" in values else {}
        for key in values:
            if key not in known or key in ("seed", "name"):
                raise ConfigError(f"{where}: no key '{line(str(key), 60)}'{nearest(str(key), known)}")
        found[name] = {**begun, **values}
    if not found:
        raise ConfigError(f"{line(file)}: no arm")
    return found


def _like(
    like: object, file: Path, above: dict[str, dict[str, Any]], where: str, within: tuple[Path, ...]
) -> dict[str, Any]:
    """What the arm changes that another begins with: ``ARM``, of those above, or ``FILE:ARM``.

    Raises:
        ConfigError: There is none, or its file cannot be read.
    """
    other, _, name = str(like).rpartition(":")
    if other:
        source, within = (file.parent / other).resolve(), (*within, file.resolve())
        if source in within:
            raise ConfigError(f"{where}: like: {line(other, 40)} begins with arms of this file")
        above = variants_of(source, within)
    if name not in above:
        among = f"in {line(other, 40)}" if other else "above it"
        raise ConfigError(f"{where}: like: no arm '{line(name, 40)}' {among}{nearest(name, above)}")
    return above[name]
