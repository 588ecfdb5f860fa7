"""Folders that may be anywhere: a local disk, a network mount, or what a pyarrow filesystem URI names.

``s3://bucket/path``, ``gs://bucket/path`` and whatever else pyarrow knows; credentials and endpoints come from the
environment or from the URI's query (``s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:5000``). A local place
is an ordinary path and is used as one.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs as pafs

from ugrl import foreign, secrets
from ugrl.errors import AwayError, UgrlError, free_text, is_full
from ugrl.files import replacing, write_whole
from ugrl.text import brief, line, nearest

T = TypeVar("T")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
# Seconds; an absent server is to be noticed by us, who then wait as long as the user wants.
CONNECT_S, REQUEST_S = 3.0, 15.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


class StorageError(UgrlError):
    """A place that cannot be read or written.

    Attributes:
        lasting: Whether waiting cannot help: nothing of that name, or no permission.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting
        self.status = UgrlError.status if lasting else AwayError.status


def is_uri(where: object) -> bool:
    """Whether something names a place by a scheme.

    >>> is_uri("s3://bucket/runs"), is_uri("runs/voc"), is_uri("file:///data")
    (True, False, True)
    """
    return bool(_SCHEME.match(str(where)))


@lru_cache(maxsize=32)
def _filesystem(scheme: str, netloc: str, query: str) -> tuple[Any, str]:
    """The filesystem of a URI's root, and the part of its path that stands for the root."""
    try:
        if scheme == "s3":
            return _s3(netloc, query)
        found, path = pafs.FileSystem.from_uri(urlunsplit((scheme, netloc, "/", query, "")))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StorageError(f"{secrets.short(f'{scheme}://{netloc}')}: {_line(error)}", lasting=True) from None
    return found, path.strip("/")


def _s3(netloc: str, query: str) -> tuple[Any, str]:
    """The filesystem of ``s3://netloc/?query``, as pyarrow makes it but with our time limits, and its bucket."""
    user, _, bucket = netloc.rpartition("@")
    name, _, word = user.partition(":")
    asked = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(asked.keys() - {*_S3_TEXTS, *_S3_FLAGS}):
        raise ValueError(f"unknown option {brief(unknown[0])}{nearest(unknown[0], [*_S3_TEXTS, *_S3_FLAGS])}")
    texts = {key: asked[key] for key in _S3_TEXTS if asked.get(key)}
    if "endpoint_override" not in texts:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            texts["endpoint_override"] = endpoint
        elif "region" not in texts:
            texts["region"] = pafs.resolve_s3_region(bucket)
    made = pafs.S3FileSystem(
        **texts,
        **{key: asked[key].lower() in ("true", "1") for key in _S3_FLAGS if key in asked},
        access_key=unquote(name) or None,
        secret_key=unquote(word) or None,
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=2),
    )
    return made, bucket


# What the query of an S3 URI may say.
_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_FLAGS = ("allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open")


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return secrets.masked(line(text.splitlines()[0])) if text else type(error).__name__


def _asked(path: Path, ask: Callable[[Path], T]) -> T:
    """What a local path answers; one that may not be entered, or is no name at all, in one line."""
    try:
        return ask(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else _line(error)
        raise StorageError(f"{line(path)}: {why}", lasting=lasting(error)) from None


def lasting(error: BaseException) -> bool:
    """Whether an error is one that waiting cannot cure."""
    if isinstance(error, StorageError):
        return error.lasting
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    text = str(error)
    return any(word in text for word in ("NO_SUCH_BUCKET", "ACCESS_DENIED", "NO_SUCH_KEY", "INVALID_ACCESS_KEY"))


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or file, local or remote; cheap, immutable, the same in every process.

    Attributes:
        where: An absolute path, or a URI without a trailing slash.
    """

    where: str

    @property
    def local(self) -> Path | None:
        """The path, where it is one."""
        return None if is_uri(self.where) else Path(self.where)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(urlsplit(self.where).path if is_uri(self.where) else self.where).name

    @property
    def parent(self) -> Place:
        """The folder that holds it."""
        if self.local is not None:
            return Place(str(self.local.parent))
        u = urlsplit(self.where)
        return Place(urlunsplit((u.scheme, u.netloc, str(PurePosixPath(u.path).parent), u.query, "")))

    def __truediv__(self, name: str) -> Place:
        if self.local is not None:
            return Place(str(self.local / name))
        u = urlsplit(self.where)
        return Place(urlunsplit((u.scheme, u.netloc, f"{u.path.rstrip('/')}/{name}", u.query, "")))

    def __str__(self) -> str:
        """The path, or the URI without credentials and options."""
        return self.where if self.local is not None else secrets.short(self.where)

    __repr__ = __str__

    @property
    def public(self) -> str:
        """What may be written down to find the place again: the path, or the URI without credentials.

        >>> place("s3://key:secret@bucket/runs?region=eu-west-1").public
        's3://bucket/runs?region=eu-west-1'
        """
        return self.where if self.local is not None else secrets.public(self.where)

    def __fspath__(self) -> str:
        """The path, for what takes nothing else.

        Raises:
            StorageError: The place is remote.
        """
        if self.local is None:
            raise StorageError(f"{self}: is on a remote storage; expected a local path", lasting=True)
        return self.where

    def filesystem(self) -> tuple[Any, str]:
        """The pyarrow filesystem, and this place's path in it."""
        if self.local is not None:
            return pafs.LocalFileSystem(), str(self.local)
        u = urlsplit(self.where)
        found, root = _filesystem(u.scheme, u.netloc, u.query)
        return found, "/".join(part for part in (root, unquote(u.path).strip("/")) if part)

    def _info(self) -> Any:
        found, path = self.filesystem()
        try:
            return found.get_file_info(path)
        except (OSError, pa.ArrowException) as error:
            raise self._error(error) from None

    def _error(self, error: BaseException) -> StorageError:
        free = f"; {free_text(self.local)}" if self.local is not None and is_full(error) else ""
        return StorageError(f"{self}: {_line(error)}{free}", lasting=lasting(error))

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        if self.local is not None:
            return _asked(self.local, Path.exists)
        return self._info().type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        if self.local is not None:
            return _asked(self.local, Path.is_dir)
        return self._info().type == pafs.FileType.Directory

    def names(self) -> list[str]:
        """Names of what the folder holds, sorted; none where there is no folder."""
        if self.local is not None:
            return _asked(self.local, lambda p: sorted(q.name for q in p.iterdir()) if p.is_dir() else [])
        found, path = self.filesystem()
        try:
            infos = found.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        except (OSError, pa.ArrowException) as error:
            raise self._error(error) from None
        return sorted(info.base_name for info in infos if info.base_name)

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that the folder holds, by name; empty where there is no folder."""
        if self.local is not None:
            return _asked(
                self.local,
                lambda p: {q.name: q.stat().st_size for q in p.iterdir() if q.is_file()} if p.is_dir() else {},
            )
        found, path = self.filesystem()
        try:
            infos = found.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        except (OSError, pa.ArrowException) as error:
            raise self._error(error) from None
        return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

    def read(self) -> bytes:
        """The contents of a file.

        Raises:
            StorageError: Absent, or the storage does not answer.
        """
        try:
            if self.local is not None:
                return self.local.read_bytes()
            found, path = self.filesystem()
            with found.open_input_file(path) as file:
                return bytes(file.read())
        except (OSError, pa.ArrowException) as error:
            raise self._error(error) from None

    def read_small(self, what: str, *, most: int = foreign.MOST_TEXT, error: foreign.Refusal) -> bytes:
        """The contents of a regular file of a bounded size.

        Args:
            what: It is, for the message.
            most: Largest size that is read, in bytes.
            error: Class of the exception that refuses it.

        Raises:
            StorageError: A remote storage has no such file, or does not answer.
        """
        if self.local is not None:
            return foreign.read_bytes(self.local, what, most=most, error=error)
        size = self._info().size or 0
        if size > most:
            raise error(f"{self}: {size} bytes; expected at most {most} of a {what}")
        return self.read()

    def write(self, data: bytes) -> None:
        """Make this a file of these contents: a reader sees the old ones or the new ones, never half of them.

        Raises:
            StorageError: The storage does not take it.
        """
        try:
            if self.local is not None:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.local, data)
                return
            found, path = self.filesystem()
            with found.open_output_stream(path) as file:  # an object appears when it is closed
                file.write(data)
        except (OSError, pa.ArrowException) as error:
            raise self._error(error) from None

    def delete(self) -> None:
        """Remove a file, or a folder with all it holds; what is absent is fine."""
        try:
            if self.local is not None:
                if self.local.is_dir():
                    shutil.rmtree(self.local)
                else:
                    self.local.unlink(missing_ok=True)
                return
            found, path = self.filesystem()
            kind = self._info().type
            if kind == pafs.FileType.File:
                found.delete_file(path)
            elif kind == pafs.FileType.Directory:
                found.delete_dir(path)
        except (OSError, pa.ArrowException) as error:
            if not isinstance(error, FileNotFoundError):
                raise self._error(error) from None

    def upload(self, folder: Path, *, last: str) -> None:
        """Make this a folder of a local folder's files.

        Args:
            folder: A local folder of files, without further folders.
            last: Of them, the one that marks the rest as whole: it is taken away first, and written last.
        """
        files = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.name == last)
        (self / last).delete()
        for file in files:
            (self / file.name).write(file.read_bytes())

    def download(self, to: Path) -> Path:
        """Copy this file or folder (files alone) to a local path, whole or not at all; returns the path."""
        try:
            return self._download(to)
        except OSError as error:  # of this machine's disk: the storage's own are told apart
            raise StorageError(
                f"{line(error.filename or to)}: {error.strerror or _line(error)}", lasting=lasting(error)
            ) from None

    def _download(self, to: Path) -> Path:
        to.parent.mkdir(parents=True, exist_ok=True)
        with replacing(to, durable=False) as draft:
            if self.is_dir():
                draft.mkdir()
                for name in self.names():
                    (draft / name).write_bytes((self / name).read())
            else:
                draft.write_bytes(self.read())
            if to.is_dir():
                shutil.rmtree(to)
        return to


def place(where: str | Path | Place) -> Place:
    """A place by path or URI; a relative path counts from here.

    >>> str(place("s3://bucket/runs/") / "voc")
    's3://bucket/runs/voc'
    """
    if isinstance(where, Place):
        return where
    text = str(where)
    if is_uri(text):
        try:
            u = urlsplit(text)
        except ValueError as error:
            raise StorageError(f"{secrets.masked(brief(text))}: no URI ({_line(error)})", lasting=True) from None
        if u.fragment or (u.scheme == "file" and u.query):
            raise StorageError(
                f"{line(secrets.public(text))}: # and ? mean something in a URI; write %23, %3F", lasting=True
            )
        if not u.netloc and u.scheme != "file":
            raise StorageError(f"{line(text)}: names no bucket or host; expected {u.scheme}://NAME/…", lasting=True)
        if u.scheme == "file":
            return Place(str(Path(unquote(u.path)).absolute()))
        return Place(urlunsplit((u.scheme, u.netloc, u.path.rstrip("/"), u.query, "")))
    return Place(str(Path(text).absolute()))


def retry(what: str, action: Callable[[], T], *, patience_s: float, log: Callable[[str], None] | None = None) -> T:
    """Do something on a storage that may be away or full for a while.

    Args:
        what: Name of the work, for the log.
        action: Raises OSError or StorageError where the storage refuses.
        patience_s: How long it is tried again, with growing pauses.
        log: Told when waiting begins, and when it is over.

    Raises:
        StorageError: It refused for that long; names the last refusal.
        OSError, StorageError: One that waiting cannot cure, at once.
    """
    until, pause, waited = time.monotonic() + patience_s, FIRST_PAUSE_S, False
    while True:
        try:
            made = action()
        except (OSError, StorageError) as error:
            now = time.monotonic()
            if lasting(error) and not _gone(error):
                raise
            if now + pause > until:
                raise StorageError(f"{_line(error)}, for {patience_s:g} s (data.storage_patience_s)") from None
            if not waited and log is not None:
                log(f"{what}: {_line(error)}; trying again for up to {patience_s:g} s")
            waited = True
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        if waited and log is not None:
            log(f"{what}: the storage is back")
        return made


def _gone(error: BaseException) -> bool:
    """A mount that is away shows as a folder that is not there, or as a stale handle."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO)
