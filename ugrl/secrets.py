"""Credentials in places and addresses: they reach no file, no log and no printed command.

One rule, used wherever a URI is written down or shown: user information is left out, and so is the value of a query
parameter whose name says that it is secret.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
# user:password@ after a scheme; a password may hold an @ of its own, so that the last one before the path counts.
_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"]*@")
_QUERY = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:secret|token|passw|pwd|credential|signature|access_?key|api_?key|private_?key)[\w.-]*"
    r"|sig|key|auth)=)[^&#;\s'\"]+",
    re.IGNORECASE,
)


def masked(text: object) -> str:
    """A text in which every credential of every URI is hidden.

    >>> masked("see s3://key:word@bucket/runs?region=eu&secret_key=abc now")
    'see s3://***@bucket/runs?region=eu&secret_key=*** now'
    """
    return _QUERY.sub(rf"\g<name>{HIDDEN}", _USER.sub(rf"\g<scheme>{HIDDEN}@", str(text)))


def public(uri: object) -> str:
    """A URI as it may be written down to find the place again: without credentials.

    >>> public("s3://key:word@bucket/runs?secret_key=abc&region=eu")
    's3://bucket/runs?region=eu'
    """
    text = masked(uri).replace(f"{HIDDEN}@", "")
    text = re.sub(rf"(?<=[?&;])[^?&;=]+={re.escape(HIDDEN)}(?:[&;]|(?=#)|$)", "", text)
    return re.sub(r"[?&;](?=#|$)", "", text)


def short(uri: object) -> str:
    """A URI as a message names it: without credentials and without its query.

    >>> short("s3://key:word@bucket/runs?secret_key=abc&region=eu")
    's3://bucket/runs'
    """
    return public(uri).partition("?")[0]


def public_database(url: str) -> str:
    """A database URL without its password; the user stays, who is part of what finds the study again.

    >>> public_database("postgresql+psycopg://ann:secret@db/ugrl")
    'postgresql+psycopg://ann:***@db/ugrl'
    """
    scheme, sep, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    return scheme + sep + name + (f"{colon}{HIDDEN}" if colon else "") + at + masked(f"x://{host}").removeprefix("x://")


def public_tree(value: Any) -> Any:
    """A tree of dicts whose texts hold no credentials."""
    if isinstance(value, dict):
        return {k: public_tree(v) for k, v in value.items()}
    return masked(value) if isinstance(value, str) and has_credentials(value) else value


def has_credentials(uri: object) -> bool:
    """Whether a URI holds what :func:`masked` would hide."""
    return masked(uri) != str(uri)
