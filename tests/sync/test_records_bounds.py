"""One record, or a cloud that sends without end, must not hold up the feed, fill the disk or learn a Patient ID."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import OperatorError
from dicomnode.sync.departure import Departures
from tests.sync.index_case import CANARY_ID, add_results
from tests.sync.test_records import Cloud, Node, run


def test_a_patient_id_is_no_name_of_a_record(tmp_path: Path) -> None:
    async def body(cloud: Cloud, node: Node) -> None:
        add_results(node.db, node.settings.node.data_dir, cloud=node.settings.cloud_plan)
        await node.exchange()
        for name in (CANARY_ID, "2.25.1"):
            with pytest.raises(OperatorError, match="pseudonym") as told:
                node.set("patient", name, PatientSex="M")
            assert name not in str(told.value)
        known = str(node.db.value("SELECT pseudonym FROM pseudonyms WHERE kind = 'patient'"))
        assert node.set("patient", known, PatientSex="M") == 1
        item: dict[str, Any] = dict.fromkeys(
            ("idempotency_key", "version", "base_version", "base_key", "settles", "changed_time", "study_id")
        )
        item |= {"type": "patient", "data": '{"PatientSex": "M"}', "identified": 0}
        leaving = Departures(node.settings, node.db)
        assert leaving.record(item | {"record_id": known})["id"] == known
        left = leaving.record(item | {"record_id": CANARY_ID})
        assert CANARY_ID not in json.dumps(left) and left["id"] == leaving.record(item | {"record_id": CANARY_ID})["id"]

    run(tmp_path, body)
