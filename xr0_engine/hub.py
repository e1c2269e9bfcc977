"""The Hugging Face hub: what an id is, the local copy of what it names, and what to do when it gives nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xr0_engine.files import one_line
from xr0_engine.types import FileError

Kind = Literal["model", "dataset"]

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# `folder/robot.yaml` has the form of an id, and is a file.
_FILES = (".yaml", ".yml", ".json", ".jsonl")
_UNAUTHORISED, _FORBIDDEN = 401, 403
_LOG_IN = "`hf auth login`, or HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """`organisation/name`, or `organisation/name@revision`. revision: a branch, a tag or a commit; None: `main`."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which stays what it is."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def file_name(self) -> str:
        return str(self).rpartition("/")[2]


def hub_id(text: str | Path) -> HubId | None:
    """The id that a text has the form of; None for another form. Whether there is a local folder, the caller asks."""
    match = _ID.fullmatch(str(text))
    if match is None or (match[2] is None and str(text).endswith(_FILES)):
        return None
    return HubId(match[1], match[2])


def fetch(kind: Kind, wanted: HubId, patterns: Sequence[str]) -> Path:
    """The folder with the files of a repository that the patterns (of fnmatch, whose `*` stands for `/` too) name,
    downloaded if they are not in the hub's cache. The folder's name is the commit.

    Without a network the cache alone is asked. Raises FileError that says what to do.
    """
    import huggingface_hub

    with telling(kind, wanted):
        return Path(
            huggingface_hub.snapshot_download(
                wanted.name, repo_type=kind, revision=wanted.revision, allow_patterns=list(patterns)
            )
        )


@contextmanager
def pushing(to: HubId) -> Iterator[None]:
    """As telling, of what is sent to a repository of checkpoints."""
    with telling("model", to, is_sent=True):
        yield


@contextmanager
def telling(kind: Kind, wanted: HubId, is_sent: bool = False) -> Iterator[None]:
    """Whatever the hub answers inside with becomes one FileError that says what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # What the client's own library raises for a connection that breaks: which library it is depends on the version.
    broken = next(
        base
        for base in HfHubHTTPError.__mro__
        if issubclass(base, Exception) and not base.__module__.startswith("huggingface_hub")
    )
    try:
        yield
    except HFValidationError as error:
        raise FileError(f"{wanted}: expected organisation/name, as the hub has them: {one_line(error)}") from None
    # RuntimeError: of the library that moves large files.
    except (broken, OSError, RuntimeError) as error:
        raise FileError(_told(kind, wanted, error, is_sent)) from None


def _told(kind: Kind, wanted: HubId, error: Exception, is_sent: bool) -> str:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    called = "checkpoint" if kind == "model" else "dataset"
    given = f"there is no folder {wanted}, and the hub gave no {called} of that name"
    has_token = get_token() is not None
    if isinstance(error, GatedRepoError):
        place = wanted.name if kind == "model" else f"datasets/{wanted.name}"
        return (
            f"{wanted}: its owners let in who asks them: do so on the hub's page {place}, then log in with a token of "
            f"that account ({_LOG_IN})"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{wanted}: the hub's {wanted.name} has no revision {wanted.revision}: name a branch, tag or commit"
    if isinstance(error, RepositoryNotFoundError) and is_sent:
        return f"{wanted}: the hub knows no such organisation, or your token may not write there ({_LOG_IN})"
    if isinstance(error, RepositoryNotFoundError):
        seen = "that your token may see" if has_token else f"that is public; for a private one log in ({_LOG_IN})"
        return f"{given} {seen}: check its name"
    if status == _UNAUTHORISED or isinstance(error, LocalTokenNotFoundError):
        refused = "refuses your token: it is wrong or has expired" if has_token else "wants a token"
        return f"{wanted}: the hub {refused}: log in ({_LOG_IN})"
    if status == _FORBIDDEN:
        return f"{wanted}: the hub forbids it: your token must have the right to it ({_LOG_IN}): {one_line(error)}"
    if status is not None:
        return f"{wanted}: the hub answered with an error, try again later: {one_line(error)}"
    if is_sent:
        return f"{wanted}: the hub was not reached, so nothing was pushed ({type(error).__name__}: {one_line(error)})"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return f"{wanted}: cannot be kept in the hub's cache: {one_line(error)}; HF_HOME names another folder for it"
    why = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return (
        f"{given}. Without a network, download it elsewhere and pass the folder ({type(why).__name__}: {one_line(why)})"
    )
