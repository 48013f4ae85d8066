"""What leaves the building in place of what is stored: the one place where identity is taken away. Pure.

An allow-list: an attribute that is not named here does not leave. UIDs are exchanged, but for those
of the standard; patient's name and ID are a pseudonym; dates are shifted by a number of days that is
the patient's own; times, sex and age (below 90 years) stay. Free text is kept only where this node
writes it itself, without the words by which the patient is known here. The same input always gives
the same bytes. A full engine by PS3.15 Annex E may take the place of :func:`deidentify`.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pydicom
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicomnode.departing_items import (
    CODE_MEANING,
    CODE_VALUE,
    CREATOR,
    DROPPED_VALUE_TYPES,
    EMPTY_TAGS,
    FREE_TEXT,
    KEPT_TAGS,
    LOCAL_MEANING,
    PER_FRAME,
    PUBLIC_SCHEMES,
    SCHEME,
    TEXT_CONCEPTS,
    Exchange,
    Items,
    NotPlain,
    element_of,
    joined,
    parse,
    uids_of,
    written,
)
from dicomnode.errors import MalformedDataSet
from dicomnode.pseudonyms import Pseudonyms, shifted, traces

METHOD = "dicomnode allow-list 1"
REDACTED = "***"


_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture; its multi-frame classes are below it. Pixels of other results are drawn by models alone."""

_IDENTIFYING = (
    "PatientName", "PatientID", "PatientBirthName", "PatientMotherBirthName", "AccessionNumber", "StudyID",
    "ReferringPhysicianName", "PatientBirthDate", "PatientComments", "ResponsiblePerson", "InstitutionName",
)  # fmt: skip

_library_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class Departure:
    """What leaves, and ``mapping``: (kind, pseudonym) -> what it stands for at home."""

    sop_instance_uid: str
    content: bytes
    mapping: Mapping[tuple[str, str], str]


def deidentify(content: bytes, pseudonyms: Pseudonyms, *, plain_slice: bool = False) -> Departure:
    """A Part 10 file that this node made, as it may leave.

    ``plain_slice``: of a key image that does not say BurnedInAnnotation, the source is one that conventionally
    shows no identity, and the operator lets it leave (:mod:`dicomnode.burned_in`).

    Raises MalformedDataSet when it cannot be read, or when identity is burned into its pixels; a shortage
    (MemoryError, an OSError of the system) as it is, since that passes.
    """
    with _quiet():
        try:
            ds = pydicom.dcmread(BytesIO(content))
            out, done, mapping = _object(ds, pseudonyms, plain_slice)
            buffer = BytesIO()
            pydicom.dcmwrite(buffer, out, enforce_file_format=True)
            left = joined(buffer.getvalue(), done)
        except (MalformedDataSet, MemoryError):
            raise
        except Exception as error:  # whatever the library meets in one object must not stop the others
            if isinstance(error, OSError) and error.errno is not None:
                raise
            cause = f"the object cannot be de-identified ({type(error).__name__})"
            raise MalformedDataSet("de-identify", cause) from None
    return Departure(str(out.SOPInstanceUID), left, mapping)


@contextmanager
def _quiet() -> Iterator[None]:
    """pydicom's judgement of values, and its warnings that quote them, are switched off for the whole process."""
    with _library_lock, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _object(
    ds: Dataset, pseudonyms: Pseudonyms, plain_slice: bool
) -> tuple[Dataset, Mapping[int, bytes], dict[tuple[str, str], str]]:
    """The data set but for its plain sequences, those, and the mapping."""
    burned, sop_class = str(ds.get("BurnedInAnnotation") or "").strip().upper(), str(ds.get("SOPClassUID") or "")
    if burned == "YES":
        raise MalformedDataSet("de-identify", "identity may be burned into its pixels (BurnedInAnnotation)")
    picture = f"{sop_class}.".startswith(f"{_SECONDARY_CAPTURE}.")
    if picture and burned != "NO" and (burned or not plain_slice):
        cause = "identity may be burned into its pixels: its source does not say BurnedInAnnotation NO"
        raise MalformedDataSet("de-identify", cause)
    former = _former(ds)
    patient_id, issuer = (str((former if k in former else ds).get(k) or "") for k in ("PatientID", "IssuerOfPatientID"))
    known = traces(*(str(one.get(k) or "") for one in (ds, former) for k in _IDENTIFYING))
    plain = _plain_sequences(ds)
    days, uids = pseudonyms.days(patient_id, issuer), frozenset(_uids(ds, plain))

    def said(text: str) -> str:
        clean = pseudonyms.text(text, days, uids)
        return known.sub(REDACTED, clean) if known else clean

    how = Exchange(pseudonyms.uid, days, said, "utf-8" if ds.get("SpecificCharacterSet") == "ISO_IR 192" else "ascii")
    done = _exchanged(plain, how)
    out = _copy(ds, _Rules(pseudonyms, days, said), done)
    alias = pseudonyms.patient(patient_id, issuer)
    out.PatientName, out.PatientID = alias, alias
    for tag in EMPTY_TAGS & {int(e.tag) for e in ds.elements()}:
        out[tag] = DataElement(tag, pydicom.datadict.dictionary_VR(tag), "")
    if "DeviceSerialNumber" in ds:  # of Type 1 in enhanced equipment; here it is the node's AE title
        out.DeviceSerialNumber = pseudonyms.record("device", str(ds.DeviceSerialNumber))[:16]
    age = str(ds.get("PatientAge") or "")
    if re.fullmatch(r"\d{3}[DWMY]", age):
        out.PatientAge = "090Y" if age.endswith("Y") and int(age[:3]) > 89 else age
    out.PatientIdentityRemoved, out.DeidentificationMethod = "YES", METHOD
    out.LongitudinalTemporalInformationModified = "MODIFIED"
    out.SpecificCharacterSet = "ISO_IR 192"
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = out.SOPClassUID, out.SOPInstanceUID
    out.file_meta = meta
    mapping = {("patient", alias): f"{patient_id}^{issuer}" if issuer else patient_id}
    for kind, keyword in (
        ("study", "StudyInstanceUID"),
        ("series", "SeriesInstanceUID"),
        ("instance", "SOPInstanceUID"),
    ):
        mapping[kind, str(out[keyword].value)] = str(ds[keyword].value)
    return out, done, mapping


def _former(ds: Dataset) -> Dataset:
    """What was corrected in a result, as the images have it: a patient keeps one pseudonym, whatever was corrected."""
    out = Dataset()
    for item in ds.get("OriginalAttributesSequence") or []:
        for modified in item.get("ModifiedAttributesSequence") or []:
            out.update(modified)
    return out


Plain = Mapping[int, tuple[Items, ...]]
"""Sequences by tag that are exchanged as bytes."""


def _plain_sequences(ds: Dataset) -> Plain:
    found: dict[int, tuple[Items, ...]] = {}
    if ds.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        return found
    for raw in list(ds.elements()):
        if int(raw.tag) not in KEPT_TAGS or raw.VR != "SQ" or not isinstance(raw, RawDataElement):
            continue
        if raw.is_implicit_VR or not raw.is_little_endian or raw.length == 0xFFFFFFFF:
            continue
        with suppress(NotPlain):
            found[int(raw.tag)] = parse(bytes(raw.value or b""))
    return found


def _exchanged(plain: Plain, how: Exchange) -> dict[int, bytes]:
    """Whole elements by tag."""
    found = {}
    for tag, items in plain.items():
        with suppress(NotPlain):
            found[tag] = element_of(tag, "SQ", written(items, how))
    return found


def _uids(ds: Dataset, plain: Plain | None = None) -> Iterator[str]:
    """UIDs that ``ds`` has as such; those of its frames are in its lists of references, too."""
    for raw in list(ds.elements()):
        if int(raw.tag) not in KEPT_TAGS - PER_FRAME:
            continue
        if plain and int(raw.tag) in plain:
            try:
                yield from list(uids_of(plain[int(raw.tag)]))
                continue
            except NotPlain:
                pass
        if raw.VR == "SQ":
            for item in ds[raw.tag].value:
                yield from _uids(item)
        elif raw.VR == "UI":
            value = ds[raw.tag].value or ""
            yield from [str(value)] if isinstance(value, str) else map(str, value)


@dataclass(frozen=True, slots=True)
class _Rules:
    pseudonyms: Pseudonyms
    days: int
    said: Callable[[str], str]


def _copy(ds: Dataset, rules: _Rules, done: Collection[int] = ()) -> Dataset:
    """Allowed elements of ``ds``, but for those of ``done``.

    Values that cannot name anybody are taken over without being decoded.
    """
    out = Dataset()
    public = str(ds.get("CodingSchemeDesignator") or "") in PUBLIC_SCHEMES
    for raw in list(ds.elements()):
        tag = raw.tag
        if int(tag) not in KEPT_TAGS or int(tag) in done:
            continue
        vr = _vr(raw)
        if vr == "SQ":
            items = [_copy(item, rules) for item in ds[tag].value if _may_leave(item)]
            out[tag] = DataElement(tag, "SQ", Sequence(items))
        elif vr == "UI":
            out[tag] = DataElement(tag, "UI", _each(ds[tag].value, rules.pseudonyms.uid))
        elif vr in ("DA", "DT"):
            out[tag] = DataElement(tag, vr, _each(ds[tag].value, lambda v: shifted(v, rules.days)))
        elif vr == "PN":
            if int(tag) in CREATOR:  # the model, by encode.common.creator_name
                out[tag] = DataElement(tag, "PN", rules.said(str(ds[tag].value or "")))
        elif vr in FREE_TEXT:
            if int(tag) in CODE_MEANING and not public:
                out[tag] = DataElement(tag, "LO", LOCAL_MEANING)
            elif int(tag) in CODE_VALUE or int(tag) in SCHEME:
                out[tag] = ds[tag]
            else:
                out[tag] = DataElement(tag, vr, _each(ds[tag].value, rules.said))
        else:
            out[tag] = raw
    return out


def _vr(raw: DataElement | RawDataElement) -> str:
    """Raises MalformedDataSet where there is none: it would be copied as bytes that no rule has seen."""
    if raw.VR is None or raw.VR == "UN":
        raise MalformedDataSet("de-identify", f"the value of {pydicom.datadict.keyword_for_tag(raw.tag)} has no VR")
    return str(raw.VR)


def _may_leave(item: Dataset) -> bool:
    """Whether a content item of a report does; items of other sequences do."""
    kind = item.get("ValueType")
    if kind is None:
        return True
    if kind in DROPPED_VALUE_TYPES:
        return False
    if kind != "TEXT":
        return True
    names = item.get("ConceptNameCodeSequence") or []
    return bool(names) and str(names[0].get("CodeValue") or "") in TEXT_CONCEPTS


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if value is None:
        return ""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return change(str(value))
    return [change(str(v)) for v in value]


_RECORD_KEPT: Mapping[str, frozenset[str]] = {
    "study": frozenset(
        {"PatientSex", "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"}
    ),
    "ai-result": frozenset(
        {
            *("Modality", "model", "model_version", "model_digest", "step", "revision", "critical", "objects"),
            *("segments", "measurements", "findings", "slices", "engine", "notes"),
        }
    ),
    "result-review": frozenset({"status", "reason"}),
    "patient": frozenset({"PatientSex"}),
}
_RECORD_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
PATIENT_TYPES = frozenset(_RECORD_KEPT)
"""Types of records that concern a patient; the others (settings, preferences) leave as they are."""


def deidentify_record(
    kind: str,
    data: Mapping[str, Any],
    patient: Mapping[str, str],
    pseudonyms: Pseudonyms,
    uids: Iterable[str] = (),
) -> tuple[dict[str, Any], dict[tuple[str, str], str]]:
    """Content of a record as it may leave, and the mapping.

    ``patient``: PatientID, IssuerOfPatientID and what else names patient and study, and under other names what
    was corrected: none of their words leaves in a text;
    ``uids``: of that study, exchanged in texts whatever they look like. A type that concerns a patient
    and is not known here leaves empty.
    """
    if kind not in PATIENT_TYPES and not patient:
        return dict(data), {}
    patient_id, issuer = patient.get("PatientID", ""), patient.get("IssuerOfPatientID", "")
    days = pseudonyms.days(patient_id, issuer)
    known = traces(*(v for k, v in patient.items() if k not in ("IssuerOfPatientID", "StudyInstanceUID")))
    all_uids = frozenset({*uids, *_told_uids(data)})

    def said(text: str) -> str:
        clean = pseudonyms.text(text, days, all_uids)
        return known.sub(REDACTED, clean) if known else clean

    def walk(value: Any, change: Callable[[str], str] = said) -> Any:
        if isinstance(value, Mapping):
            return {str(k): walk(v, pseudonyms.uid if _names_uid(k) else said) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(v, change) for v in value]
        return change(value) if isinstance(value, str) else value

    out = {k: walk(v) for k, v in data.items() if k in _RECORD_KEPT.get(kind, ())}
    mapping: dict[tuple[str, str], str] = {}
    for keyword in _RECORD_UIDS:
        if data.get(keyword):
            out[keyword] = pseudonyms.uid(str(data[keyword]))
            name = {"StudyInstanceUID": "study", "SeriesInstanceUID": "series"}.get(keyword, "instance")
            mapping[name, out[keyword]] = str(data[keyword])
    if kind == "study":
        out["PatientID"] = pseudonyms.patient(patient_id, issuer)
        out["StudyDate"] = shifted(str(data.get("StudyDate") or ""), days)
        mapping["patient", out["PatientID"]] = f"{patient_id}^{issuer}" if issuer else patient_id
    return out, mapping


def _names_uid(key: object) -> bool:
    """Whether a field holds a UID: UID, SOPInstanceUID, uid, tracking_uid; not: fluid."""
    return str(key).endswith(("UID", "UIDs", "_uid", "_uids")) or key == "uid"


def _told_uids(value: Any, named: bool = False) -> Iterator[str]:
    """UIDs that a record has under fields of their own."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _told_uids(inner, _names_uid(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _told_uids(inner, named)
    elif named and isinstance(value, str):
        yield value
