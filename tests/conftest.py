"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Whether an example is slow is the machine's affair.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Each worker of a parallel run gets one thread: more would only take turns on the same cores. torch reads it on import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU, and torch finds none"


def _why_not_compiled() -> str | None:
    return None if os.environ.get("XR0_EMULATE") or not _why_no_gpu() else "needs a CUDA GPU, or XR0_EMULATE=90"


# Without a GPU, Triton's kernels run in its interpreter, unless the emulator runs them. Triton reads it on import.
if _why_not_compiled():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What tests remember is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, why_not in (("gpu", _why_no_gpu), ("compiled", _why_not_compiled)):
        needing = [item for item in items if item.get_closest_marker(marker)]
        if needing and (reason := why_not()):
            for item in needing:
                item.add_marker(pytest.mark.skip(reason=reason))
