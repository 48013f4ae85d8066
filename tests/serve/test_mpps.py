"""MPPS as SCP without a network: what is stored, what is refused, and that success means committed."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pynetdicom.dimse_primitives import C_ECHO, N_CREATE, N_GET, N_SET

from dicomnode import logs
from dicomnode.errors import IllegalTransition
from dicomnode.index.database import Database
from dicomnode.index.procedure import FINAL, STEP_TABLE, Steps, StepState, next_step_state
from dicomnode.nested import EXPLICIT_LITTLE, parse, text
from dicomnode.serve import ProcedureSteps
from dicomnode.serve.mpps import RETRIEVE, STEP
from dicomnode.serve.procedure_step import Refused, changed, created
from dicomnode.settings import Peer, Settings
from tests.mpps_case import begun, ended, series_item

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
SYNTAXES = [EXPLICIT_LITTLE, IMPLICIT_LITTLE]


def encoded(ds: Dataset, syntax: str = EXPLICIT_LITTLE) -> bytes:
    buffer = DicomIO(io.BytesIO())
    buffer.is_little_endian, buffer.is_implicit_VR = True, syntax == IMPLICIT_LITTLE
    write_dataset(buffer, ds)
    return buffer.parent.getvalue()


class Wire:
    """An association as the service sees it; ``answers`` are the responses that it sent."""

    def __init__(self) -> None:
        self.node_peer = Peer(name="mod1", ae_title="MOD1", allow=("mpps",))
        self.answers: list[Any] = []
        self.dimse = SimpleNamespace(send_msg=lambda response, context_id: self.answers.append(response))

    def usable(self) -> bool:
        return True


class Scp:
    """The service with short words for its operations; each returns the response."""

    def __init__(self, db: Database, syntax: str = EXPLICIT_LITTLE) -> None:
        settings = Settings(node={"data_dir": db.data_dir})
        self.service = ProcedureSteps(settings, db, make_uid=lambda: "2.25.7")
        self.steps = Steps(db)
        self.syntax = syntax

    def serve(self, request: Any, sop_class: str = STEP) -> Any:
        wire = Wire()
        request.MessageID = 7
        context = SimpleNamespace(context_id=1, abstract_syntax=sop_class, transfer_syntax=[self.syntax])
        self.service.serve(wire, request, context)
        (answer,) = wire.answers
        assert answer.MessageIDBeingRespondedTo == 7
        return answer

    def create(self, ds: Dataset | bytes, uid: str | None = "1.2.3", sop_class: str = STEP) -> Any:
        request = N_CREATE()
        request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class, uid
        request.AttributeList = io.BytesIO(ds if isinstance(ds, bytes) else encoded(ds, self.syntax))
        return self.serve(request)

    def set(self, ds: Dataset | bytes, uid: str = "1.2.3", sop_class: str = STEP) -> Any:
        request = N_SET()
        request.RequestedSOPClassUID, request.RequestedSOPInstanceUID = sop_class, uid
        request.ModificationList = io.BytesIO(ds if isinstance(ds, bytes) else encoded(ds, self.syntax))
        return self.serve(request)

    def get(self, *tags: int, uid: str = "1.2.3", sop_class: str = RETRIEVE) -> Any:
        request = N_GET()
        request.RequestedSOPClassUID, request.RequestedSOPInstanceUID = sop_class, uid
        if tags:
            request.AttributeIdentifierList = list(tags)
        return self.serve(request, RETRIEVE)

    def state(self, uid: str = "1.2.3") -> str | None:
        row = self.steps.read(uid)
        return row["state"] if row else None


@pytest.fixture(params=SYNTAXES, ids=["explicit", "implicit"])
def scp(db: Database, request: pytest.FixtureRequest) -> Scp:
    return Scp(db, request.param)


def test_a_step_from_begin_to_end(scp: Scp, db: Database) -> None:
    assert scp.create(begun("1.2.10")).Status == 0x0000
    interim = Dataset()
    interim.PerformedSeriesSequence = [series_item("1.2.20", ["1.5"])]
    assert scp.set(interim).Status == 0x0000
    assert scp.state() == "IN PROGRESS"
    last = ended("COMPLETED", {"1.2.20": ["1.5", "1.6"], "1.2.21": []})
    last.PerformedSeriesSequence[0].ReferencedNonImageCompositeSOPInstanceSequence = series_item(
        "1.2.20", ["1.7", "1.5"]
    ).ReferencedImageSequence
    answer = scp.set(last)
    assert (answer.Status, answer.AffectedSOPInstanceUID, answer.AffectedSOPClassUID) == (0x0000, "1.2.3", STEP)
    rows = db.rows(
        "SELECT SeriesInstanceUID, instances, (SELECT group_concat(SOPInstanceUID, ' ') FROM performed_instances i"
        " WHERE i.performed_series_id = p.id) AS uids FROM performed_series p ORDER BY SeriesInstanceUID"
    )
    assert [(r["SeriesInstanceUID"], r["instances"]) for r in rows] == [("1.2.20", 3), ("1.2.21", 0)]
    assert set(rows[0]["uids"].split()) == {"1.5", "1.6", "1.7"}
    assert db.rows("SELECT StudyInstanceUID FROM procedure_step_studies") == [{"StudyInstanceUID": "1.2.10"}]
    assert scp.state() == "COMPLETED"


def test_uid_is_made_where_there_is_none(scp: Scp) -> None:
    answer = scp.create(begun("1.2.10"), None)
    assert (answer.Status, answer.AffectedSOPInstanceUID) == (0x0000, "2.25.7")
    assert scp.state("2.25.7") == "IN PROGRESS"


@pytest.mark.parametrize(
    ("changes", "status", "names"),
    [
        ({"PerformedProcedureStepStatus": "COMPLETED"}, 0x0106, "IN PROGRESS"),
        ({"PerformedProcedureStepStatus": "SCHEDULED"}, 0x0106, "IN PROGRESS"),
        ({"PerformedProcedureStepStatus": None}, 0x0120, "PerformedProcedureStepStatus"),
        ({"PerformedProcedureStepStatus": ""}, 0x0121, "PerformedProcedureStepStatus"),
        ({"ScheduledStepAttributesSequence": None}, 0x0120, "ScheduledStepAttributesSequence"),
        ({"ScheduledStepAttributesSequence": []}, 0x0121, "ScheduledStepAttributesSequence"),
        ({"ScheduledStepAttributesSequence": [Dataset()]}, 0x0120, "StudyInstanceUID"),
        ({"PerformedProcedureStepID": ""}, 0x0121, "PerformedProcedureStepID"),
        ({"PerformedStationAETitle": None}, 0x0120, "PerformedStationAETitle"),
        ({"PerformedProcedureStepStartDate": None}, 0x0120, "PerformedProcedureStepStartDate"),
        ({"PerformedProcedureStepStartTime": ""}, 0x0121, "PerformedProcedureStepStartTime"),
        ({"Modality": None}, 0x0120, "Modality"),
        ({"PerformedSeriesSequence": [Dataset()]}, 0x0120, "SeriesInstanceUID"),
        ({"PerformedSeriesSequence": [series_item("1.2.20", [""])]}, 0x0121, "ReferencedSOPInstanceUID"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_create_is_refused(scp: Scp, changes: dict[str, Any], status: int, names: str) -> None:
    answer = scp.create(begun("1.2.10", **changes))
    assert answer.Status == status and names in answer.ErrorComment
    assert scp.state() is None


def test_wrong_value_comes_back_and_nothing_else(scp: Scp) -> None:
    answer = scp.create(begun("1.2.10", PerformedProcedureStepStatus="COMPLETED"))
    found = parse(answer.AttributeList.getvalue(), scp.syntax)
    assert list(found) == [0x00400252] and text(found, "PerformedProcedureStepStatus") == "COMPLETED"


def test_type_2_attributes_may_be_left_out(scp: Scp) -> None:
    lacking = dict.fromkeys(("PatientBirthDate", "StudyID", "PerformedLocation", "PerformedSeriesSequence"))
    assert scp.create(begun("1.2.10", **lacking)).Status == 0x0000


def test_instances_and_classes(scp: Scp) -> None:
    assert scp.create(begun("1.2.10")).Status == 0x0000
    assert scp.create(begun("1.2.11")).Status == 0x0111
    assert text(parse(scp.steps.read("1.2.3")["attributes"], EXPLICIT_LITTLE), "Modality") == "CT"
    assert scp.create(begun("1.2.10"), "1.2.4", RETRIEVE).Status == 0x0118
    odd = N_CREATE()
    with pytest.warns(UserWarning, match="Invalid value"):
        odd.AffectedSOPClassUID, odd._AffectedSOPInstanceUID = STEP, "a.b"
    assert scp.serve(odd).Status == 0x0117
    assert scp.set(ended("COMPLETED", {"1.2.20": []}), "1.2.9").Status == 0x0112
    assert scp.set(ended("COMPLETED", {"1.2.20": []}), "1.2.3", RETRIEVE).Status == 0x0119
    assert scp.get(uid="1.2.9").Status == 0x0112
    assert scp.serve(C_ECHO()).Status == 0x0211
    unknown = N_GET()
    unknown.RequestedSOPClassUID, unknown.RequestedSOPInstanceUID = STEP, "1.2.3"
    assert scp.serve(unknown, STEP).Status == 0x0211  # N-GET has a SOP class of its own
    assert scp.state() == "IN PROGRESS"


@pytest.mark.parametrize("end", ["COMPLETED", "DISCONTINUED"])
def test_final_states_refuse_every_change(scp: Scp, end: str) -> None:
    assert scp.create(begun("1.2.10")).Status == 0x0000
    assert scp.set(ended(end, {"1.2.20": ["1.5"]})).Status == 0x0000
    before = scp.steps.read("1.2.3")
    for again in (ended("COMPLETED", {"1.2.20": []}), ended("IN PROGRESS", {}), Dataset()):
        answer = scp.set(again)
        assert (answer.Status, answer.ErrorID) == (0x0110, 0xA710)
        assert answer.ErrorComment == "Performed Procedure Step Object may no longer be updated"
    assert scp.steps.read("1.2.3") == before


@pytest.mark.parametrize(
    ("modification", "status"),
    [
        (ended("SUSPENDED", {}), 0x0106),
        (ended("COMPLETED", {}), 0x0121),
        (ended("COMPLETED", {"1.2.20": []}, PatientName="Other^Name"), 0x0105),
        (ended("COMPLETED", {"1.2.20": []}, Modality="MR"), 0x0105),
    ],
)
def test_set_is_refused_and_changes_nothing(scp: Scp, modification: Dataset, status: int) -> None:
    assert scp.create(begun("1.2.10")).Status == 0x0000
    before = scp.steps.read("1.2.3")
    answer = scp.set(modification)
    assert answer.Status == status and "Other" not in answer.ErrorComment
    assert scp.steps.read("1.2.3") == before


@pytest.mark.parametrize("uid", ["1.2.20", "1.5.30"])
def test_what_is_no_uid_is_refused(scp: Scp, uid: str) -> None:
    assert scp.create(begun("1.2.10")).Status == 0x0000
    data = encoded(ended("COMPLETED", {"1.2.20": ["1.5.30"]}), scp.syntax)
    assert scp.set(data.replace(uid.encode(), b"1.2/20")).Status == 0x0106
    assert scp.state() == "IN PROGRESS"


def test_identity_may_be_repeated_and_discontinued_needs_no_series(scp: Scp) -> None:
    assert scp.create(begun("1.2.10")).Status == 0x0000
    again = ended("DISCONTINUED", {}, "110514", PatientName="Xylocanary^Test", Modality="CT")
    assert scp.set(again).Status == 0x0000
    assert scp.steps.read("1.2.3")["wrong_entry"] == 1


def test_get_returns_what_was_created_and_set(scp: Scp) -> None:
    ds = begun("1.2.10", PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 100")
    ds.add_new(0x00091001, "UN", b"\x01\x02")
    assert scp.create(ds).Status == 0x0000
    later = ended(
        "COMPLETED", {"1.2.20": ["1.5"]}, PerformedProcedureStepDescription="胸部", SpecificCharacterSet="GB18030"
    )
    assert scp.set(later).Status == 0x0000
    everything = scp.get()
    assert everything.Status == 0x0000
    found = parse(everything.AttributeList.getvalue(), scp.syntax)
    assert text(found, "PatientName") == "Müller^Jörg" and text(found, "PerformedProcedureStepDescription") == "胸部"
    assert text(found, "PerformedProcedureStepEndTime") == "031405"
    one = scp.get(0x00080060, 0x00189999)
    assert one.Status == 0x0001 and list(parse(one.AttributeList.getvalue(), scp.syntax)) == [0x00080060]


def test_hostile_data_sets_are_refused(scp: Scp, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("test", "debug", "json")
    assert scp.create(b"").Status == 0x0120
    assert scp.create(b"\x10\x00\x10\x00\xff\xff\xff\x7fPN").Status == 0x0106
    vr = b"SQ\0\0" if scp.syntax == EXPLICIT_LITTLE else b""
    deep = (b"\x08\x00\x15\x11" + vr + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 500
    assert scp.create(deep).Status == 0x0106
    assert scp.create(begun("1.2.10")).Status == 0x0000
    assert scp.set(b"\0" * (17 * 1024 * 1024)).Status == 0x0106
    assert "xylocanary" not in capsys.readouterr().err.lower()


class _Full:
    """The disk is full at COMMIT."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql == "COMMIT":
            raise apsw.FullError("database or disk is full")
        return self._connection.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("operation", ["create", "set"])
def test_success_only_after_the_commit(db: Database, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    scp = Scp(db)
    if operation == "set":
        assert scp.create(begun("1.2.10")).Status == 0x0000

    def request() -> Any:
        if operation == "create":
            return scp.create(begun("1.2.10"))
        return scp.set(ended("COMPLETED", {"1.2.20": ["1.5"]}))

    before = scp.steps.read("1.2.3")
    rung: list[str] = []
    monkeypatch.setattr("dicomnode.serve.mpps.doorbell.ring", lambda folder, stage: rung.append(stage))
    connection = db._connection()
    monkeypatch.setattr(db, "_connection", lambda: _Full(connection))
    assert request().Status == 0x0213
    monkeypatch.setattr(db, "_connection", lambda: connection)
    assert scp.steps.read("1.2.3") == before and rung == []
    assert request().Status == 0x0000 and rung == ["worker"]


def test_a_full_disk_begins_no_step_but_lets_it_end(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    scp = Scp(db)
    assert scp.create(begun("1.2.10")).Status == 0x0000
    monkeypatch.setattr("dicomnode.serve.mpps.durable.free_bytes", lambda path: 1)
    assert scp.create(begun("1.2.10"), "1.2.4").Status == 0x0213
    assert scp.set(ended("COMPLETED", {"1.2.20": ["1.5"]})).Status == 0x0000


def test_two_n_sets_at_a_time_lose_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    scp = Scp(db)
    assert scp.create(begun("1.2.10")).Status == 0x0000
    real = scp.service._steps.replace
    between: list[int] = []

    def replace(step_id: int, version: int, step: Any) -> bool:
        if not between:
            between.append(1)
            other = Dataset()
            other.PerformedProcedureStepDescription = "between"
            assert scp.set(other).Status == 0x0000
        return real(step_id, version, step)

    monkeypatch.setattr(scp.service._steps, "replace", replace)
    assert scp.set(ended("COMPLETED", {"1.2.20": ["1.5"]})).Status == 0x0000
    found = parse(scp.steps.read("1.2.3")["attributes"], EXPLICIT_LITTLE)
    assert text(found, "PerformedProcedureStepDescription") == "between"
    assert text(found, "PerformedProcedureStepStatus") == "COMPLETED"


def test_who_may(db: Database) -> None:
    service = Scp(db).service
    for allow, may in (((), False), (("store", "find"), False), (("mpps",), True)):
        peer = Peer(name="p", ae_title="P", allow=allow)
        assert {service.roles(uid, peer) for uid in service.classes} == {(may, False)}


# The state table


@given(st.sampled_from([None, *StepState]), st.sampled_from(StepState))
def test_every_transition(state: StepState | None, status: StepState) -> None:
    allowed = status is StepState.in_progress if state is None else state is StepState.in_progress
    if allowed:
        assert next_step_state(state, status) is status
    else:
        with pytest.raises(IllegalTransition):
            next_step_state(state, status)


def test_table_and_final_states() -> None:
    assert set(STEP_TABLE.values()) == set(StepState)
    assert {StepState.completed, StepState.discontinued} == FINAL
    with pytest.raises(IllegalTransition):
        next_step_state("IN PROGRESS", "")


@given(st.lists(st.sampled_from([*StepState, "", "PAUSED", None]), max_size=6))
def test_no_sequence_of_messages_leaves_a_final_state(statuses: list[str | None]) -> None:
    step = created(parse(encoded(begun("1.2.10")), EXPLICIT_LITTLE))
    for status in statuses:
        ds = ended(status or "", {"1.2.20": ["1.5"]})
        if status is None:
            del ds.PerformedProcedureStepStatus
        before = parse(step.attributes, EXPLICIT_LITTLE)
        try:
            following = changed(step.state, before, parse(encoded(ds), EXPLICIT_LITTLE))
        except Refused as refused:
            assert step.state in FINAL or status in ("", "PAUSED")
            assert (refused.fault.error_id == 0xA710) is (step.state in FINAL)
            continue
        assert step.state not in FINAL
        assert following.state == (status or step.state)
        assert text(parse(following.attributes, EXPLICIT_LITTLE), "PatientID") == "P1"
        step = following
