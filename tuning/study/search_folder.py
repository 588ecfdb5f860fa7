"""A search's folder: the files that say what the search is, how it is begun, and how it is found again.

``space.yaml`` is the resolved space, and ``base.yaml`` the configuration that all trials share. The study's storage
holds the rest. The files come before the study: a search that is killed at any moment can be resumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space import SearchSpace, complete_point, differences
from tuning.space.space_file import load_space
from tuning.study.lease import PLAN_S
from tuning.study.record import ranked, read_trials
from tuning.study.store import open_storage, storage_of
from tuning.study.study import OBJECTIVES, WHERE, open_study, study_name
from ugrl import config as configs
from ugrl.errors import ConfigError
from ugrl.ownership import FOLDER, own
from ugrl.secrets import public_database as public
from ugrl.storage import place

SPACE, BASE = "space.yaml", "base.yaml"
# A resumed search may get a larger budget or another machine; what it searches stays.
MAY_CHANGE = (
    *("budget", "concurrent", "resources", "workers", "final.best", "final.seeds", "max_failures"),
    *("overrides.train.mlflow", "overrides.train.wandb"),
)


def exists_already(out: Path) -> ConfigError:
    """The refusal of a name that is taken."""
    return ConfigError(
        f"search '{out.name}' exists already ({out}); choose another --out, or continue it with --resume"
    )


def being_written(path: Path) -> bool:
    """Whether a file is one that comes before the space file: another driver begins this very search."""
    return path.name in (BASE, FOLDER) or path.name.startswith((f".{BASE}.", f".{SPACE}."))


def check_same(space: SearchSpace, base: configs.Config, out: Path) -> None:
    """Refuse to continue a search as another one, naming the first difference."""
    for key, new, old in differences(space, load_space(out / SPACE), ignore=MAY_CHANGE):
        raise ConfigError(f"{out}: was started with {key} = {old}, not {new}; a search is resumed as it was")
    stored = configs.build(configs.read_yaml(out / BASE))
    base = configs.build(configs.public_dict(base))
    for path in configs.paths():
        if path not in ("train.mlflow", "train.wandb") and configs.get(stored, path) != configs.get(base, path):
            raise ConfigError(
                f"{out}: was started with {path} = {configs.get(stored, path)}, not {configs.get(base, path)}; "
                "a search is resumed as it was"
            )


def stored_search(out: Path, storage_url: str | None = None) -> tuple[Search, optuna.Study]:
    """A search and its study from its folder, and from a database whose URL is not wholly written down there.

    Raises:
        ConfigError: The folder holds none.
    """
    out = out.absolute()
    if not (out / SPACE).is_file() or not (out / BASE).is_file():
        raise ConfigError(f"{out}: holds no search; expected {SPACE} and {BASE} in it")
    space = load_space(out / SPACE, storage=storage_url)
    base = configs.build(configs.read_yaml(out / BASE))
    storage, name = open_storage(space.storage, out), study_name(space.storage, out)
    if name not in optuna.get_all_study_names(storage):
        raise ConfigError(f"{out}: its storage holds no study '{name}'")
    study = optuna.load_study(storage=storage, study_name=name)
    names = study.user_attrs.get(OBJECTIVES, [o.name for o in space.objectives])
    shards = place(study.user_attrs.get(WHERE, {}).get("shards") or base.data.shards or "data")
    return Search(space, base, shards, tuple(Objective(n) for n in names), out), study


def ended_search(search: Search) -> optuna.Study | None:
    """The study of a search that is resumed, where there is one and it may have ended."""
    try:
        return stored_search(search.out, search.space.storage)[1]
    except ConfigError:
        return None


def begin(search: Search, *, resume: bool, known: optuna.Study | None = None) -> optuna.Study:
    """The study of a search, and the files that say what the search is.

    The files come first: a search that is killed at any moment can be resumed.

    Args:
        search: The search.
        resume: Whether the study may exist already.
        known: The study, where it is open already: replaying a journal twice takes seconds.

    Raises:
        UgrlError: The storage cannot be opened, or holds another search's study.
    """
    space, out = search.space, search.out
    shared = "://" in space.storage and "sqlite:" not in space.storage  # a file lies in the search's own folder
    opened = open_storage(space.storage, out) if shared else None
    storage = storage_of(known) if known is not None else opened
    name = study_name(space.storage, out)
    if shared and name in optuna.get_all_study_names(storage):
        found = optuna.load_study(storage=storage, study_name=name).user_attrs.get(WHERE, {}).get("out", str(out))
        if not resume or found != str(out):
            raise ConfigError(
                f"storage '{public(space.storage)}' already holds a study named '{name}', of the search in {found}; "
                "choose another name for --out, or continue that one with --resume"
            )
    with own(place(out), patience_s=PLAN_S):
        if not resume and (out / SPACE).exists():  # of those that begin it at once, one does
            raise exists_already(out)
        (place(out) / BASE).write(configs.dump(configs.public_dict(search.base)).encode())
        (place(out) / SPACE).write(space.to_yaml().encode())
        study = open_study(
            space,
            out,
            create=not resume,
            objectives=search.objectives,
            steps=search.steps,
            storage=storage,
            planned=False,
        )
        study.set_user_attr(WHERE, {"shards": search.shards.public, "out": str(out)})
    return study


def warm_points(search: Search, folder: str, best: int) -> list[tuple[str, dict[str, Any]]]:
    """The best points of another search that fit this one, with where they came from.

    Raises:
        ConfigError: The folder holds no search, or nothing of it can be used.
    """
    other, study = stored_search(Path(folder))
    rows = ranked(read_trials(study, other.objectives), other.objectives[0])
    ours = {a.path for a in search.space.search}
    found: list[tuple[str, dict[str, Any]]] = []
    why = "no trial of it is complete"
    for row in rows:
        shared = {k: v for k, v in row.params.items() if k in ours}
        origin = f"warm: {Path(folder).name} trial {row.number}"
        try:
            point = complete_point(search.space, origin, shared, search.base)
        except ConfigError as error:
            why = str(error)
            continue
        if shared and point not in [p for _, p in found]:
            found.append((origin, point))
        if len(found) == best:
            break
    if not found:
        raise ConfigError(f"--warm-start {folder}: no point fits this search ({why})")
    return found
