"""What SEG and SR share: provenance, times, character set and bytes that never vary."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from types import MappingProxyType

import highdicom as hd
import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode.headers import SourceHeaders
from dicomnode.encode.station import Station
from dicomnode.errors import NodeError, UnsuitableSeries
from dicomnode.records import Code, EncodedObject, ModelIdentity, ResultIdentity, SourceInstance

ARTIFICIAL_INTELLIGENCE = hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence")  # CID 7162
PROCESSING_EQUIPMENT = hd.sr.CodedConcept("109102", "DCM", "Processing Equipment")  # CID 7005
_ANATOMICAL = {("91723000", "SCT"), ("123037004", "SCT")}  # CID 7150, as it is and as it was
LONG_STRING = 64
NONE: Mapping[int, Sequence[bytes]] = MappingProxyType({})

SHORT_TEXT = 1024
LONG_TEXT = 10240

_library_lock = threading.RLock()


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom from judging values, and its warnings, which quote them, from the log.

    pydicom's switches are global to the process, so one encoding runs at a time.
    """
    with _library_lock, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def refuse_what_the_library_refuses(operation: str) -> Iterator[None]:
    """Turn the library's complaint about a source, e.g. a retired SOP class, into ``UnsuitableSeries``.

    Chaining it is safe: the library sees no patient (``with_empty_patient``).
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause = f"this kind of source cannot carry the result ({type(error).__name__})"
        raise UnsuitableSeries(operation, "NOT_ENCODABLE", cause) from error


@dataclass(frozen=True, slots=True)
class Provenance:
    """Names in the one form in which they appear in every place (IHE AIR, STANDARDS.md).

    ``facts``: digest of the bundle, engine, precision and parameters, a sentence each, whole;
    ``description`` is all of them within the 1024 characters of an ST.
    """

    name: str
    version: str
    manufacturer: str
    device_uid: str
    description: str
    date: str
    time: str
    timestamp: str
    facts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: ModelIdentity,
        identity: ResultIdentity,
        engine: str,
        precision: str = "",
        zone: timezone | None = None,
    ) -> Provenance:
        """``zone``: that of the source, where it says so, else times stay those of the node.

        Raises ``NodeError`` where ``content_datetime`` is not ISO 8601 or a name is empty.
        """
        try:
            when = datetime.fromisoformat(identity.content_datetime)
            when = when.astimezone(zone) if zone and when.tzinfo else when
        except ValueError:
            raise NodeError("encode result", "content_datetime is not ISO 8601") from None
        if not all(map(clean_text, (model.name, model.version, model.manufacturer, model.device_uid))):
            raise NodeError("encode result", "the model's name, version, manufacturer or device UID is empty")
        parameters = json.dumps(dict(model.parameters), sort_keys=True, ensure_ascii=False, default=str)
        parts = [f"bundle SHA-256 {model.digest}"]
        parts += [f"engine {engine}"] if engine else []
        parts += [f"precision {precision}"] if precision else []
        parts += [f"parameters {parameters}"] if model.parameters else []
        return cls(
            name=long_string(model.name),
            version=long_string(model.version),
            manufacturer=long_string(model.manufacturer),
            device_uid=model.device_uid,
            description=clean_text("; ".join(parts))[:SHORT_TEXT],
            date=when.strftime("%Y%m%d"),
            time=when.strftime("%H%M%S.%f"),
            timestamp=when.strftime("%Y%m%d%H%M%S.%f%z"),
            facts=tuple(clean_text(part) for part in parts),
        )


@dataclass(frozen=True, slots=True)
class Context:
    """Everything around an analysis that SEG and SR both need.

    ``sources``: every instance of the analysed series.
    """

    identity: ResultIdentity
    model: ModelIdentity
    provenance: Provenance
    headers: SourceHeaders
    sources: tuple[SourceInstance, ...]
    station: Station


def clean_text(text: str) -> str:
    """Text without control characters; a backslash, which separates values, becomes a slash."""
    return "".join(c if c.isprintable() else " " for c in text).replace("\\", "/").strip()


def long_string(text: str) -> str:
    """Text for VR LO: at most 64 characters (PS3.5 6.2)."""
    return clean_text(text)[:LONG_STRING].strip()


def creator_name(provenance: Provenance) -> str:
    """Content Creator's Name (PN, with a given name): the model."""
    return re.sub(r"[\^=]", " ", provenance.name)[:60] + "^AI"


def concept(code: Code) -> hd.sr.CodedConcept:
    """A coded concept with its meaning cut to 64 characters."""
    return hd.sr.CodedConcept(code.value, code.scheme, long_string(code.meaning))


def is_anatomical(category: Code) -> bool:
    """Whether a segmented property category (CID 7150) says: a structure that everybody has."""
    return (category.value, category.scheme) in _ANATOMICAL


def contributing_equipment(provenance: Provenance) -> Dataset:
    """Item of Contributing Equipment Sequence for the model (PS3.3 C.12.1, IHE AIR)."""
    item = Dataset()
    item.Manufacturer = provenance.manufacturer
    item.ManufacturerModelName = provenance.name
    item.SoftwareVersions = provenance.version
    item.DeviceUID = provenance.device_uid
    item.ContributionDateTime = provenance.timestamp
    item.ContributionDescription = provenance.description
    item.PurposeOfReferenceCodeSequence = [PROCESSING_EQUIPMENT]
    return item


def finish(ds: Dataset, kind: str, context: Context, encoded: Mapping[int, Sequence[bytes]] = NONE) -> EncodedObject:
    """Put on patient, study, equipment and times; the object as a Part 10 file.

    ``encoded``: further elements in Explicit VR Little Endian by their tag, each in pieces that follow each other;
    they are joined here once, since they may be large.

    Everything that the library took from the clock or from chance is replaced here or by the
    caller, so the same inputs give the same bytes.
    """
    provenance, station = context.provenance, context.station
    for element in context.headers.common:
        ds[element.tag] = element
    ds.Manufacturer = long_string(station.manufacturer)
    ds.ManufacturerModelName = long_string(station.model_name)
    ds.SoftwareVersions = long_string(station.software_versions)
    ds.DeviceSerialNumber = long_string(station.serial_number)
    if station.institution:
        ds.InstitutionName = long_string(station.institution)
    ds.InstanceCreationDate = ds.ContentDate = ds.SeriesDate = provenance.date
    ds.InstanceCreationTime = ds.ContentTime = ds.SeriesTime = provenance.time
    if context.headers.zone:
        ds.TimezoneOffsetFromUTC = provenance.timestamp[-5:]
    ds.ContributingEquipmentSequence = [contributing_equipment(provenance)]
    if "SpecificCharacterSet" in ds:
        del ds.SpecificCharacterSet
    if not _is_ascii(ds):
        ds.SpecificCharacterSet = "ISO_IR 192"
    return EncodedObject(
        kind=kind,
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        transfer_syntax_uid=str(ExplicitVRLittleEndian),
        part10=b"".join(_pieces(ds, encoded)),
    )


def _pieces(ds: Dataset, encoded: Mapping[int, Sequence[bytes]]) -> Iterator[bytes]:
    """The file in pieces, ``encoded`` where its tags belong. Takes the elements behind them out of ``ds``."""
    behind = {}
    for tag in sorted(encoded, reverse=True):
        behind[tag] = Dataset({e.tag: e for e in ds if e.tag > tag})
        for other in behind[tag].keys():  # noqa: SIM118 iterating over a data set gives its elements
            del ds[other]
    buffer = DicomBytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    yield buffer.getvalue()
    for tag in sorted(encoded):
        yield from encoded[tag]
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_dataset(buffer, behind[tag], ds.get("SpecificCharacterSet") or "iso8859")
        yield buffer.getvalue()


def say_laterality(ds: Dataset, context: Context) -> None:
    """Laterality (Type 2C, PS3.3 C.7.3.1) is empty where no Body Part Examined says that it is not needed."""
    if not context.headers.common.get("BodyPartExamined"):
        ds.Laterality = ""


def _is_ascii(ds: Dataset) -> bool:
    """Whether all text fits the default repertoire; per-frame groups hold no free text."""
    for element in ds:
        if element.keyword == "PerFrameFunctionalGroupsSequence":
            continue
        if element.VR == "SQ":
            if not all(_is_ascii(item) for item in element.value):
                return False
        elif element.VR in {"LO", "LT", "PN", "SH", "ST", "UC", "UT"} and not str(element.value).isascii():
            return False
    return True
