"""Checkpoints: safetensors and JSON, written to a temporary name and renamed.

Layout of a run folder::

    OUT/config.yaml
    OUT/metrics.jsonl
    OUT/checkpoints/step_00000100/
        state.json              format, step, config, class names, metrics, fingerprint of the data
        model.safetensors       the network
        prototypes.safetensors  prototypes, counts, running means, Φ
        optimizer.safetensors   AdamW's moments by parameter name
        random.safetensors      the generators' states
    OUT/checkpoints/best.json   {"checkpoint": "step_…", "objective": …, "value": …, "ranking": […]}

The data position is the step itself: the order of an epoch and every crop are functions of (seed,
epoch, id). Nothing here is ever a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ugrl import foreign
from ugrl.config import Config, build
from ugrl.data.shards import MOST_CLASSES
from ugrl.errors import CheckpointError, ConfigError
from ugrl.files import sync, write_whole
from ugrl.storage import Place, StorageError, place
from ugrl.text import brief, line

FORMAT = 1
PREFIX = "step_"
BEST = "best.json"
_NAME = re.compile(rf"{PREFIX}[0-9]{{1,15}}")
_MOST_STEPS = 10**15


@dataclass(frozen=True, slots=True)
class State:
    """What ``state.json`` holds."""

    path: Place
    step: int
    config: Config
    class_names: tuple[str, ...]
    metrics: dict[str, float]
    data: str | None = None

    @property
    def judged(self) -> bool:
        """Whether its metrics are of a validation of this very step."""
        return self.metrics.get("step") == self.step

    def ends(self, steps: int) -> bool:
        """Whether nothing is left of a run of so many steps: they are done, and the last one was validated."""
        return self.step >= steps and self.judged


@dataclass(frozen=True, slots=True)
class Ranked:
    """One of the best checkpoints, by name."""

    checkpoint: str
    value: float


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def save(
    folder: Path,
    step: int,
    *,
    config: dict[str, Any],
    class_names: tuple[str, ...],
    metrics: Mapping[str, float],
    parts: Mapping[str, Mapping[str, Tensor]],
    data: str | None = None,
) -> Path:
    """Write ``folder/step_…`` atomically.

    Args:
        folder: Folder of all checkpoints, ``OUT/checkpoints``.
        step: Number of steps done.
        config: The configuration as a plain dict.
        class_names: Names of the foreground classes, in the order of their indices.
        metrics: Metrics of the last validation.
        parts: Tensors by file name, see the module's text.
        data: Fingerprint of the splits that the run reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{step:08d}"
    tmp = folder / f".{final.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        write_parts(tmp, parts)
        write_state(tmp, step, config=config, class_names=class_names, metrics=metrics, data=data)
        old = folder / f".{final.name}.old"
        if final.exists():  # it stays until its successor is whole
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(tmp, final)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)  # a full disk needs the room
        raise
    sync(folder)
    return final


def write_parts(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write tensors into a folder, a file for each part; see the module's text."""
    for name, tensors in parts.items():
        _write_part(folder / f"{name}.safetensors", tensors)


def write_state(
    folder: Path,
    step: int,
    *,
    config: dict[str, Any],
    class_names: tuple[str, ...],
    metrics: Mapping[str, float],
    data: str | None = None,
) -> None:
    """Write ``state.json``; arguments as of :func:`save`."""
    tree = {"format": FORMAT, "step": step, "class_names": list(class_names), "metrics": dict(metrics)}
    write_json(folder / "state.json", {**tree, "data": data, "config": config})


def _write_part(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Contiguous copies: safetensors refuses views that share storage.
    host = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    seen: set[int] = set()
    for key, value in host.items():
        storage = value.untyped_storage().data_ptr()
        if storage in seen or value.untyped_storage().nbytes() != value.numel() * value.element_size():
            host[key] = value.clone()
        seen.add(storage)
    try:
        save_file(host, path)
    except SafetensorError as error:  # it wraps what the operating system says
        raise OSError(str(error)) from None
    sync(path)


def step_of(name: str) -> int:
    """Steps done, of a checkpoint's name.

    >>> step_of("step_00000120")
    120
    """
    return int(name.removeprefix(PREFIX))


def prune(folder: Path, keep: int) -> None:
    """Drop the oldest checkpoints beyond ``keep``; those marked best stay."""
    try:
        best = {r.checkpoint for r in ranking(folder)}
    except CheckpointError:
        return  # nobody knows which are the best: all stay
    for old in _all(folder)[:-keep]:
        if old.name not in best:
            shutil.rmtree(old)


def ranking(folder: str | Path | Place) -> list[Ranked]:
    """The best checkpoints in ``OUT/checkpoints``, the best one first; none where none was marked.

    Raises:
        CheckpointError: ``best.json`` cannot be used.
        StorageError: The storage does not answer.
    """
    file = place(folder) / BEST
    if not file.exists():
        return []
    where = line(file)
    tree = _json(file)
    listed = [tree]
    if "ranking" in foreign.as_dict(tree, where, error=CheckpointError):
        listed += foreign.as_list(tree["ranking"], f"{where}: ranking", most=10_000, error=CheckpointError)
    found: dict[str, Ranked] = {}
    for entry in listed:
        name = foreign.field(entry, "checkpoint", where, error=CheckpointError)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CheckpointError(f"{where}: checkpoint {brief(name)}; expected a name such as {PREFIX}00000100")
        value = foreign.as_number(entry.get("value", 0.0), f"{where}: value", error=CheckpointError)
        found.setdefault(name, Ranked(name, value))
    return list(found.values())


def sweep(folder: Path) -> list[str]:
    """Remove what a dead writer left half-written in ``OUT/checkpoints``; returns the names.

    A checkpoint that it had put aside for a successor of the same step, which never came, is put back.
    """
    for old in sorted(folder.glob(f".{PREFIX}*.old")) if folder.is_dir() else []:
        final = old.with_name(old.name[1:].removesuffix(".old"))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, final)
    found = sorted(folder.glob(f".{PREFIX}*.tmp")) if folder.is_dir() else []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


def _names(names: Iterable[str]) -> list[str]:
    """Those that are checkpoints', by step."""
    return sorted((n for n in names if _NAME.fullmatch(n)), key=step_of)


def _all(folder: Path) -> list[Path]:
    names = _names(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in names if (folder / name / "state.json").is_file()]


def latest(out: str | Path | Place) -> Place | None:
    """The newest whole checkpoint of a run folder, or ``None``.

    Raises:
        StorageError: The storage does not answer.
    """
    folder = place(out) / "checkpoints"
    if folder.local is not None:
        found = _all(folder.local)
        return place(found[-1]) if found else None
    for name in reversed(_names(folder.names())):
        if (folder / name / "state.json").exists():
            return folder / name
    return None


def find(where: str | Path | Place, *, best: bool = False) -> Path:
    """A checkpoint by its own path, or the newest (or best) one of a run folder.

    Of a remote one, a copy in ``$UGRL_CACHE`` or ``~/.cache/ugrl``.

    Raises:
        CheckpointError: There is no checkpoint.
        StorageError: The storage does not answer.
    """
    where = place(where)
    found: Place | None = where
    if not (where / "state.json").exists():
        ranked = ranking(where / "checkpoints") if best else []
        found = where / "checkpoints" / ranked[0].checkpoint if ranked else latest(where)
        if ranked and found is not None and not (found / "state.json").exists():
            raise CheckpointError(f"{line(where)}: its {BEST} names {found.name}, which is not there")
    if found is None or not found.is_dir():
        raise CheckpointError(
            f"{line(where)}: no checkpoint there; expected a run folder or one of its checkpoints/step_…"
        )
    assert found is not None
    return found.local or _fetched(found)


def _fetched(there: Place) -> Path:
    root = Path(os.environ.get("UGRL_CACHE") or Path.home() / ".cache" / "ugrl")
    copy = root / "checkpoints" / hashlib.sha256(there.where.encode()).hexdigest()[:16] / there.name
    mark = there / "state.json"
    if not (copy / "state.json").is_file() or (copy / "state.json").read_bytes() != mark.read():
        there.download(copy)
    return copy


def read_state(where: str | Path | Place) -> State:
    """Read ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: Missing, broken or of another format.
    """
    file = place(where) / "state.json"
    at = line(file)
    try:
        raw = _json(file)
    except StorageError as error:
        raise CheckpointError(f"{at}: cannot be read: {line(error)}") from None

    def field(key: str) -> Any:
        return foreign.field(raw, key, at, error=CheckpointError)

    if field("format") != FORMAT:
        raise CheckpointError(f"{at}: checkpoint format {brief(raw['format'])}; this version reads {FORMAT}")
    step = foreign.as_int(field("step"), f"{at}: step", least=0, most=_MOST_STEPS, error=CheckpointError)
    if _NAME.fullmatch(file.parent.name) and step != step_of(file.parent.name):
        raise CheckpointError(f"{at}: step {step}; expected that of {file.parent.name}")
    listed = foreign.as_list(field("class_names"), f"{at}: class_names", most=MOST_CLASSES, error=CheckpointError)
    names = [foreign.as_str(name, f"{at}: class_names", most=200, error=CheckpointError) for name in listed]
    metrics = foreign.as_dict(field("metrics"), f"{at}: metrics", error=CheckpointError)
    for key, value in metrics.items():
        if not isinstance(value, float):  # which may be undefined
            foreign.as_number(value, f"{at}: metrics: {brief(key)}", error=CheckpointError)
    data = None if raw.get("data") is None else foreign.as_str(raw["data"], f"{at}: data", error=CheckpointError)
    tree = foreign.as_dict(field("config"), f"{at}: config", error=CheckpointError)
    if not tree or not names:
        raise CheckpointError(
            f"{at}: an empty {'list of class_names' if tree else 'config'}; expected those of the run"
        )
    try:
        config = build(tree)
    except ConfigError as error:
        raise CheckpointError(f"{at}: {line(error)}") from None
    return State(place(where), step, config, tuple(names), {k: float(v) for k, v in metrics.items()}, data)


def _json(file: Place) -> Any:
    # A metric may be undefined (NaN), and is written as Python does.
    data = file.read_small(file.name, error=CheckpointError)
    return foreign.parse_json(data, line(file), error=CheckpointError, nan=True)


def check_data(state: State, data: str, shards: Path | Place) -> None:
    """Refuse to continue a run on other images than it began with.

    Args:
        state: State of the checkpoint; one of an old version has no fingerprint and is accepted.
        data: Fingerprint of the splits that are there now.
        shards: Folder of the images.

    Raises:
        CheckpointError: They differ; names both.
    """
    if state.data is not None and state.data != data:
        raise CheckpointError(
            f"{line(state.path)}: trained on data {brief(state.data)[1:-1]}, while those of {line(shards)} are {data}: "
            "other images; name the shards that the run began with (--data), or start a new run"
        )


def read_part(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part of a checkpoint, on the CPU.

    Raises:
        CheckpointError: The part is missing or damaged.
    """
    file = path / f"{name}.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{line(file)}: cannot be read: no such file")
    try:
        return load_file(file)
    except Exception as error:  # whatever the library makes of damaged bytes
        raise CheckpointError(f"{line(file)}: cannot be read: {line(error)}") from None


def load_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """``load_state_dict`` that names the first key that does not fit.

    Raises:
        CheckpointError: A key is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        if key not in own or key not in tensors:
            state = "unexpected" if key not in own else "missing"
            raise CheckpointError(
                f"{line(where)}: tensor {brief(key)} is {state}: the checkpoint is of another configuration"
            )
        check_tensor(tensors[key], own[key], f"{line(where)}: tensor '{key}'")
    module.load_state_dict(dict(tensors))


def check_tensor(found: Tensor, like: Tensor, where: str) -> None:
    """Refuse a tensor that cannot stand for another one; real numbers may be of another precision.

    Raises:
        CheckpointError: Another shape or kind of numbers.
    """
    if found.shape != like.shape:
        raise CheckpointError(f"{where} has shape {brief(list(found.shape))}; expected {list(like.shape)}")
    if found.dtype != like.dtype and not (found.is_floating_point() and like.is_floating_point()):
        raise CheckpointError(f"{where} holds {found.dtype}; expected {like.dtype}")


def random_state() -> dict[str, Tensor]:
    """The global generators' states. The method draws from none of them; a user's own code may."""
    out = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_random_state(state: Mapping[str, Tensor], where: Path) -> None:
    """Restore what :func:`random_state` returned.

    Raises:
        CheckpointError: The tensors are no random state of this version.
    """
    for key, own in random_state().items():
        if key in state or key == "torch":  # a run may go on where there is no GPU, and the other way round
            if key not in state:
                raise CheckpointError(f"{line(where)}: no random state '{key}'; the checkpoint is damaged")
            check_tensor(state[key], own, f"{line(where)}: random state '{key}'")
    try:
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{line(where)}: a random state that cannot be: {line(error)}") from None
