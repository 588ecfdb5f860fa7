"""Loaders for tests."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ugrl.config import DataConfig
from ugrl.data.cache import PixelCache
from ugrl.data.loader import LocalLoader
from ugrl.data.reader import ShardReader
from ugrl.data.spec import LoaderSpec

SETTINGS = {f.name for f in fields(DataConfig)}


def changed(spec: LoaderSpec, **options: Any) -> LoaderSpec:
    """A specification with other values of its own fields, or of those of its section ``data``."""
    data = {k: options.pop(k) for k in [*options] if k in SETTINGS}
    return replace(spec, data=replace(spec.data, **data), **options)


def local(
    reader: ShardReader, crop: int, num_classes: int, *, cache: PixelCache | None = None, **options: Any
) -> LocalLoader:
    """A local loader; options are fields of the specification, or of its section ``data``."""
    own = {k: options.pop(k) for k in ("seed", "global_batch")}
    spec = LoaderSpec(reader.manifest.root, reader.split, num_classes, data=DataConfig(crop=crop), **own)
    return LocalLoader(changed(spec, **options), reader, cache=cache)
