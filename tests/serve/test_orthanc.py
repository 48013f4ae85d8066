"""Orthanc asks the node and has it send: C-FIND, C-MOVE and, where it can, C-GET."""

from __future__ import annotations

import pytest

from tests.peers import Orthanc
from tests.serve.cases import STUDY_A, STUDY_D, UIDS
from tests.serve.conftest import Site

pytestmark = pytest.mark.peers


def test_query_and_retrieve(site: Site, orthanc: Orthanc) -> None:
    query = {
        "Level": "Study",
        "Query": {"PatientID": "P1", "StudyInstanceUID": "", "ModalitiesInStudy": "", "StudyDate": "20240101-"},
    }
    asked = orthanc.post("/modalities/node/query", query)
    answers = [
        orthanc.get(f"{asked['Path']}/answers/{n}/content?simplify") for n in orthanc.get(asked["Path"] + "/answers")
    ]
    assert [a["StudyInstanceUID"] for a in answers] == [STUDY_A]
    assert answers[0]["ModalitiesInStudy"] == "CT\\MR"
    orthanc.post(f"{asked['Path']}/retrieve", {"TargetAet": "PACS", "Synchronous": True})
    found = orthanc.instances(STUDY_A)
    assert {modality: len(ids) for modality, ids in found.items()} == {"CT": 3, "MR": 1}


def test_move_by_resource(site: Site, orthanc: Orthanc) -> None:
    orthanc.post(
        "/modalities/node/move",
        {"Level": "Study", "Resources": [{"StudyInstanceUID": STUDY_D}], "TargetAet": "PACS", "Synchronous": True},
    )
    (ids,) = orthanc.instances(STUDY_D).values()
    tags = [orthanc.get(f"/instances/{i}/simplified-tags") for i in ids]
    assert {t["SOPInstanceUID"] for t in tags} == {UIDS[6], UIDS[7]}
