"""What tests of the text encoder and of its cache share."""

from __future__ import annotations

import pytest
from support.umt5 import LAYOUTS


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)
