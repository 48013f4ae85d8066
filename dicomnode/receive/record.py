"""A journal record as an object of the node: fields, file meta information, index row. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dicomnode import durable
from dicomnode.header import Wanted, read_header
from dicomnode.index.catalogue import NewInstance
from dicomnode.receive.part10 import file_meta

IDENTITY = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID")
"""Without these an object cannot be indexed."""


def fields_of(
    *,
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    calling_ae: str,
    association_id: str,
    received_at: float,
) -> dict[str, str]:
    """What a record has to say beside the data set; ``received_at`` is node time in seconds."""
    return {
        "class": sop_class_uid,
        "instance": sop_instance_uid,
        "syntax": transfer_syntax_uid,
        "ae": calling_ae,
        "association": association_id,
        "at": repr(received_at),
    }


def meta_of(fields: Mapping[str, str]) -> bytes:
    return file_meta(
        sop_class_uid=fields["class"],
        sop_instance_uid=fields["instance"],
        transfer_syntax_uid=fields["syntax"],
        source_ae=fields["ae"],
    )


@dataclass(frozen=True, slots=True)
class Described:
    """What the index needs of an object, still without the name of its file."""

    attributes: dict[str, str]
    meta: bytes
    hashes: durable.ObjectHash
    size: int

    def instance(self, fields: Mapping[str, str], file: str) -> NewInstance:
        return NewInstance(
            attributes=self.attributes,
            transfer_syntax_uid=fields["syntax"],
            file=file,
            size=self.size,
            sha256=self.hashes.whole,
            dataset_sha256=self.hashes.data_set,
            association_id=fields["association"],
            received_at=float(fields["at"]),
        )


def describe(fields: Mapping[str, str], data_set: bytes | memoryview, wanted: Wanted) -> Described:
    """Raises MalformedDataSet when the data set cannot be read."""
    meta = meta_of(fields)
    return Described(
        attributes=read_header(data_set, fields["syntax"], wanted),
        meta=meta,
        hashes=durable.hash_object(data_set, meta),
        size=len(meta) + len(data_set),
    )
