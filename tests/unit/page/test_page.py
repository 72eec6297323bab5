"""When the page is there. What it does in a browser: ``tests/integration/page``."""

from typing import Any

import pytest

from serve_app.page import FILES


@pytest.mark.parametrize("there", [True, False])
def test_one_key_turns_the_page_off(make_api: Any, there: bool) -> None:
    api = make_api({}, page=there)
    assert [api.get(path).status_code for path in FILES] == [200 if there else 404] * len(FILES)
    assert api.get("/status").status_code == 200
