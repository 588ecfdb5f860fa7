"""The commit of the code that runs, which a search writes down for each trial."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def code_commit() -> str:
    """The commit of the code that runs, where it is a checkout; with ``+`` where files were changed."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        try:
            found = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=5, env=env
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    # The code may lie within somebody's own repository, be it installed there or kept in a folder of it.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != here.parents[2] or git("ls-files", "--error-unmatch", here.name) is None:
        return ""
    return git("describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*") or ""
