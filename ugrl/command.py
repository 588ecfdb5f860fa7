"""The top of every command: what escapes becomes one line and an exit status of its own.

Status 2 is bad input (:class:`ugrl.errors.UgrlError`), 70 a fault of the program, 130 Ctrl-C, 141 a reader that went
away. ``UGRL_DEBUG=1`` shows the traceback that otherwise goes to a log file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from ugrl.errors import ConfigError, UgrlError
from ugrl.secrets import masked
from ugrl.text import brief, line

BAD_INPUT, FAULT, INTERRUPTED, NO_READER = 2, 70, 130, 141
MOST = 400


def guarded(run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit status; nothing escapes but SystemExit."""
    try:
        status = run()
        sys.stdout.flush()  # here, where a reader that went away is still ours to notice
        return status
    except UgrlError as error:
        if os.environ.get("UGRL_DEBUG") == "1":
            traceback.print_exc()
        complain(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        complain(interrupted, word="")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except Exception as error:
        complain(f"{_fault(error)}; {_logged()}")
        return FAULT


def complain(text: str, word: str = "error: ") -> None:
    """One line to stderr, without credentials."""
    print(word + line(masked(text), most=MOST), file=sys.stderr)


def _fault(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{line(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return f"a fault of the program ({type(error).__name__}: {line(error, most=160)})"


def _logged() -> str:
    """Where the traceback is; called while the exception is handled."""
    if os.environ.get("UGRL_DEBUG") == "1":
        traceback.print_exc()
        return "see above"
    try:
        handle, name = tempfile.mkstemp(prefix="ugrl-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(masked(" ".join(sys.argv)) + "\n" + masked(traceback.format_exc()))
    except OSError:
        return "no log could be written; UGRL_DEBUG=1 shows more"
    return f"the traceback is in {name}; UGRL_DEBUG=1 shows it"


def folder_for(path: str | Path, option: str = "--out") -> Path:
    """The folder that an option names, checked before any work is paid for; it may exist, and is not made.

    Raises:
        ConfigError: It cannot be a folder that is written to.
    """
    text = str(path)
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{option} is {brief(text)}; expected the name of a folder")
    where = Path(text)
    try:
        return _folder_for(where, option)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else line(error)
        raise ConfigError(f"{option} {brief(text, 120)}: {why}; expected a folder that can be written") from None


def _folder_for(where: Path, option: str) -> Path:
    if where.is_symlink() and not where.exists():
        raise ConfigError(f"{option} {line(where)}: a link to nowhere ({line(os.readlink(where))})")
    if where.exists() and not where.is_dir():
        raise ConfigError(f"{option} {line(where)}: is a file; expected a folder")
    for above in (where, *where.absolute().parents):
        if len(os.fsencode(above.name)) > 200:  # names beside it get suffixes: .partial, .tmp
            raise ConfigError(
                f"{option} {line(where, 60)}: a name of {len(above.name)} characters; expected at most 200"
            )
    there = next(p for p in (where.absolute(), *where.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        kind = "a link to nowhere" if not there.exists() else "a file"
        raise ConfigError(f"{option} {line(where)}: {line(there)} is {kind}; expected a folder")
    # Asked of the system by doing it: root may write where the mode says no, and cannot on a read-only disk.
    handle, name = tempfile.mkstemp(prefix=".ugrl-", dir=there)
    os.close(handle)
    os.unlink(name)
    return where
