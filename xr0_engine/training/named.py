"""Functions that a run names as `package.module:function`, such as a dataset: marked as what they are, found by name.

A name comes from a run's folder or a command line. So that neither calls what was never meant for it, only functions
that carry the mark are called; importing their module runs that module's code, as any import does.
"""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_MARK = "__xr0_mark__"


def is_function(text: str | Path) -> bool:
    """Whether a text has the form `package.module:function`. A path of that form can be written as an absolute one."""
    return _FORM.fullmatch(str(text)) is not None


def mark(function: Function, kind: str) -> Function:
    """The function, marked as one of a kind that find() gives."""
    setattr(function, _MARK, kind)
    return function


def find(name: str, kind: str, decorator: str) -> Callable[..., Any]:
    """The function of a name, which must bear the mark of its kind. decorator: where the mark is, for the message.

    Raises ValueError for a name of another form, a module that is missing or fails, and a function that is missing or
    not marked.
    """
    if not is_function(name):
        raise ValueError(f"{name}: expected package.module:function")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{name}: there is no module {error.name}: install its package, or name its folder in PYTHONPATH"
            ) from None
        raise ValueError(f"{name}: {module_name} needs {error.name}, which is not installed") from error
    # Whatever a module of somebody else does when it is imported.
    except Exception as error:
        raise ValueError(f"{name}: importing {module_name} failed: {told(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        has = ", ".join(key for key, value in vars(module).items() if getattr(value, _MARK, None) == kind)
        raise ValueError(f"{name}: {module_name} has no function {attribute!r}; marked as {kind}: {has or 'none'}")
    if getattr(function, _MARK, None) != kind:
        raise ValueError(
            f"{name}: the function is not marked as a {kind}: write @{decorator.rpartition('.')[2]} above it "
            f"({decorator}), if it is meant as one"
        )
    return function


def told(error: BaseException) -> str:
    """An error of somebody else's code, with the place that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
