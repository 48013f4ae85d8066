"""pynetdicom as requestor of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation
from pynetdicom.presentation import build_context

from tests.peers import EXPLICIT_LITTLE, IMPLICIT_LITTLE
from tests.reactor import park
from tests.serve.conftest import Site

ROOT = "1.2.840.10008.5.1.4.1.2."
PATIENT_FIND, PATIENT_MOVE, PATIENT_GET = ROOT + "1.1", ROOT + "1.2", ROOT + "1.3"
STUDY_FIND, STUDY_MOVE, STUDY_GET = ROOT + "2.1", ROOT + "2.2", ROOT + "2.3"


def keys(level: str, **tags: Any) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = level
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


@contextmanager
def associated(
    site: Site,
    contexts: Sequence[tuple[str, Sequence[str]]] = (
        (STUDY_FIND, [EXPLICIT_LITTLE]),
        (PATIENT_FIND, [IMPLICIT_LITTLE]),
    ),
    *,
    calling: str = "ASKER",
    negotiation: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
) -> Iterator[Any]:
    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    ae.requested_contexts = [build_context(c, list(s)) for c, s in contexts]
    assoc = ae.associate(
        "127.0.0.1", site.node.port, ae_title="DICOMNODE", ext_neg=list(negotiation), evt_handlers=list(handlers)
    )
    assert assoc.is_established
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def find(assoc: Any, query: Dataset, model: str = STUDY_FIND) -> tuple[list[Dataset], list[int]]:
    park(assoc)
    answers = list(assoc.send_c_find(query, model))
    return [ds for _, ds in answers if ds is not None], [status.Status for status, _ in answers]


def extended(fields: bytes, *uids: str) -> list[Any]:
    """SOP Class Extended Negotiation with the same fields for each class."""
    items = []
    for uid in uids:
        item = SOPClassExtendedNegotiation()
        item.sop_class_uid, item.service_class_application_information = uid, fields
        items.append(item)
    return items


def relational(*uids: str) -> list[Any]:
    return extended(b"\x01", *uids)
