"""What the trainer's tests start from."""

from __future__ import annotations

import pytest

from tests.training.support import tiny_checkpoint


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random checkpoint folder of SIZES, for reading alone."""
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")
