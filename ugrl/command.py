"""The top of every command: what escapes becomes one line and an exit status of its own.

Status 2 is bad input (:class:`ugrl.errors.UgrlError`), 3 no room on the cluster or the disk, 4 a lost cluster or
storage, 70 a fault of the program, 130 Ctrl-C, 141 a reader that went away. ``UGRL_DEBUG=1`` shows the traceback that
otherwise goes to a log file.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ugrl import __version__
from ugrl.errors import ConfigError, HungError, NoRoomError, UgrlError, free_text, is_full
from ugrl.secrets import has_credentials, masked, public
from ugrl.text import brief, line

BAD_INPUT, FAULT, INTERRUPTED, NO_READER = 2, 70, 130, 141
MOST, MOST_PROBLEMS = 400, 20
EXITS = """
exit status:
  0 done   2 bad input, named in one line   3 no room on the cluster or the disk
  4 the cluster or a storage was lost   130 Ctrl-C   143 SIGTERM   (after 3, 4, 130 and 143, resume)
  70 a fault of the program: the line names a file with the traceback, UGRL_DEBUG=1 shows it
"""

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    """A parser whose help ends in examples and the exit statuses, and whose complaints are one line."""

    def __init__(self, *, epilog: str = "", **more: object) -> None:
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(epilog=epilog + EXITS, **more)  # type: ignore[arg-type]
        self.add_argument("--version", action="version", version=f"ugrl {__version__}", help="say which one this is")

    def error(self, message: str) -> NoReturn:
        """Words that are not understood."""
        complain(f"{message}; see {self.prog} --help")
        sys.exit(BAD_INPUT)


def shipped(package: str) -> list[str]:
    """Names of the YAML files in a package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files(package).iterdir() if p.name.endswith(".yaml"))


def enter(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    run: Callable[[argparse.Namespace, Console], int],
    interrupted: str,
) -> int:
    """The main of a command that takes ``section.key=value`` among its options; a bare run prints the help."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        if not words:
            parser.print_help()
            return 0
        check_words(words)
        args = parser.parse_intermixed_args(words)
        from ugrl.terminal import Terminal

        return run(args, Terminal(stderr=True))

    return guarded(body, interrupted)


def check_words(words: Sequence[str]) -> None:
    """Refuse an empty word: it is of a shell's variable that is not set, and would stand for some default.

    Raises:
        ConfigError: Names the option.
    """
    for i, word in enumerate(words):
        if not word.strip() or (word.startswith("--") and word.endswith("=")):
            option = word.rstrip("=") or (words[i - 1] if i and words[i - 1].startswith("-") else f"word {i + 1}")
            raise ConfigError(f"{option} is empty; expected a value (is it a variable of the shell that is not set?)")


def pasted(words: Sequence[str]) -> tuple[str, str]:
    """A command as a line for the shell, and a note on the credentials that were left out of it, if any were.

    >>> pasted(["ugrl-train", "--data", "s3://key:word@bucket/a b", "--resume"])[0]
    "ugrl-train --data 's3://bucket/a b' --resume"
    """
    hidden = [
        word.partition("=")[0] if "=" in word.partition("://")[0] else words[i - 1]
        for i, word in enumerate(words)
        if has_credentials(word)
    ]
    note = f"left out of it: the credentials in {', '.join(hidden)}; put them back, or into the environment"
    return shlex.join(public(w) if has_credentials(w) else w for w in words), note if hidden else ""


def guarded(run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit status; nothing escapes but SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding lacks is no reason to die
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = run()
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, where a reader that went away is still ours to notice
        return status
    except UgrlError as error:
        if os.environ.get("UGRL_DEBUG") == "1":
            traceback.print_exc()
        problems = (_full(error),) if is_full(error) else error.problems
        for problem in problems[:MOST_PROBLEMS]:
            complain(problem)
        if len(problems) > MOST_PROBLEMS:
            complain(f"and {len(problems) - MOST_PROBLEMS} more")
        if is_full(error):
            return NoRoomError.status
        if isinstance(error, HungError):  # Python would wait for the thread that hangs
            sys.stdout.flush()
            os._exit(error.status)
        return error.status
    except KeyboardInterrupt:
        complain(interrupted, word="")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (gone := _without_reader()):
            for descriptor in gone:  # Python flushes once more at its end, and would complain then
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            return NO_READER
        if is_full(error):
            complain(_full(error))
            return NoRoomError.status
        complain(f"{_fault(error)}; {_logged()}")
        return FAULT


def complain(text: str, word: str = "error: ") -> None:
    """One line to stderr, without credentials."""
    with suppress(OSError):
        print(word + line(masked(text), most=MOST), file=sys.stderr, flush=True)


def _without_reader() -> list[int]:
    """Which of stdout and stderr nobody reads any more: other pipes of the program may break as well."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]


def _full(error: Exception) -> str:
    """A disk without room: which file found none, how much there is, and what to do."""
    text = _fault(error) if isinstance(error, OSError) else line(error)
    found: BaseException | None = error
    while found is not None and not (isinstance(found, OSError) and found.filename):
        found = found.__cause__ or found.__context__
    if found is not None and "are free" not in text:
        text += f"; {line(found.filename)}: {free_text(found.filename)}"
    return f"{line(text, most=MOST - 60)}; make room and run it again with --resume"


def _fault(error: Exception) -> str:
    # PyTorch's own: an error of CUDA with a name, one of the host with a text.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
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
