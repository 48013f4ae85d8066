"""A journal record as an object of the node: fields, file meta information, index row. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dicomnode import durable
from dicomnode.header import Wanted, read_header
from dicomnode.index.catalogue import NewInstance
from dicomnode.receive.part10 import file_meta

IDENTITY = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID")
"""Without these an object cannot be indexed."""


class Fields(NamedTuple):
    """What a record has to say beside the data set; ``received_at`` is node time in seconds."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    association_id: str
    received_at: float

    def encode(self) -> bytes:
        return _SEPARATOR.join((*self[:5], repr(self.received_at))).encode()


_SEPARATOR = "\0"
"""Neither a UID nor an AE title can have it."""


def decode_fields(text: bytes) -> Fields:
    """Raises ValueError when these are no fields."""
    sop_class, sop_instance, syntax, ae, association, at = text.decode().split(_SEPARATOR)
    return Fields(sop_class, sop_instance, syntax, ae, association, float(at))


def meta_of(fields: Fields) -> bytes:
    return file_meta(
        sop_class_uid=fields.sop_class_uid,
        sop_instance_uid=fields.sop_instance_uid,
        transfer_syntax_uid=fields.transfer_syntax_uid,
        source_ae=fields.calling_ae,
    )


@dataclass(frozen=True, slots=True)
class Described:
    """What the index needs of an object, still without the name of its file."""

    attributes: dict[str, str]
    meta: bytes
    hashes: durable.ObjectHash
    size: int

    def instance(self, fields: Fields, file: str) -> NewInstance:
        return NewInstance(
            attributes=self.attributes,
            transfer_syntax_uid=fields.transfer_syntax_uid,
            file=file,
            size=self.size,
            sha256=self.hashes.whole,
            dataset_sha256=self.hashes.data_set,
            association_id=fields.association_id,
            received_at=fields.received_at,
        )


def describe(fields: Fields, data_set: bytes | memoryview, wanted: Wanted) -> Described:
    """Raises MalformedDataSet when the data set cannot be read."""
    meta = meta_of(fields)
    return Described(
        attributes=read_header(data_set, fields.transfer_syntax_uid, wanted),
        meta=meta,
        hashes=durable.hash_object(data_set, meta),
        size=len(meta) + len(data_set),
    )
