"""Queries and retrieves of somebody who wants more than he may have."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dicomnode.index.database import Database
from dicomnode.index.matching import Root
from dicomnode.serve.exchange import DESTINATION_UNKNOWN
from dicomnode.serve.retrieve import Retriever
from dicomnode.settings import Settings
from tests.serve.asking import PATIENT_FIND, STUDY_GET, associated, find, keys
from tests.serve.cases import STUDY_A
from tests.serve.conftest import Site

INJECTIONS = [
    "' OR 1=1--",
    "' OR ''='",
    '" OR ""="',
    "x'; DROP TABLE studies;--",
    "%",
    "_",
    "A_1_",
    "%' ESCAPE '!",
    "!%",
    "') UNION SELECT 1,2,3--",
    "$.PatientID",
    "a\x00b",
]
KEYS = ["PatientID", "AccessionNumber", "StudyID", "StudyDescription", "PatientName", "StudyDate", "StudyTime"]


@pytest.mark.parametrize("text", INJECTIONS, ids=range(len(INJECTIONS)))
def test_keys_are_values_and_never_sql(site: Site, text: str) -> None:
    import warnings

    with warnings.catch_warnings(), associated(site) as assoc:
        warnings.simplefilter("ignore")  # pydicom on values that their VR does not allow
        for keyword in KEYS:
            found, statuses = find(assoc, keys("STUDY", **{keyword: text, "StudyInstanceUID": ""}))
            assert (found, statuses[-1]) in (([], 0x0000), ([], 0xA900)), keyword
        found, statuses = find(assoc, keys("STUDY", ModalitiesInStudy=text[:16], StudyInstanceUID=""))
        assert (found, statuses) == ([], [0x0000])
        found, statuses = find(assoc, keys("PATIENT", PatientID=text), PATIENT_FIND)
        assert found == [] and statuses[-1] == 0x0000
        assert find(assoc, keys("STUDY", StudyInstanceUID=STUDY_A))[1] == [0xFF00, 0x0000], "the index is whole"


@pytest.mark.parametrize("text", ["' OR 1=1--", "%", "*", "1.2.3' OR '1'='1", "../../1.2", "1.2\\' OR 1=1--"])
def test_a_retrieve_by_something_else_than_a_uid(site: Site, text: str) -> None:
    import warnings

    stored = []
    with warnings.catch_warnings(), associated(site, [(STUDY_GET, ["1.2.840.10008.1.2.1"])]) as assoc:
        warnings.simplefilter("ignore")
        for status, _ in assoc.send_c_get(keys("STUDY", StudyInstanceUID=text), STUDY_GET):
            stored.append(status.Status)
    assert stored == [0xA900]


@pytest.mark.parametrize(
    "destination",
    ["STRANGER", "evil.example.com", "192.0.2.1", "127.0.0.1:104", "", "*", "ASKER", "pacs", "PACS\0EVIL", "P" * 200],
)
def test_no_name_is_looked_up_and_no_socket_opened_for_an_unknown_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str
) -> None:
    settings = Settings.model_validate(
        {
            "node": {"data_dir": tmp_path / "data"},
            "peers": [
                {"name": "asker", "ae_title": "ASKER", "allow": ["move"]},
                {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 1},
            ],
        }
    )
    touched: list[Any] = []
    for name in ("getaddrinfo", "create_connection", "gethostbyname", "socket"):
        monkeypatch.setattr(socket, name, lambda *a, name=name, **k: touched.append((name, a)))
    answers: list[int] = []
    exchange: Any = SimpleNamespace(
        request=SimpleNamespace(MoveDestination=destination), respond=lambda status, *_: answers.append(status)
    )
    db = Database(tmp_path / "data")
    retriever = Retriever(settings, db)
    try:
        assert retriever.move(exchange, Root.STUDY, relational=False) == DESTINATION_UNKNOWN
    finally:
        retriever.close()
        db.close()
    assert (answers, touched) == ([DESTINATION_UNKNOWN], [])
