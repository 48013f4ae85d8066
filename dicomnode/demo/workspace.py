"""The demo's folder: what lies where, and which of it may be thrown away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dicomnode import durable
from dicomnode.errors import OperatorError

MARK = ".dicomnode-demo"
_OURS = ("inputs", "node", "pacs", "results")
_OUR_FILES = ("node.toml", "modality.toml", "node.log", "report.json", "montage.png")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of one run; everything lies under ``root``."""

    root: Path

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def data_dir(self) -> Path:
        return self.root / "node"

    @property
    def pacs(self) -> Path:
        return self.root / "pacs"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def config(self) -> Path:
        return self.root / "node.toml"

    @property
    def modality_config(self) -> Path:
        return self.root / "modality.toml"

    @property
    def node_log(self) -> Path:
        return self.root / "node.log"

    @property
    def report(self) -> Path:
        return self.root / "report.json"


def prepare(root: Path) -> Workspace:
    """Make the folder, or clean what an earlier demo made in it.

    Raises OperatorError when it holds something else and was not made by a demo, or when a
    node still runs there.
    """
    space = Workspace(root.resolve())
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark = root / MARK
        if not mark.exists() and any(root.iterdir()):
            raise OperatorError(
                "prepare the demo's folder",
                f"{root} is not empty and was not made by a demo",
                "Give --output with a new or empty folder",
            )
        _refuse_running(space)
        for name in _OURS:
            if (root / name).is_dir():
                durable.remove_tree(root / name)
        for file in [*(root / name for name in _OUR_FILES), *root.glob("montage-*.png")]:
            durable.remove(file)
        mark.write_text("Made by 'dicomnode demo', which cleans this folder when it runs again.\n")
        for folder in (space.inputs, space.results, space.pacs):
            folder.mkdir()
    except OSError as error:
        raise OperatorError(
            "prepare the demo's folder", f"{root}: {error.strerror}", "Give --output with a folder you may write to"
        ) from None
    return space


def _refuse_running(space: Workspace) -> None:
    """A demo that still runs here keeps its folder (its processes hold these locks)."""
    import fcntl

    for lock in (space.data_dir / "run").glob("*.lock"):
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OperatorError(
                    "prepare the demo's folder",
                    f"a demo still runs in {space.root}",
                    "End it with Ctrl-C, or give --output with another folder",
                ) from None
