"""Checkpoints: safetensors and JSON, written to a temporary name and renamed.

Layout of a run folder::

    OUT/config.yaml
    OUT/metrics.jsonl
    OUT/checkpoints/step_00000100/
        state.json              format, step, config, class names, metrics
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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ugrl.config import Config, build
from ugrl.data.shards import sync, write_text
from ugrl.errors import CheckpointError, ConfigError
from ugrl.storage import Place, StorageError, place

FORMAT = 1
PREFIX = "step_"
BEST = "best.json"
PARTS = ("model", "prototypes", "optimizer", "random")


@dataclass(frozen=True, slots=True)
class State:
    """What ``state.json`` holds."""

    path: Place
    step: int
    config: Config
    class_names: tuple[str, ...]
    metrics: dict[str, float]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save(
    folder: Path,
    step: int,
    *,
    config: dict[str, Any],
    class_names: tuple[str, ...],
    metrics: Mapping[str, float],
    parts: Mapping[str, Mapping[str, Tensor]],
) -> Path:
    """Write ``folder/step_…`` atomically.

    Args:
        folder: ``OUT/checkpoints``.
        step: Steps done.
        config: The configuration as a plain dict.
        class_names: Foreground classes.
        metrics: The last validation's.
        parts: Tensors by file name, see the module's text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{step:08d}"
    tmp = folder / f".{final.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        for name, tensors in parts.items():
            _write_part(tmp / f"{name}.safetensors", tensors)
        write_json(
            tmp / "state.json",
            {
                "format": FORMAT,
                "step": step,
                "class_names": list(class_names),
                "metrics": dict(metrics),
                "config": config,
            },
        )
        if final.exists():
            shutil.rmtree(final)
        os.replace(tmp, final)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)  # a full disk needs the room
        raise
    sync(folder)
    return final


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
    best = best_names(folder)
    for old in _all(folder)[:-keep]:
        if old.name not in best:
            shutil.rmtree(old)


def best_names(folder: Path) -> set[str]:
    """Names of the best checkpoints in ``OUT/checkpoints``, if any were marked."""
    try:
        tree = json.loads((folder / BEST).read_text(encoding="utf-8"))
        return {str(tree["checkpoint"]), *(str(r["checkpoint"]) for r in tree.get("ranking", []))}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def sweep(folder: Path) -> list[str]:
    """Remove what a dead writer left half-written in ``OUT/checkpoints``; returns the names."""
    found = sorted(folder.glob(f".{PREFIX}*.tmp")) if folder.is_dir() else []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and (p / "state.json").is_file())


def best_name(folder: str | Path | Place) -> str | None:
    """Name of the best checkpoint in ``OUT/checkpoints``, if one was marked."""
    try:
        return str(json.loads((place(folder) / BEST).read())["checkpoint"])
    except (StorageError, ValueError, KeyError):
        return None


def latest(out: str | Path | Place) -> Place | None:
    """The newest whole checkpoint of a run folder, or ``None``.

    Raises:
        StorageError: The storage does not answer.
    """
    folder = place(out) / "checkpoints"
    if folder.local is not None:
        found = _all(folder.local)
        return place(found[-1]) if found else None
    for name in reversed(folder.names()):
        if name.startswith(PREFIX) and (folder / name / "state.json").exists():
            return folder / name
    return None


def find(where: str | Path | Place, *, best: bool = False) -> Path:
    """A checkpoint by its own path, or the newest (or best) one of a run folder.

    Of a remote one, a copy in ``$UGRL_CACHE`` or ``~/.cache/ugrl``.

    Raises:
        CheckpointError: Nothing there.
        StorageError: The storage does not answer.
    """
    where = place(where)
    found: Place | None = where
    if not (where / "state.json").exists():
        name = best_name(where / "checkpoints") if best else None
        found = where / "checkpoints" / name if name else latest(where)
        if found is None or not found.is_dir():
            raise CheckpointError(
                f"{where}: no checkpoint there; expected a run folder or one of its checkpoints/step_…"
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
    try:
        raw = json.loads(file.read())
    except (StorageError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{where}: checkpoint format {raw.get('format')!r}; this version reads {FORMAT}")
    try:
        config = build(raw["config"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return State(place(where), int(raw["step"]), config, tuple(raw["class_names"]), dict(raw["metrics"]))


def read_part(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part of a checkpoint, on the CPU.

    Raises:
        CheckpointError: Missing or truncated.
    """
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None


def load_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """``load_state_dict`` that names the first key that does not fit.

    Raises:
        CheckpointError: A key is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    for key in own.keys() | tensors.keys():
        if key not in own or key not in tensors:
            state = "unexpected" if key not in own else "missing"
            raise CheckpointError(f"{where}: tensor '{key}' is {state}: the checkpoint is of another configuration")
        if own[key].shape != tensors[key].shape:
            raise CheckpointError(
                f"{where}: tensor '{key}' has shape {list(tensors[key].shape)}; expected {list(own[key].shape)}"
            )
    module.load_state_dict(dict(tensors))


def random_state() -> dict[str, Tensor]:
    """The global generators' states. The method draws from none of them; a user's own code may."""
    out = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
