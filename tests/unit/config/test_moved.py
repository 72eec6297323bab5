"""A key of an older version is refused with the name that it has now."""

from typing import Any

import pytest
from pydantic import BaseModel

from serve_app.app import parse
from serve_app.config import MOVED, EPDConfig
from serve_app.handoff.errors import ConfigError


def at(key: str, value: Any) -> dict[str, Any]:
    """Arguments with one key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def default(key: str) -> Any:
    found: Any = EPDConfig()
    for name in key.split("."):
        found = getattr(found, name)
    assert not isinstance(found, BaseModel), "a key, not a section"
    return found


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_old_key_is_answered_with_the_new_one_which_is_taken(old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(at(old, 5))
    assert str(caught.value).splitlines()[1:] == [f"  args: `{old}` is now `{new}`"]
    parse(at(new, default(new)))


def test_all_old_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"request_timeout_s": 5, "encode": {"attempts": 1, "timeout_s": 3}, "decode": None})
    (line,) = str(caught.value).splitlines()[1:]
    for key in ("request_timeout_s", "encode.attempts", "encode.timeout_s"):
        assert f"`{key}` is now `{MOVED[key]}`" in line
