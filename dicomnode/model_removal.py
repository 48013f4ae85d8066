"""The folder of a model version leaves the disk: what was begun in the index is carried out."""

from __future__ import annotations

from pathlib import Path

from dicomnode import durable
from dicomnode.index.model_space import aside_of
from dicomnode.index.removals import Removal, Removals


def folder_of(data_dir: Path, name: str, version: str) -> Path:
    return data_dir / "models" / name / version


def begin(removals: Removals, data_dir: Path, name: str, version: str, *, who: str, why: str, automatic: bool) -> None:
    """Inside a transaction; nothing is touched before it has committed."""
    mark = durable.mark_of(folder_of(data_dir, name, version))
    removals.begin(Removal(name, version, mark, who, why, automatic))


def finish(removals: Removals, data_dir: Path, removal: Removal) -> bool:
    """Whether it is gone now; False where another folder stands in its place, or somebody else ended it.

    Raises StorageError where the disk refuses; then it stays begun.
    """
    folder = folder_of(data_dir, removal.name, removal.version)
    mark = durable.mark_of(folder)
    if mark and mark != removal.folder:  # put there since
        return removals.end(removal, removed=False)
    aside = None
    if mark:
        aside = durable.set_aside(folder, aside_of(data_dir))
    elif folder.parent.is_dir():
        durable.sync_directory(folder.parent)  # who set it aside may not have lived to do it
    ended = removals.end(removal, removed=True)
    if aside is not None:
        durable.remove_tree(aside)
    return ended
