"""The push itself: everything is checked and the card written before the hub is asked for anything; one commit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xr0_engine.evaluation.results import RUN_FILE, Results, read_results
from xr0_engine.hub import HubId, fetch, hub_id, pushing
from xr0_engine.publish.card import is_untouched, model_card
from xr0_engine.publish.folder import CARD_FILE, Publishable, is_run, read_publishable
from xr0_engine.publish.run import Run, read_run
from xr0_engine.whole import is_fresh, whole_folder

CHECKPOINT_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class Parcel:
    """What is pushed. card: README.md, None where the folder has its own. results: those that the card tells of."""

    to: HubId
    made: Publishable
    run: Run | None
    results: tuple[Results, ...]
    card: str | None

    @property
    def names(self) -> list[str]:
        return sorted({*self.made.files, CARD_FILE})


def pack(checkpoint: Path, name: str, run: Path | None = None, results: Sequence[Path] = ()) -> Parcel:
    """Check a checkpoint's folder and write its card. No network.

    run: the run that made it; None: the folder above, if that is one. results: folders of `xr0 eval`, beside those that
    lie next to the checkpoint and are of it. Raises ValueError for a name that is no id, for what read_publishable
    refuses, and for a run or results of another checkpoint.
    """
    to = hub_id(name)
    if to is None or to.revision is not None:
        raise ValueError(f"{name}: expected organisation/name, the repository to push to")
    made = read_publishable(checkpoint)
    if made.own_card and (run is not None or results):
        raise ValueError(
            f"--run, --results: {checkpoint} has a {CARD_FILE}, which is pushed as it is: remove it for a new one"
        )
    if made.own_card:
        return Parcel(to, made, None, (), None)
    above = made.folder.resolve().parent
    told = None
    if run is not None:
        told = read_run(run, made)
        if told is None:
            raise ValueError(f"--run: {run} has other statistics or settings than {checkpoint}: it did not make it")
    elif is_run(above):
        told = read_run(above, made)
    found = tuple(_results(made, above, results))
    return Parcel(to, made, told, found, model_card(to.name, made, told, found))


def _results(made: Publishable, above: Path, named: Sequence[Path]) -> Iterator[Results]:
    for folder in named:
        found = read_results(folder)
        # A server does not tell which checkpoint it serves.
        if found.run.policy.get("checkpoint") not in (None, made.sha256):
            raise ValueError(f"--results: {folder} is of another checkpoint than {made.folder}")
        yield found
    known = {folder.resolve() for folder in named}
    for file in sorted(above.glob(f"*/{RUN_FILE}")):
        if file.parent.resolve() not in known:
            found = read_results(file.parent)
            if found.run.policy.get("checkpoint") == made.sha256:
                yield found


def write_parcel(parcel: Parcel, out: Path) -> None:
    """All that would be pushed, in a folder that is absent or empty and appears whole or not at all. Raises ValueError
    or OSError."""
    if not is_fresh(out):
        raise ValueError(f"--dry-run: {out} exists and is not empty; remove it or choose another folder")
    with whole_folder(out, parcel.made.num_bytes) as target:
        for name, path in parcel.made.files.items():
            shutil.copyfile(path, target / name)
        if parcel.card is not None:
            (target / CARD_FILE).write_text(parcel.card, encoding="utf-8")


def push(parcel: Parcel, private: bool) -> tuple[str, bool]:
    """One commit with all of it, in a repository that is made if there is none. Returns its address, and whether the
    hub's README.md was kept: what somebody has written or changed, only a README.md of the folder replaces.

    Raises FileError for what the hub refuses, ValueError for a repository that holds other weights or, where a private
    one is asked for, is public; what was there is as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, name = HfApi(), parcel.to.name
    with pushing(parcel.to):
        address = str(api.create_repo(name, private=private or None, exist_ok=True))
        there = api.model_info(name)
    if private and not there.private:
        raise ValueError(
            f"{name} is public, and --private was asked for: make it private on the hub, or push elsewhere"
        )
    names = [file.rfilename for file in there.siblings or ()]
    strange = [it for it in names if "/" not in it and it.endswith(CHECKPOINT_SUFFIXES) and it not in parcel.names]
    if strange:
        raise ValueError(
            f"{name} holds what would not fit this checkpoint: {', '.join(strange[:8])}: remove it there, or push to "
            "another repository"
        )
    content: dict[str, Path | bytes] = dict(parcel.made.files)
    keeps = False
    if parcel.card is not None and CARD_FILE in names:
        folder = fetch("model", HubId(name, there.sha), [CARD_FILE])
        keeps = not is_untouched((folder / CARD_FILE).read_bytes().decode("utf-8", "replace"))
    if parcel.card is not None and not keeps:
        content[CARD_FILE] = parcel.card.encode()
    operations = [
        CommitOperationAdd(path, held if isinstance(held, bytes) else str(held)) for path, held in content.items()
    ]
    with pushing(parcel.to):
        api.create_commit(name, operations, commit_message="Checkpoint of xr0-engine", repo_type="model")
    return address, keeps
