"""Training: the loop, its step, checkpoints and run folders.

``ugrl.train`` is this package, and calling it trains: :func:`ugrl.api.train`. One name serves both, since a package
takes the place of a function of the same name as soon as one of its modules is imported.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that can be called."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Train one model, see :func:`ugrl.api.train`."""
        return import_module("ugrl.api").train(*args, **more)  # by name: the trainer does not know who calls it


sys.modules[__name__].__class__ = _Callable
