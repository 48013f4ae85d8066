"""Performed procedure steps of a modality decide when its series is complete, and a RIS is told of results."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import InstanceAvailabilityNotification

from tests.e2e.harness import Node, Series, make_series, rule
from tests.mpps_case import STEP, Modality, begun, ended
from tests.peers import Association, ScriptedScp, contexts_for, free_port, send_items


@dataclass
class Ris:
    """Takes notifications; ``statuses`` are answered first, then 0x0000."""

    statuses: list[int] = field(default_factory=list)
    taken: list[tuple[str, Dataset]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        ae = AE(ae_title="RIS")
        ae.add_supported_context(InstanceAvailabilityNotification)
        self.port = free_port()
        self.server = ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_N_CREATE, self._on)]
        )

    def _on(self, event: Any) -> tuple[int, None]:
        with self.lock:
            self.taken.append((str(event.request.AffectedSOPInstanceUID), event.attribute_list))
            return (self.statuses.pop(0) if self.statuses else 0x0000), None

    def about(self, study_uid: str) -> list[tuple[str, Dataset]]:
        with self.lock:
            return [(uid, ds) for uid, ds in self.taken if ds.StudyInstanceUID == study_uid]


@pytest.fixture(scope="module")
def ris() -> Iterator[Ris]:
    made = Ris()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ris: Ris) -> Iterator[Node]:
    """A node whose quiet period no test lives to see, its PACS and its RIS."""
    pacs = ScriptedScp(lambda number, uid: 0x0000)
    here = {"host": "127.0.0.1"}
    node = Node(
        tmp_path_factory.mktemp("mpps"),
        peers=[
            {"name": "mod1", "ae_title": "MOD1", "allow": ["echo", "store", "mpps"]},
            {"name": "pacs", "ae_title": "PACS", "port": pacs.port, **here},
            {"name": "ris", "ae_title": "RIS", "port": ris.port, **here},
        ],
        rules=[
            {**rule("told", {"SeriesDescription": "told*"}, to=["pacs"]), "notify": ["ris"]},
            {**rule("here", {"SeriesDescription": "here*"}), "notify": ["ris"]},
            rule("plain", {"SeriesDescription": "plain*"}),
        ],
        dimse={"workers": 1},
        completeness={"quiet_seconds": 600, "step_seconds": 600},
    ).start()
    yield node
    assert node.stop() == 0  # looks for the patient's name in the log
    pacs.stop()


def uids(series: Series) -> list[str]:
    return [item.sop_instance_uid for item in series.items]


def reason(node: Node, series: Series) -> str:
    """Why it was selected, as soon as it was."""

    def jobs() -> Any:
        return node.jobs(series.series_uid)

    return str(node.wait(jobs, 20, "a job is made")[0]["reason"])


def pass_by(node: Node) -> None:
    """The selector has looked at everything that came before: a series that came later has its job."""
    later = make_series("plain later", slices=4)
    assert set(send_items(node.port, later.items)) == {0x0000}
    reason(node, later)


def test_completed_step_gives_results_while_the_association_is_open(site: Node, ris: Ris) -> None:
    ris.statuses[:] = [0x0213]  # the first attempt meets a RIS that is busy
    series = make_series("told of")
    with Modality(site.port) as modality, Association(site.port, contexts=contexts_for(series.items)) as images:
        step = modality.begin(series.study_uid)
        assert {images.store(item) for item in series.items[:-1]} == {0x0000}
        modality.end(step, "COMPLETED", {series.series_uid: uids(series)})
        pass_by(site)
        assert site.jobs(series.series_uid) == []  # one listed image is missing
        assert images.store(series.items[-1]) == 0x0000
        why = f"procedure-step: it is completed, and the {len(series.items)} instance(s) that it lists are here"
        assert reason(site, series) == why
        site.wait_job(series.series_uid)
        rows = site.wait_delivered(series.series_uid)
        site.wait(lambda: len(ris.about(series.study_uid)) == 2, 20, "the RIS is told again")
    (first, _), (again, ds) = ris.about(series.study_uid)
    assert first == again  # the same notification, whatever was lost
    referenced = {
        (item.ReferencedSOPInstanceUID, item.RetrieveAETitle, item.InstanceAvailability)
        for one in ds.ReferencedSeriesSequence
        for item in one.ReferencedSOPSequence
    }
    assert referenced == {(r["SOPInstanceUID"], "PACS", "ONLINE") for r in rows}
    assert {"SEG", "SR"} == {r["kind"] for r in rows}
    (notice,) = [n for n in api(site, "notifications")["notifications"] if n["StudyInstanceUID"] == series.study_uid]
    assert (notice["state"], notice["attempts"], notice["destination"]) == ("stored", 2, "ris")
    assert api(site, "status")["procedure_steps"]["COMPLETED"] >= 1


def api(node: Node, name: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.http_port}/api/v1/{name}", timeout=10) as answer:
        return json.load(answer)


def test_notice_without_destination_names_this_node(site: Node, ris: Ris) -> None:
    series = make_series("here it stays")
    with Modality(site.port) as modality:
        step = modality.begin(series.study_uid, PerformedSeriesSequence=[])
        modality.end(step, "COMPLETED", {series.series_uid: uids(series)})  # before the first image
    assert set(send_items(site.port, series.items)) == {0x0000}
    assert "procedure-step" in reason(site, series)
    site.wait(lambda: ris.about(series.study_uid), 30, "the RIS is told")
    ((_, ds),) = ris.about(series.study_uid)
    places = {item.RetrieveAETitle for one in ds.ReferencedSeriesSequence for item in one.ReferencedSOPSequence}
    assert places == {"DICOMNODE"}


def test_discontinued_series(site: Node) -> None:
    wrong, other = make_series("plain wrong"), make_series("plain other")
    with Modality(site.port) as modality:
        step = modality.begin(wrong.study_uid)
        with Association(site.port, contexts=contexts_for(wrong.items)) as images:
            assert {images.store(item) for item in wrong.items} == {0x0000}
            modality.end(step, "DISCONTINUED", {wrong.series_uid: uids(wrong)}, "110514")
        step = modality.begin(other.study_uid)
        modality.end(step, "DISCONTINUED", {other.series_uid: uids(other)[:20]}, "110515")
        with Association(site.port, contexts=contexts_for(other.items)) as images:
            assert {images.store(item) for item in other.items[:20]} == {0x0000}
            assert "it is discontinued, and the 20" in reason(site, other)
    site.wait(
        lambda: any(e["kind"] == "procedure-step" and "not analysed" in e["text"] for e in site.events()),
        20,
        "an event says that the series is withheld",
    )
    pass_by(site)  # and the association's end changes nothing
    assert site.jobs(wrong.series_uid) == []


def test_images_that_refer_to_a_discontinued_step(site: Node) -> None:
    """It lists no series; the images say whose they are (PS3.3 C.7.3.1)."""
    with Modality(site.port) as modality:
        step = modality.begin("1.2.3.4")  # its scheduled study is not theirs
        modality.end(step, "DISCONTINUED", {}, "110514")

    def refer(ds: Dataset, _: int) -> None:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = STEP, step
        ds.ReferencedPerformedProcedureStepSequence = [reference]

    series = make_series("plain referring", slices=4, change=refer)
    assert set(send_items(site.port, series.items)) == {0x0000}

    def why() -> Any:
        query = "SELECT selected_reason AS why FROM series WHERE SeriesInstanceUID = ?"
        return site.rows(query, (series.series_uid,))[0]["why"]

    assert "incorrect worklist entry" in site.wait(why, 20, "the series is closed")
    assert site.jobs(series.series_uid) == []


def test_statuses_over_the_wire(site: Node) -> None:
    series = make_series("plain never sent", slices=4)
    with Modality(site.port) as modality:
        uid = modality.begin(series.study_uid)
        status, found = modality.get(uid, [0x00100010, 0x00400252, 0x00080060])
        assert status.Status == 0x0000
        assert (found.PatientName, found.PerformedProcedureStepStatus, found.Modality) == (
            "Xylocanary^Test",
            "IN PROGRESS",
            "CT",
        )
        modality.end(uid, "COMPLETED", {series.series_uid: uids(series)})
        status, _ = modality.set(uid, ended("DISCONTINUED", {series.series_uid: []}))
        assert (status.Status, status.ErrorID, status.ErrorComment) == (
            0x0110,
            0xA710,
            "Performed Procedure Step Object may no longer be updated",
        )
        status, _ = modality.create(begun(series.study_uid), uid)
        assert status.Status == 0x0111
        status, _ = modality.create(begun(series.study_uid))
        assert status.Status == 0x0000
        assert site.rows("SELECT 1 FROM procedure_steps WHERE SOPInstanceUID LIKE '2.25.%'")
        status, _ = modality.create(begun(series.study_uid, PerformedProcedureStepStatus="COMPLETED"))
        assert status.Status == 0x0106
    with Modality(site.port, "CT1") as stranger:
        assert not stranger.assoc.is_established or not stranger.assoc.accepted_contexts
