"""Finding DICOM files on disk and sending them: ``dicomnode send`` and the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from dicomnode.deliver.scu import MAX_CONTEXTS, Outgoing, SendOutcome, send_batch
from dicomnode.errors import OperatorError
from dicomnode.settings import Delivery, Peer


def find_files(paths: Iterable[Path]) -> tuple[list[Outgoing], list[Path]]:
    """DICOM Part 10 files in files and folders (recursive, sorted), and what was not one.

    ``key`` of each is its place in the list. Raises OperatorError when nothing is found.
    """
    found: list[Outgoing] = []
    skipped: list[Path] = []
    for path in paths:
        if not path.exists():
            raise OperatorError("find files", f"{path} does not exist", "Check the path")
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            try:
                meta = pydicom.dcmread(file, specific_tags=[], stop_before_pixels=True).file_meta
                found.append(Outgoing(len(found), file, str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)))
            except (InvalidDicomError, AttributeError, EOFError):
                skipped.append(file)
    if not found:
        raise OperatorError("find files", "no DICOM file there", "Give files or folders with DICOM Part 10 files")
    return found, skipped


def send_files(
    local: str,
    peer: Peer,
    delivery: Delivery,
    files: Sequence[Outgoing],
    on_outcome: Callable[[SendOutcome], None] | None = None,
) -> list[SendOutcome]:
    """Send all files, one association where their contexts fit; outcomes in order.

    Raises PeerAway when the peer cannot be reached.
    """
    outcomes: list[SendOutcome] = []

    def note(outcome: SendOutcome) -> None:
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)

    batch: list[Outgoing] = []
    contexts: set[tuple[str, str]] = set()
    for file in files:
        wanted = {(file.sop_class_uid, file.transfer_syntax_uid)}
        if batch and len(contexts | wanted) > MAX_CONTEXTS:
            send_batch(local, peer, delivery, batch, note)
            batch, contexts = [], set()
        batch.append(file)
        contexts |= wanted
    if batch:
        send_batch(local, peer, delivery, batch, note)
    return sorted(outcomes, key=lambda o: o.key)
