"""Finding DICOM files on disk and sending them: ``dicomnode send`` and the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.deliver.scu import Outgoing, SendOutcome, send_batch
from dicomnode.dimse.requestor import MAX_CONTEXTS
from dicomnode.dimse.store import NotPart10, data_set_offset
from dicomnode.errors import MalformedDataSet, OperatorError
from dicomnode.header import Wanted, read_header
from dicomnode.settings import Delivery, Peer
from dicomnode.tls import Transport

_META = Wanted(["MediaStorageSOPClassUID", "TransferSyntaxUID", "MediaStorageSOPInstanceUID"])
_META_START = 132
_HEAD_BYTES = 4096
_MOST_META_BYTES = 1024 * 1024


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
            identity = _identity(file)
            if identity is None:
                skipped.append(file)
            else:
                found.append(Outgoing(len(found), file, *identity))
    if not found:
        raise OperatorError("find files", "no DICOM file there", "Give files or folders with DICOM Part 10 files")
    return found, skipped


def _identity(file: Path) -> tuple[str, str, str] | None:
    """SOP class, transfer syntax and SOP instance of a Part 10 file; None when it is none."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
            end = data_set_offset(head)
            if end > len(head):
                head += opened.read(min(end, _MOST_META_BYTES) - len(head))
        meta = read_header(head[_META_START:end], ExplicitVRLittleEndian, _META)
        return meta["MediaStorageSOPClassUID"], meta["TransferSyntaxUID"], meta["MediaStorageSOPInstanceUID"]
    except (NotPart10, MalformedDataSet, KeyError):
        return _identity_of_odd_file(file)


def _identity_of_odd_file(file: Path) -> tuple[str, str, str] | None:
    """As pydicom reads it, which knows files that lack the length of their meta information."""
    try:
        meta = pydicom.dcmread(file, specific_tags=[], stop_before_pixels=True).file_meta
        return str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID), str(meta.MediaStorageSOPInstanceUID)
    except (InvalidDicomError, AttributeError, EOFError):
        return None


def send_files(
    local: str,
    peer: Peer,
    delivery: Delivery,
    files: Sequence[Outgoing],
    on_outcome: Callable[[SendOutcome], None] | None = None,
    transport: Transport | None = None,
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
            send_batch(local, peer, delivery, batch, note, transport)
            batch, contexts = [], set()
        batch.append(file)
        contexts |= wanted
    if batch:
        send_batch(local, peer, delivery, batch, note, transport)
    return sorted(outcomes, key=lambda o: o.key)
