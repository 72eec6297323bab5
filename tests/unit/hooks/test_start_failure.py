"""What an engine's process tells of an exception; ``tests/unit/launch`` has both sides of it."""

from serve_app.hooks.start_failure import causes


def test_causes_are_those_that_a_traceback_shows() -> None:
    def raised(suppressed: bool) -> BaseException:
        try:
            try:
                raise KeyError("inner")
            except KeyError:
                raise ValueError("outer") from (None if suppressed else OSError("cause"))
        except ValueError as error:
            return error

    assert causes(raised(suppressed=False)) == ["ValueError: outer", "OSError: cause"]
    assert causes(raised(suppressed=True)) == ["ValueError: outer"]
    assert causes(None) == []
