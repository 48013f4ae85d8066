"""Headers of the analysed series, read once and brought into a form that results can carry.

Tolerant in what is read: values that the standard forbids are left out or emptied on a copy,
never on the stored file. Identifiers (PatientID, AccessionNumber, UIDs) are copied as they
are, even when too long for their VR: a result must match the study that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta, timezone

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import PersonName

from dicomnode.encode.multiframe import Frames, read_frames
from dicomnode.errors import MalformedDataSet, NodeError, StorageError, UnsuitableSeries
from dicomnode.geometry import SlicePlane, analyse_stack, frames_note
from dicomnode.header import Wanted
from dicomnode.identity import derived_uid
from dicomnode.part10 import HEAD_BYTES, begun_header
from dicomnode.records import SourceInstance

OPERATION = "read source headers"

PATIENT_AND_STUDY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
)  # fmt: skip
"""Attributes of Type 2 in the patient and study modules, so present in every result."""

_OPTIONAL = (
    "IssuerOfPatientID", "TypeOfPatientID", "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence", "PatientBirthTime", "EthnicGroup", "PatientComments",
    "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "PatientSpeciesDescription", "PatientBreedDescription", "ResponsiblePerson",
    "StudyDescription", "IssuerOfAccessionNumberSequence", "ProcedureCodeSequence",
    "PatientAge", "PatientSize", "PatientWeight", "BodyPartExamined",
)  # fmt: skip
_TRIAL_TYPE_1 = ("ClinicalTrialSponsorName", "ClinicalTrialProtocolID")
_TRIAL_TYPE_2 = ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName")
_TRIAL_OTHER = ("ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID")
_TRIAL_TIME_POINT = "ClinicalTrialTimePointID"

DISPLAY = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
"""How a slice is shown; what is no number is left out."""

_SLICE_KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "Rows",
    "Columns", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "FrameOfReferenceUID", "PositionReferenceIndicator", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod", "PatientOrientation",
    *DISPLAY,
)  # fmt: skip
_SLICE_TAGS = tuple(Tag(keyword) for keyword in _SLICE_KEYWORDS)
_SLICE_WANTED = Wanted(_SLICE_KEYWORDS)
_FORM = {
    keyword: (tag, dictionary_VR(tag), keyword in {"FrameOfReferenceUID", "SliceThickness"})
    for keyword, tag in zip(_SLICE_KEYWORDS, _SLICE_TAGS, strict=True)
}
"""Tag, VR, and whether the value may be set later, so that slices must not share its element."""
_NEEDED = frozenset({"StudyInstanceUID", "SeriesInstanceUID"})
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_FIRST_KEYWORDS = (
    *PATIENT_AND_STUDY, *_OPTIONAL, *_TRIAL_TYPE_1, *_TRIAL_TYPE_2, *_TRIAL_OTHER, _TRIAL_TIME_POINT,
    "SpecificCharacterSet", "SeriesNumber", "TimezoneOffsetFromUTC", *_SLICE_KEYWORDS,
)  # fmt: skip

_DATE = re.compile(r"\d{8}")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_FORMS = {"DA": _DATE, "TM": _TIME, "CS": re.compile(r"[A-Z0-9_ ]{1,16}"), "AS": re.compile(r"\d{3}[DWMY]")}
_ENUMERATED = {"PatientSex": {"M", "F", "O"}, "PatientIdentityRemoved": {"YES", "NO"}}


@dataclass(frozen=True, slots=True)
class SourceHeaders:
    """What results take from their source; read-only by agreement.

    ``common``: patient and study attributes, all text decoded, Type 2 ones always present.
    ``slices``: skeletons (UIDs and geometry) in the order asked for, one frame of reference.
    ``notes``: what had to be normalised, in words for the reader of the report.
    """

    common: Dataset
    slices: tuple[Dataset, ...]
    modality: str
    series_number: int
    study_uid: str
    series_uid: str
    notes: tuple[str, ...] = ()
    frames: Frames = field(default_factory=dict)
    zone: timezone | None = None
    """Timezone Offset From UTC, of all dates and times of the source, and so of its results."""

    def place(self, index: int) -> tuple[str, int]:
        """SOPInstanceUID of slice ``index`` (from 0) and its frame number, 0 for a single-frame image."""
        uid = str(self.slices[index].SOPInstanceUID)
        known = self.frames.get(uid)
        return known[:2] if known else (uid, 0)


def read_headers(
    source_uids: Sequence[str],
    sources: Sequence[SourceInstance],
    source_frames: Sequence[int] = (),
    *,
    one_size: bool = True,
) -> SourceHeaders:
    """Read the headers of ``source_uids``, the first one in full, the others' geometry.

    Call it inside ``quiet_pydicom``. With no ``source_uids`` the first of ``sources`` serves
    for patient and study. ``source_frames`` as in ``Analysis``: with it each slice is a frame, and
    ``frames`` says what the UIDs of ``slices`` stand for. Raises ``NodeError`` when a UID is not among ``sources``,
    ``StorageError`` when a file cannot be opened, ``MalformedDataSet`` when it cannot be read,
    ``UnsuitableSeries`` when the slices belong to different series or, with ``one_size``, differ in size.
    """
    if not sources:
        raise NodeError(OPERATION, "no source instance was given")
    by_uid = {source.sop_instance_uid: source for source in sources}
    missing = sum(uid not in by_uid for uid in source_uids)
    if missing:
        raise NodeError(OPERATION, f"{missing} analysed slice(s) are not among the source instances")
    chosen = [by_uid[uid] for uid in source_uids] or [sources[0]]
    if source_frames:
        return _frame_headers(chosen, source_frames)
    first = _read(chosen[0], _FIRST_KEYWORDS)
    shared: _Shared = {}
    raw: list[Dataset] = [first, *(_read_slice(source, shared) for source in chosen[1:])]
    return normalise_headers(raw, with_slices=bool(source_uids), one_size=one_size)


def _frame_headers(chosen: Sequence[SourceInstance], numbers: Sequence[int]) -> SourceHeaders:
    if len(numbers) != len(chosen):
        raise NodeError(OPERATION, f"{len(numbers)} frame numbers for {len(chosen)} slices")
    wanted: dict[str, list[int]] = {}
    for source, number in zip(chosen, numbers, strict=True):
        wanted.setdefault(source.sop_instance_uid, []).append(number)
    by_uid = {source.sop_instance_uid: source for source in chosen}
    flat: dict[tuple[str, int], Dataset] = {}
    for uid, of_one in wanted.items():
        flat |= {(uid, n): ds for n, ds in zip(of_one, read_frames(by_uid[uid], of_one), strict=True)}
    raw = [flat[source.sop_instance_uid, number] for source, number in zip(chosen, numbers, strict=True)]
    headers = normalise_headers(raw, with_slices=True)
    frames = {str(ds.SOPInstanceUID): (*place, by_uid[place[0]].sop_class_uid) for place, ds in flat.items()}
    return replace(headers, frames=frames)


def normalise_headers(raw: Sequence[Dataset], *, with_slices: bool, one_size: bool = True) -> SourceHeaders:
    """Skeletons and patient/study attributes from data sets as read; changes none of them.

    Raises ``UnsuitableSeries`` with code ``MIXED_SERIES``, ``MIXED_SIZE`` or ``MULTI_FRAME``.
    """
    first = raw[0]
    _refuse_mixture(raw, one_size=one_size)
    if with_slices and any(_number(_clean(ds, "NumberOfFrames")) > 1 for ds in raw):
        raise UnsuitableSeries(OPERATION, "MULTI_FRAME", "the analysis does not say which frames it looked at")
    modality = str(first.get("Modality") or "OT")
    notes: list[str] = []
    skeletons = [_skeleton(ds, modality) for ds in raw] if with_slices else []
    if skeletons and "ImagePositionPatient" in skeletons[0]:
        notes += _one_frame_of_reference(skeletons, str(first.SeriesInstanceUID))
        _complete_thickness(skeletons)
    return SourceHeaders(
        common=_common(first),
        slices=tuple(skeletons),
        modality=modality,
        series_number=_number(_clean(first, "SeriesNumber")),
        study_uid=str(first.StudyInstanceUID),
        series_uid=str(first.SeriesInstanceUID),
        notes=tuple(notes),
        zone=_zone(first),
    )


def _zone(first: Dataset) -> timezone | None:
    """PS3.3 C.12.1.1.8: a sign, hours and minutes, -1200 to +1400."""
    match = re.fullmatch(r"([+-])(\d{2})([0-5]\d)", str(_clean(first, "TimezoneOffsetFromUTC") or "").strip())
    if match is None:
        return None
    minutes = (int(match[2]) * 60 + int(match[3])) * (-1 if match[1] == "-" else 1)
    return timezone(timedelta(minutes=minutes)) if -720 <= minutes <= 840 else None


def _read(source: SourceInstance, keywords: Sequence[str]) -> Dataset:
    try:
        ds = pydicom.dcmread(source.path, stop_before_pixels=True, specific_tags=list(keywords))
    except OSError as error:
        raise StorageError(OPERATION, f"a source file cannot be opened ({error.strerror})") from None
    except (InvalidDicomError, EOFError, ValueError) as error:
        raise MalformedDataSet(OPERATION, f"a source file cannot be read ({type(error).__name__})") from None
    if str(ds.get("SOPInstanceUID", "")) != source.sop_instance_uid:
        raise NodeError(OPERATION, "a source file holds another instance than the index says")
    if not ds.get("StudyInstanceUID") or not ds.get("SeriesInstanceUID"):
        raise MalformedDataSet(OPERATION, "a source file has no StudyInstanceUID or SeriesInstanceUID")
    return ds


_Shared = dict[tuple[int, str], DataElement]
"""Elements by tag and text: most values of a series are the same in every slice."""


class _Bare(Dataset):  # type: ignore[misc] # pydicom has no types
    """A slice's part of a header with nothing empty in it, made here: it becomes its own skeleton."""


def _read_slice(source: SourceInstance, shared: _Shared) -> Dataset:
    """The slice's part of a header, by the bounded reader: thirty times faster than pydicom.

    What that one cannot settle, or finds strange, pydicom reads.
    """
    try:
        with source.path.open("rb") as file:
            texts = begun_header(file.read(HEAD_BYTES), _SLICE_WANTED)
    except OSError as error:
        raise StorageError(OPERATION, f"a source file cannot be opened ({error.strerror})") from None
    if texts is None or texts.get("SOPInstanceUID") != source.sop_instance_uid or not all(map(texts.get, _NEEDED)):
        return _read(source, _SLICE_KEYWORDS)
    elements: dict[BaseTag, DataElement] = {}
    try:
        for keyword, text in texts.items():
            tag, vr, own = _FORM[keyword]
            if not text and vr != "US":
                continue
            element = None if own else shared.get((tag, text))
            if element is None:
                value = text.split("\\") if "\\" in text else text
                element = DataElement(tag, vr, int(text) if vr == "US" else value)
                shared[tag, text] = element
            elements[tag] = element
    except (ValueError, TypeError, OverflowError):
        return _read(source, _SLICE_KEYWORDS)
    return _Bare(elements)


def _refuse_mixture(raw: Sequence[Dataset], *, one_size: bool) -> None:
    series = {(str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)) for ds in raw}
    if len(series) > 1:
        raise UnsuitableSeries(OPERATION, "MIXED_SERIES", f"the slices belong to {len(series)} series")
    if one_size and len({(ds.get("Rows"), ds.get("Columns")) for ds in raw}) > 1:
        raise UnsuitableSeries(OPERATION, "MIXED_SIZE", "the slices differ in rows or columns")


def with_empty_patient(ds: Dataset) -> Dataset:
    """Copy with empty patient and study attributes, for the library that builds the objects.

    It insists on them but names the patient in its warnings, so it never sees one; the real
    values are put on at the end.
    """
    out = Dataset()
    out.update(ds)
    for keyword in PATIENT_AND_STUDY:
        setattr(out, keyword, "")
    return out


def _skeleton(ds: Dataset, modality: str) -> Dataset:
    """UIDs and geometry of one slice, without patient."""
    out = ds if isinstance(ds, _Bare) else Dataset()
    for keyword, tag in () if out is ds else zip(_SLICE_KEYWORDS, _SLICE_TAGS, strict=True):
        if tag not in ds:
            continue
        try:
            element = ds[tag]
        except (ValueError, TypeError, OverflowError):
            if keyword in DISPLAY:
                continue
            raise MalformedDataSet(OPERATION, "a geometry attribute of a source file is no number") from None
        if not element.is_empty:
            out.add(element)
    if out.get("Modality") != modality:
        out["Modality"] = DataElement("Modality", "CS", modality)  # its own is shared with other slices
    if not all(keyword in out for keyword in _PLANE):
        for keyword in (*_PLANE, "FrameOfReferenceUID", "PositionReferenceIndicator"):
            if keyword in out:
                delattr(out, keyword)
    return out


def _one_frame_of_reference(skeletons: Sequence[Dataset], series_uid: str) -> list[str]:
    """Give every skeleton the first slice's FrameOfReferenceUID; says so when that changed any.

    Real series exist in which every slice has one of its own (STANDARDS.md).
    """
    found = [str(ds.get("FrameOfReferenceUID", "")) for ds in skeletons]
    chosen = found[0] or next((uid for uid in found if uid), "") or derived_uid("frame", series_uid)
    for ds in skeletons:
        ds.FrameOfReferenceUID = chosen
    if not any(found):
        return ["The source images name no frame of reference; the results use one of their own."]
    if len(set(found)) > 1:
        return [frames_note(len(set(found)))]
    return []


def _complete_thickness(skeletons: Sequence[Dataset]) -> None:
    """SliceThickness (Type 2 in CT and MR) from the slice distance where the source has none."""
    if all(ds.get("SliceThickness") for ds in skeletons):
        return
    planes = [
        SlicePlane(str(ds.SOPInstanceUID), tuple(ds.ImagePositionPatient), tuple(ds.ImageOrientationPatient))
        for ds in skeletons
    ]
    spacing = analyse_stack(planes).spacing
    for ds in skeletons:
        if not ds.get("SliceThickness") and spacing > 0.0:
            ds.SliceThickness = f"{spacing:.6g}"


def _common(first: Dataset) -> Dataset:
    """Patient and study attributes of one data set, decoded; Type 2 ones present if empty."""
    out = Dataset()  # not Dataset.decode(): it encodes again and turns what cannot be into "?"
    keywords = [*PATIENT_AND_STUDY, *_OPTIONAL]
    if all(first.get(keyword) for keyword in _TRIAL_TYPE_1):
        keywords += [*_TRIAL_TYPE_1, *_TRIAL_OTHER, _TRIAL_TIME_POINT]
        for keyword in _TRIAL_TYPE_2:
            setattr(out, keyword, _clean(first, keyword) or "")
    for keyword in keywords:
        value = _clean(first, keyword)
        if keyword in PATIENT_AND_STUDY:
            setattr(out, keyword, "")
        if value is not None:
            with suppress(ValueError, TypeError):  # a text where the standard has a number
                setattr(out, keyword, value)
    how = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
    if out.get("PatientIdentityRemoved") == "YES" and not any(keyword in out for keyword in how):
        out.DeidentificationMethod = "not stated by the source"  # Type 1C (PS3.3 C.7.1.1)
    return out


def _clean(ds: Dataset, keyword: str) -> object:
    """The value as it may be written, or ``None`` when absent, empty or of a wrong form."""
    try:
        element = ds[keyword]
        value = element.value
    except (KeyError, ValueError, TypeError, OverflowError):  # absent, or a number that is none
        return None
    if element.VR == "SQ":
        return [_decoded_item(item) for item in value] or None
    if value in (None, "") or str(value).strip() == "":
        return None
    if element.VR == "PN":
        return PersonName(str(value))
    form = _FORMS.get(element.VR)
    if form and not form.fullmatch(str(value).strip()):
        return None
    if keyword in _ENUMERATED and str(value) not in _ENUMERATED[keyword]:
        return None
    kept: object = value
    return kept


def _decoded_item(item: Dataset) -> Dataset:
    """Copy of a sequence item, without a character set of its own: text is decoded already."""
    out = Dataset()
    for element in item:
        if element.keyword and element.keyword != "SpecificCharacterSet":
            value = _clean(item, element.keyword)
            absent = [] if element.VR == "SQ" else ""
            setattr(out, element.keyword, absent if value is None else value)
    return out


def _number(value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        return 0
