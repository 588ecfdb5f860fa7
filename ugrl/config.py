"""What a run is: one typed, frozen tree, validated as a whole before anything starts.

YAML goes in, a plain dict comes out, and the same dotted paths (``method.uncertainty.alpha``) name
a command-line override and an axis of a search space. An unknown key is refused and the nearest
one is named.

>>> cfg = build({"train": {"steps": 100, "cls_warmup_iters": 20, "lr_warmup_iters": 10}})
>>> cfg.train.steps, cfg.method.contrast.tau
(100, 0.1)
>>> build({"trian": {}})
Traceback (most recent call last):
ugrl.errors.ConfigError: unknown config key 'trian'; did you mean 'train'?
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ugrl import foreign
from ugrl.errors import ConfigError
from ugrl.model.specs import SPECS, least_crop
from ugrl.secrets import HIDDEN, has_credentials, masked
from ugrl.text import brief, line

T = TypeVar("T")


# Scales of an input: beyond these a picture is a blot, or does not fit any memory.
SCALES = {"ge": 0.1, "le": 8.0}


def _num(default: Any, **bounds: float) -> Any:
    """A numeric field, or a list of numbers, with bounds among ``ge, gt, le, lt``."""
    return field(default=default, metadata={"bounds": bounds})


# A number of steps, or (between 0 and 1) a share of ``train.steps``: :meth:`TrainConfig.at` makes steps of it.
Steps = int | float


@dataclass(frozen=True, slots=True)
class ShapesConfig:
    """The generated data set, used when ``data.source`` is ``shapes`` and no shards are given."""

    train: int = _num(1200, ge=1, le=10**7)
    val: int = _num(200, ge=1, le=10**7)
    tune_val: float = _num(0.15, gt=0, lt=1)
    size: int = _num(64, ge=32, le=4096)
    difficulty: float = _num(0.5, ge=0, le=1)
    seed: int = _num(0, ge=0)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the shards are and how a sample is cut from an image."""

    source: Literal["shards", "shapes"] = "shards"
    shards: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    crop: int = _num(512, ge=32)
    scale_min: float = _num(0.5, gt=0, le=64)
    scale_max: float = _num(2.0, gt=0, le=64)
    mirror: bool = True
    threads: int = _num(4, ge=0)
    prefetch: int = _num(4, ge=1)
    on_device: Literal["auto", "none", "normalize", "augment"] = "auto"
    cache_mb: int = _num(0, ge=0)
    cache_dir: str | None = None
    cache_disk_mb: int = _num(0, ge=0)
    storage_patience_s: float = _num(120.0, ge=0)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The network."""

    backbone: Literal["tiny", "mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5"] = "mit_b1"
    weights: str | None = None
    decoder_dim: int = _num(256, ge=8)
    pooling: Literal["gmp", "gap"] = "gmp"
    affinity: Literal["linear", "mlp"] = "linear"
    norm: Literal["sync_batch", "group"] = "sync_batch"
    drop_path: float = _num(0.1, ge=0, lt=1)
    dropout: float = _num(0.1, ge=0, lt=1)


@dataclass(frozen=True, slots=True)
class CamConfig:
    """CAM and pseudo-labels."""

    scales: tuple[float, ...] = _num((1.0, 0.5, 1.5), **SCALES)
    mirror: bool = True
    share: Literal["exact", "warmup", "always", "never"] = "exact"
    high: float = _num(0.55, gt=0, lt=1)
    low: float = _num(0.35, gt=0, lt=1)
    refine: Literal["par", "none"] = "par"
    par_iterations: int = _num(10, ge=1)
    par_dilations: tuple[int, ...] = _num((1, 2, 4, 8, 12, 24), ge=1)
    propagate: Literal["none", "affinity"] = "none"
    propagate_after: Steps = _num(0.3, ge=0)


@dataclass(frozen=True, slots=True)
class UncertaintyConfig:
    """Prototypes, uncertainty and the weights made of it (Eqs. 2-8)."""

    alpha: float = _num(5.0, gt=0)
    beta: float = _num(5.0, gt=0)
    eta: float = _num(0.99, ge=0, lt=1)
    d_cls: int = _num(1024, ge=2)
    encoding: Literal["linear", "fourier"] = "linear"
    center: bool = True
    weighting: Literal["inverse_exp", "exp_decay", "none"] = "inverse_exp"
    u_min: float = _num(0.05, gt=0)
    bound: float = _num(3.0, gt=1)
    radius: int = _num(8, ge=1)


@dataclass(frozen=True, slots=True)
class ContrastConfig:
    """Reliable pool and contrastive loss (Eqs. 9-11)."""

    tau: float = _num(0.1, gt=0)
    keep: float = _num(0.35, gt=0, le=1)
    d_seg: int = _num(512, ge=2)
    pool: Literal["stratified", "ranked", "random"] = "stratified"
    scope: Literal["image", "batch"] = "image"
    tile: int | None = _num(None, ge=1)


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The weighted sum (Eq. 13)."""

    lambda1: float = _num(0.1, ge=0)
    lambda2: float = _num(0.1, ge=0)
    lambda3: float = _num(0.1, ge=0)
    balance: Literal["none", "fg_bg"] = "none"


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """The method; ``setting`` is a row of the paper's Table 3."""

    setting: Literal["IV", "III", "II", "I", "Base"] = "IV"
    cam: CamConfig = field(default_factory=CamConfig)
    uncertainty: UncertaintyConfig = field(default_factory=UncertaintyConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Schedule and optimizer."""

    steps: int = _num(20000, ge=1)
    global_batch: int = _num(8, ge=1)
    lr: float = _num(6e-5, gt=0)
    head_lr_ratio: float = _num(10.0, gt=0)
    weight_decay: float = _num(0.01, ge=0)
    norm_lr_mult: float = _num(0.0, ge=0)
    power: float = _num(1.0, gt=0)
    lr_warmup_iters: Steps = _num(0.075, ge=0)
    lr_warmup_ratio: float = _num(1e-6, gt=0, le=1)
    cls_warmup_iters: Steps = _num(0.1, ge=0)
    grad_clip: float = _num(0.0, ge=0)
    amp: Literal["auto", "off"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    stochastic: bool = True
    micro_batch: int = _num(0, ge=0)
    deterministic: bool = False
    nan_patience: int = _num(3, ge=1)
    stall_s: float = _num(600.0, gt=0)
    record_ids: bool = False
    mlflow: str | None = None
    cpu_threads: int = _num(0, ge=0)
    log_every: int = _num(20, ge=1)
    eval_every: Steps = _num(2000, gt=0)
    picture_every: Steps = _num(2000, gt=0)
    checkpoint_every: Steps = _num(1000, gt=0)
    keep_checkpoints: int = _num(2, ge=1)
    keep_best: int = _num(1, ge=0)

    def at(self, value: Steps) -> int:
        """A number of steps: a share is one of the whole run, and at least one step.

        >>> train = TrainConfig(steps=200)
        >>> train.at(0.1), train.at(0.001), train.at(30), train.at(0)
        (20, 1, 30, 0)
        """
        return max(1, round(value * self.steps)) if 0 < value < 1 else int(value)


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Validation and prediction."""

    cam_background: float = _num(0.45, gt=0, lt=1)
    cam: bool = True
    refined_cam: bool = False
    seg_scales: tuple[float, ...] = _num((1.0,), **SCALES)
    mirror: bool = False
    crf: bool = False
    amp: Literal["off", "auto"] = "off"
    limit: int = _num(0, ge=0)
    objective: str = "auto"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Where a run runs. Nothing here changes what is computed."""

    workers: int = _num(0, ge=0)
    min_workers: int = _num(0, ge=0)
    cpus_per_worker: float = _num(1.0, gt=0)
    gpus_per_worker: float | None = _num(None, ge=0)  # null: one where the cluster has any
    data_cpus: float = _num(1.0, ge=0)
    data_tasks: int = _num(0, ge=0)
    max_failures: int = _num(2, ge=0)
    prefetch_batches: int = _num(4, ge=1)
    storage: str | None = None
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    start_timeout_s: float = _num(60.0, gt=0)
    stop_s: float = _num(25.0, ge=0)
    busy_s: float = _num(300.0, ge=0)
    head_s: float = _num(45.0, gt=0)
    address: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A run."""

    name: str = "run"
    seed: int = _num(0, ge=0)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


MOST_NAMED = 24


def nearest(word: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest option, else the list of options."""
    options = [line(option, 60) for option in options]
    close = difflib.get_close_matches(word[:100], options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; expected one of {', '.join(options[:MOST_NAMED])}{', …' if len(options) > MOST_NAMED else ''}"


def _type_name(hint: Any) -> str:
    if hint == Steps:
        return "a number of steps, or a share of train.steps below 1"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_type_name(get_args(hint)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text of one line"}
    return str(names.get(hint, getattr(hint, "__name__", str(hint))))


def _number(value: Any) -> float | None:
    """A finite float, also of text: a value may come from a shell or from a quoted word."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# What 64 bits hold: beyond it no generator takes a seed, and no array a size.
MOST_INT = 2**63 - 1
MOST_LIST, MOST_CHARACTERS = 1000, 4096
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _coerce(path: str, hint: Any, value: Any) -> Any:
    """``value`` as ``hint``, or a ConfigError that names the path, the value and what was expected."""
    origin = get_origin(hint)
    if origin is Literal and isinstance(value, str) and value in get_args(hint):
        return value
    if hint == Steps:
        number = None if isinstance(value, bool) else _number(value)
        if number is not None and (number < 1 or number.is_integer()) and abs(number) <= MOST_INT:
            return int(number) if number.is_integer() else number
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        inner = next(a for a in get_args(hint) if a is not type(None))
        return _coerce(path, inner, value)
    if origin is tuple and isinstance(value, list | tuple) and 0 < len(value) <= MOST_LIST:
        return tuple(_coerce(f"{path}[{i}]", get_args(hint)[0], v) for i, v in enumerate(value))
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if hint is float and number is not None:
            return number
        if hint is int and number is not None and number.is_integer() and abs(number) <= MOST_INT:
            return int(value) if isinstance(value, int) else int(number)
    if hint is str and isinstance(value, str) and len(value) <= MOST_CHARACTERS and not _CONTROL.search(value):
        return value
    raise ConfigError(f"config key '{path}' is {_show(value)}; expected {_type_name(hint)}")


def _show(value: Any) -> str:
    """A value as the file says it, bounded and without credentials."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return masked(brief(value))


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _check_bounds(path: str, value: Any, bounds: Mapping[str, float]) -> None:
    ok = {
        "ge": lambda v, b: v >= b,
        "gt": lambda v, b: v > b,
        "le": lambda v, b: v <= b,
        "lt": lambda v, b: v < b,
    }
    if not all(ok[k](value, b) for k, b in bounds.items()):
        wanted = " and ".join(f"{_SIGNS[k]} {b:g}" for k, b in bounds.items())
        raise ConfigError(f"config key '{path}' is {_show(value)}; expected {wanted}")


def _build(cls: type[T], tree: Any, prefix: str) -> T:
    if not isinstance(tree, Mapping):
        raise _no_section(prefix, tree)
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in known:
            hint = _elsewhere(str(key)) or nearest(str(key), known)
            raise ConfigError(f"unknown config key '{prefix}{line(key, 60)}'{hint}")
        path = f"{prefix}{key}"
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, path + ".")
        else:
            values[key] = _coerce(path, hints[key], value)
            bounds = known[key].metadata.get("bounds")
            if bounds and values[key] is not None:
                found = values[key] if isinstance(values[key], tuple) else (values[key],)
                for one in found:
                    _check_bounds(path, one, bounds)
    return cls(**values)


def _no_section(prefix: str, found: Any) -> ConfigError:
    name = f"config section '{prefix.rstrip('.')}'" if prefix else "the configuration"
    return ConfigError(f"{name} is {_show(found)}; expected keys and values")


def _elsewhere(key: str) -> str:
    """A hint where a key exists, but in another section."""
    places = [p for p in paths() if p.rsplit(".", 1)[-1] == key]
    return f"; did you mean '{places[0]}'?" if places else ""


def build(tree: Mapping[str, Any]) -> Config:
    """The typed tree of a nested dict.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of bounds, or values that do not
            go together; the message names the key, the value and what was expected.
    """
    cfg = _build(Config, tree, "")
    _check_together(cfg)
    return cfg


def _check_together(cfg: Config) -> None:
    d, t, c = cfg.data, cfg.train, cfg.method.cam
    backbone = cfg.model.backbone
    crop = least_crop(backbone, c.scales) if min(c.scales) > 0 else 0
    rules = [
        (d.scale_min <= d.scale_max, f"data.scale_min is {d.scale_min}; expected ≤ data.scale_max {d.scale_max}"),
        (c.low <= c.high, f"method.cam.low is {c.low}; expected ≤ method.cam.high {c.high}"),
        (1.0 in c.scales, f"method.cam.scales is {list(c.scales)}; expected 1.0 among them: it carries the affinity"),
        (
            bool(cfg.name) and "/" not in cfg.name and cfg.name not in (".", "..") and len(cfg.name.encode()) <= 200,
            f"name is {_show(cfg.name)}; expected a name that a folder can have",
        ),
        (
            d.crop >= crop,
            f"data.crop is {d.crop}: at {min(c.scales):g}, the smallest of method.cam.scales, it is smaller than the "
            f"{SPECS[backbone].min_size} px that {backbone} needs; expected data.crop ≥ {crop}",
        ),
        (
            t.at(t.cls_warmup_iters) < max(2, t.steps),
            f"train.cls_warmup_iters is {t.cls_warmup_iters}; expected < train.steps {t.steps}",
        ),
        (
            t.at(t.lr_warmup_iters) < max(2, t.steps),
            f"train.lr_warmup_iters is {t.lr_warmup_iters}; expected < train.steps {t.steps}",
        ),
    ]
    for ok, message in rules:
        if not ok:
            raise ConfigError(f"config key {message}")


def to_dict(cfg: Any) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars, ready for YAML or JSON."""
    out: dict[str, Any] = {}
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        out[f.name] = to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return out


def public_dict(cfg: Config) -> dict[str, Any]:
    """:func:`to_dict` as it may be written down or shown: credentials within it are hidden."""
    return public_tree(to_dict(cfg))


def public_tree(value: Any) -> Any:
    """A tree whose texts hold no credentials."""
    if isinstance(value, dict):
        return {k: public_tree(v) for k, v in value.items()}
    return masked(value) if isinstance(value, str) and has_credentials(value) else value


def check_revealed(cfg: Config, where: object) -> None:
    """Refuse a configuration that was read back from ``where`` without its credentials.

    Raises:
        ConfigError: Names the key to give again.
    """
    if cfg.train.mlflow is not None and HIDDEN in cfg.train.mlflow:
        raise ConfigError(
            f"{line(where)}: train.mlflow is {cfg.train.mlflow}: credentials are not written down; give it again, "
            "train.mlflow=…, or do without, train.mlflow=null"
        )


class _Quoting(yaml.SafeDumper):
    """Quotes every text that some version of YAML reads as something else (``off``, ``010``, ``1e-3``, ``y``)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_BARE = re.compile(r"(?!(?:true|false|yes|no|on|off|null|none|y|n|inf|nan)$)[A-Za-z][\w./-]*", re.IGNORECASE | re.ASCII)


def _quoted(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if _BARE.fullmatch(value) else '"')


_Quoting.add_representer(str, _quoted)


def dump(tree: Any, **layout: Any) -> str:
    r"""YAML that versions 1.1 and 1.2 read alike: :func:`ugrl.foreign.parse_yaml` gives back the same tree.

    >>> dump({"amp": "off", "shards": "/data/010", "lr": 1e-05})
    'amp: "off"\nshards: "/data/010"\nlr: 1.0e-05\n'
    """
    return yaml.dump(tree, Dumper=_Quoting, sort_keys=False, allow_unicode=True, **{"width": 10**9, **layout})


def paths(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted path of the tree with its default value.

    >>> paths()["method.contrast.keep"]
    0.35
    """
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            out.update(paths(hints[f.name], f"{prefix}{f.name}."))
        else:
            out[prefix + f.name] = f.default if f.default is not MISSING else None
    return out


def get(cfg: Config, path: str) -> Any:
    """The value at a dotted path."""
    node: Any = cfg
    for part in path.split("."):
        node = getattr(node, part)
    return node


def check_path(path: str) -> None:
    """Refuse a dotted path that names no value of the tree, naming the nearest one.

    >>> check_path("method.contrast.tua")
    Traceback (most recent call last):
    ugrl.errors.ConfigError: unknown config key 'method.contrast.tua'; did you mean 'method.contrast.tau'?
    """
    known = paths()
    if path not in known:
        raise ConfigError(f"unknown config key '{path}'{_elsewhere(path.rsplit('.', 1)[-1]) or nearest(path, known)}")


def override(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with the values at dotted paths replaced (paths are checked)."""
    out = dict(tree)
    for path, value in values.items():
        check_path(path)
        node = out
        *sections, leaf = path.split(".")
        for i, part in enumerate(sections):
            inner = node.get(part, {})
            if not isinstance(inner, Mapping):
                raise _no_section(".".join(sections[: i + 1]), inner)
            node[part] = dict(inner)
            node = node[part]
        node[leaf] = value
    return out


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` as ``{"train.steps": 100}``; values are read as YAML."""
    out: dict[str, Any] = {}
    for word in words:
        path, eq, text = word.partition("=")
        shown = masked(line(word, 80))
        if not eq or not path.strip():
            raise ConfigError(f"override '{shown}' is not section.key=value")
        out[path.strip()] = foreign.parse_yaml(text, f"override '{shown}'")
    return out


def find_yaml(name: str | Path, package: str = "ugrl.configs") -> Path:
    """A YAML file by path, else by its name among those shipped in ``package``.

    ``configs/shapes.yaml``, ``shapes.yaml`` and ``shapes`` all find the shipped file when no such
    path exists.
    """
    path, folder = Path(name), resources.files(package)
    if _is(Path.is_file, path):
        return path
    stem = path.name.removesuffix(".yaml")
    have = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    # A folder that is not there is no way to spell a shipped name: somebody's own file would be another one in silence.
    if stem in have and str(path.parent) in (".", package.rpartition(".")[2], package.replace(".", "/")):
        return Path(str(folder)) / f"{stem}.yaml"
    if _is(Path.exists, path):
        return path  # no regular file: whoever reads it says so
    raise ConfigError(f"no file '{line(name, 120)}', and no shipped one of that name{nearest(stem, have)}")


def _is(what: Callable[[Path], bool], path: Path) -> bool:
    try:
        return what(path)
    except (OSError, ValueError):  # a name too long, or with a NUL; a folder that may not be entered
        return False


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; one clear line where it is not one."""
    return as_tree(foreign.read_text(path, "configuration", error=ConfigError), line(path))


def as_tree(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping from text.

    Raises:
        ConfigError: Not YAML, not a mapping, or empty: what is missing is not what is left at its defaults.
    """
    tree = foreign.parse_yaml(text, where)
    if tree is None:
        raise ConfigError(f"{where}: is empty; expected keys and values")
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys and values at the top level, found {_show(tree)}")
    return tree


def load(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override and validate a configuration (see :func:`find_yaml` for how it is found).

    Raises:
        ConfigError: As :func:`build`; the message names the file.
    """
    path = find_yaml(name)
    tree = read_yaml(path)
    try:
        return build(override(tree, overrides or {}))
    except ConfigError as error:
        raise ConfigError(f"{line(path.name)}: {error}") from None
