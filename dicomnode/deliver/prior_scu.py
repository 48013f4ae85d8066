"""C-FIND and C-MOVE for earlier studies, Study Root (PS3.4 C.6.2): what to ask, and what the answers mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from dicomnode.dimse.association import NodeAssociation
from dicomnode.dimse.requestor import Patience, associate
from dicomnode.errors import PeerAway, PeerRefused
from dicomnode.priors import Candidate, Wish, is_earlier, same_patient, study_dates
from dicomnode.settings import Peer
from dicomnode.tls import Transport

MOST_ANSWERS = 1000
MOST_STUDIES = 5
"""Series are asked for in the latest studies only."""

STUDY_RETURN = (
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "ModalitiesInStudy",
    "NumberOfStudyRelatedInstances",
)
SERIES_RETURN = (
    "SeriesInstanceUID",
    "Modality",
    "SeriesNumber",
    "SeriesDescription",
    "BodyPartExamined",
    "ProtocolName",
    "NumberOfSeriesRelatedInstances",
)
CONTEXTS = [
    build_context(StudyRootQueryRetrieveInformationModelFind),
    build_context(StudyRootQueryRetrieveInformationModelMove),
]
PENDING = frozenset({0xFF00, 0xFF01})
UNKNOWN_DESTINATION = 0xA801


@dataclass(frozen=True, slots=True)
class Moved:
    """Sub-operations of a C-MOVE that ended."""

    completed: int
    failed: int


def study_query(current: Mapping[str, Any], wish: Wish) -> Dataset:
    """Keys of a C-FIND at STUDY level: one Patient ID, the dates that may be, and what comes back."""
    ds = _keys("STUDY", STUDY_RETURN)
    ds.PatientID = str(current["PatientID"])
    ds.StudyDate = study_dates(current, wish.max_age_days)
    if not str(current["PatientID"]).isascii():
        ds.SpecificCharacterSet = "ISO_IR 192"
    return ds


def series_query(study_uid: str, wish: Wish) -> Dataset:
    """Keys of a C-FIND at SERIES level: all of a study, with what the wish looks at."""
    ds = _keys("SERIES", (*SERIES_RETURN, *(k for k in wish.match if k not in STUDY_RETURN)))
    ds.StudyInstanceUID = study_uid
    return ds


def move_identifier(study_uid: str, series_uid: str) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel, ds.StudyInstanceUID, ds.SeriesInstanceUID = "SERIES", study_uid, series_uid
    return ds


def _keys(level: str, keywords: tuple[str, ...]) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = level
    for keyword in keywords:
        setattr(ds, keyword, [] if keyword.endswith("Sequence") else None)
    return ds


def texts(ds: Dataset) -> dict[str, str]:
    """Attributes of an answer by keyword, as the index holds them; what cannot be read is left out."""
    found: dict[str, str] = {}
    for tag in list(ds.keys()):
        keyword, text = _text(ds, tag)
        if keyword:
            found[keyword] = text
    return found


def _text(ds: Dataset, tag: Any) -> tuple[str, str]:
    try:
        element = ds[tag]
        if element.VR == "SQ" or element.value is None:
            return "", ""
        parts = element.value if isinstance(element.value, MultiValue) else [element.value]
        return element.keyword, "\\".join(str(part) for part in parts).strip()
    except Exception:  # noqa: BLE001 a peer's value that pydicom cannot read says nothing
        return "", ""


def asked(local: str, peer: Peer, patience: Patience, transport: Transport) -> NodeAssociation:
    """An association for both. Raises PeerAway, or PeerRefused where the peer takes only one of them."""
    assoc = associate(local, peer, CONTEXTS, patience, operation="C-FIND", transport=transport)
    accepted = {str(c.abstract_syntax) for c in assoc.accepted_contexts}
    if any(str(c.abstract_syntax) not in accepted for c in CONTEXTS):
        assoc.release()
        assoc.end()
        raise PeerRefused("C-FIND", f"peer '{peer.name}' does not accept Study Root C-FIND and C-MOVE")
    return assoc


def answers(assoc: NodeAssociation, peer: Peer, query: Dataset) -> Iterator[dict[str, str]]:
    """Attributes of each match. Raises PeerAway when the query does not end well."""
    count = 0
    try:
        for status, identifier in assoc.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
            code = status.get("Status")
            if code is None:
                raise PeerAway("C-FIND", f"peer '{peer.name}' did not answer the query")
            if int(code) in PENDING:
                count += 1
                if identifier is not None and count <= MOST_ANSWERS:
                    yield texts(identifier)
            elif int(code) not in (0x0000, 0xB001):
                raise PeerAway("C-FIND", f"peer '{peer.name}' ended the query with status 0x{int(code):04X}")
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise PeerAway("C-FIND", f"peer '{peer.name}': the query was cut ({type(error).__name__})") from error


def candidates(assoc: NodeAssociation, peer: Peer, current: Mapping[str, Any], wish: Wish) -> list[Candidate]:
    """Series of the latest earlier studies that the peer knows, with the patient's attributes of their study."""
    studies = [
        s
        for s in answers(assoc, peer, study_query(current, wish))
        if s.get("StudyInstanceUID") and same_patient(current, s) and is_earlier(current, s, wish.max_age_days)
    ]
    studies.sort(key=lambda s: (s.get("StudyDate", ""), s.get("StudyTime", "")), reverse=True)
    found = []
    for study in studies[:MOST_STUDIES]:
        for series in answers(assoc, peer, series_query(study["StudyInstanceUID"], wish)):
            images = series.get("NumberOfSeriesRelatedInstances", "")
            merged = {**series, **{k: v for k, v in study.items() if v}}
            found.append(Candidate(merged, int(images) if images.isdigit() and images.isascii() else 0))
    return found


def move(assoc: NodeAssociation, peer: Peer, study_uid: str, series_uid: str, destination: str) -> Moved:
    """Have a series sent to ``destination``.

    Raises PeerAway for what can pass, PeerRefused where somebody has to act.
    """
    last: Any = None
    try:
        for status, _ in assoc.send_c_move(
            move_identifier(study_uid, series_uid), destination, StudyRootQueryRetrieveInformationModelMove
        ):
            last = status
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise PeerAway("C-MOVE", f"peer '{peer.name}': the retrieve was cut ({type(error).__name__})") from error
    code = None if last is None else last.get("Status")
    if code is None:
        raise PeerAway("C-MOVE", f"peer '{peer.name}' did not finish the retrieve")
    if int(code) == UNKNOWN_DESTINATION:
        raise PeerRefused(
            "C-MOVE",
            f"peer '{peer.name}' does not know the move destination '{destination}'",
            "List this node's AE title, address and port there",
        )
    moved = Moved(_count(last, "NumberOfCompletedSuboperations"), _count(last, "NumberOfFailedSuboperations"))
    moved = Moved(moved.completed + _count(last, "NumberOfWarningSuboperations"), moved.failed)
    if int(code) == 0x0000 and not moved.failed:
        return moved
    raise PeerAway(
        "C-MOVE",
        f"peer '{peer.name}' ended the retrieve with status 0x{int(code):04X},"
        f" {moved.completed} object(s) sent and {moved.failed} not",
        "Check that it may store here: 'dicomnode events' tells who was rejected",
    )


def _count(status: Dataset, keyword: str) -> int:
    value = status.get(keyword)
    return int(value) if isinstance(value, int) else 0
