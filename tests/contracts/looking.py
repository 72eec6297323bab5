"""How contracts look at code that is not ours. A failure names the file of ours to look at."""

import dataclasses
import importlib
import inspect
from typing import Any


def find(path: str) -> Any:
    """``module:name.attribute`` → the object."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        found = getattr(found, name)
    return found


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def fields(cls: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(cls)}
