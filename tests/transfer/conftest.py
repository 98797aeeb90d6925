"""What the tests of streaming share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from streaming_sample import Sample, write_sample


@pytest.fixture
def sample(tmp_path: Path) -> Callable[..., Sample]:
    """Makes the sample checkpoint; arguments are those of ``write_sample``."""
    return partial(write_sample, tmp_path / "checkpoint")
