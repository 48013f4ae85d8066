"""A patient's name goes through every service of a whole node, with faults, and is found nowhere but in the objects.

The peers are no better than some are: what they answer quotes the patient too.
"""

from __future__ import annotations

import contextlib
import json
import struct
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, build_role, evt
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import InstanceAvailabilityNotification

from tests.commitment_case import COMMITMENT, INSTANCE, Requester, asked
from tests.e2e.harness import CANARY, Series, make_series, rule
from tests.e2e.tls_node import SecureNode, call, make_site
from tests.mpps_case import Modality, begun, ended
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, Association, Cut, Item, contexts_for, free_port, send_items
from tests.serve.asking import (
    PATIENT_FIND,
    PATIENT_GET,
    PATIENT_MOVE,
    STUDY_FIND,
    STUDY_MOVE,
    associated,
    extended,
    find,
    keys,
)
from tests.serve.conftest import Site as Asked

NAME = f"{CANARY}^Anna"


class Talkative:
    """A peer whose answers have a status and the patient's name as Error Comment."""

    def __init__(self, ae_title: str, status: int) -> None:
        self.asked = 0
        self._status = status
        ae = AE(ae_title=ae_title)
        ae.supported_contexts = AllStoragePresentationContexts
        ae.add_supported_context(InstanceAvailabilityNotification)
        ae.add_supported_context(COMMITMENT)
        self.port = free_port()
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_CREATE, self._normal), (evt.EVT_N_ACTION, self._normal)]
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)

    def _said(self) -> Dataset:
        self.asked += 1
        ds = Dataset()
        ds.Status, ds.ErrorComment = self._status, f"no {NAME}"
        return ds

    def _store(self, _: Any) -> Dataset:
        return self._said()

    def _normal(self, _: Any) -> tuple[Dataset, None]:
        return self._said(), None

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def named(description: str, **tags: Any) -> Series:
    """Every text that tells who the patient is has the canary."""
    text = f"{CANARY} text"
    who = {"PatientName": NAME, "PatientID": CANARY, "AccessionNumber": CANARY, "StudyID": CANARY[:16]}
    more = {"StudyDescription": text, "ReferringPhysicianName": NAME, "PatientComments": text, "ProtocolName": text}
    return make_series(description, **{**who, **more, "ImageComments": text, "OtherPatientIDs": CANARY, **tags})


class Site:
    def __init__(self, node: SecureNode, refuser: Talkative, busy: Talkative, ris: Talkative) -> None:
        self.node, self.refuser, self.busy, self.ris = node, refuser, busy, ris
        self.asked = Asked(node, 0, 0, 0)
        self.bodies: list[str] = []

    def http(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> int:
        url = f"http://127.0.0.1:{self.node.http_port}{path}"
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                self.bodies.append(answer.read().decode())
                return int(answer.status)
        except urllib.error.HTTPError as error:
            self.bodies.append(error.read().decode() + str(error.headers))
            return error.code


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    hospital = make_site(tmp_path_factory.mktemp("hospital"))
    refuser, busy, ris = Talkative("REFUSER", 0xC123), Talkative("BUSY", 0xA700), Talkative("RIS", 0x0110)
    here = {"host": "127.0.0.1"}
    every = ["echo", "store", "find", "move", "get", "mpps", "commit"]
    node = SecureNode(
        tmp_path_factory.mktemp("canary"),
        hospital,
        peers=[
            {"name": "asker", "ae_title": "ASKER", "allow": every, **here, "port": refuser.port},
            {"name": "mod1", "ae_title": "MOD1", "allow": every},
            {"name": "ct", "ae_title": "CT", "tls": True, "certificate_name": "ct.hospital", "allow": every},
            {"name": "refuser", "ae_title": "REFUSER", "port": refuser.port, "commitment": True, **here},
            {"name": "busy", "ae_title": "BUSY", "port": busy.port, **here},
            {"name": "away", "ae_title": "AWAY", "port": free_port(), **here},
            {"name": "ris", "ae_title": "RIS", "port": ris.port, **here},
        ],
        rules=[
            {**rule("refused", {"SeriesDescription": "refused"}, to=["refuser", "busy", "away"]), "notify": ["ris"]},
            {**rule("kept", {"SeriesDescription": "kept"}), "notify": ["ris"]},
        ],
        dimse={"workers": 1},
        completeness={"quiet_seconds": 1},
        delivery={"backoff_seconds": 0.2, "backoff_max_seconds": 1, "connect_seconds": 2, "response_seconds": 3},
    ).start()
    made = Site(node, refuser, busy, ris)
    _everything(made, hospital)
    yield made
    assert node.stop() == 0
    for peer in (refuser, busy, ris):
        peer.stop()


def _everything(site: Site, hospital: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        series = _stores(site, hospital)
        _queries(site, series)
        _retrieves(site, series)
        _steps(site, series)
        _commitments(site, series)
        _delivered(site, series)
        _http(site)


def _stores(site: Site, hospital: Any) -> dict[str, Series]:
    node = site.node
    found = {name: named(name) for name in ("refused", "kept", "gap")}
    for series in found.values():
        assert set(send_items(node.port, series.items)) == {0x0000}
    item = found["kept"].items[0]
    secure = named("secure", slices=4)
    with call(node, hospital, hospital.ct, calling="CT", contexts=contexts_for(secure.items)) as assoc:
        assert {assoc.store(one) for one in secure.items} == {0x0000}
        assert assoc.store(secure.items[0], uid="1.2.3") == 0xA900
    with Association(node.port, contexts=contexts_for([item])) as assoc:
        assert assoc.store(item, uid="1.2.3") == 0xA900
        for data in (item.data[:300], item.data[:1000] + CANARY.encode() * 9, b"", CANARY.encode() * 99):
            assert assoc.store(Item(CT_IMAGE, item.sop_instance_uid, EXPLICIT_LITTLE, data)) in (0xA900, 0xC000)
        bad = item.data.replace(item.sop_instance_uid.encode(), CANARY.encode().ljust(len(item.sop_instance_uid)))
        assert assoc.store(Item(CT_IMAGE, item.sop_instance_uid, EXPLICIT_LITTLE, bad)) in (0xA900, 0xC000)
    for uid in (CANARY, f"{CANARY}\0".encode() * 20):
        with contextlib.suppress(Cut), Association(node.port) as assoc:
            assert assoc.store(item, uid=uid) in (0xA900, 0xC000)
    cut = Association(node.port)
    context = cut.accepted[CT_IMAGE, EXPLICIT_LITTLE]
    cut.send(b"".join(list(cut.fragments(context, CANARY.encode() * 100, command=True))))
    cut.sock.close()
    return found


def _queries(site: Site, series: dict[str, Series]) -> None:
    models = [(STUDY_FIND, [EXPLICIT_LITTLE]), (PATIENT_FIND, [EXPLICIT_LITTLE])]
    fields = extended(b"\1\1\1\1", STUDY_FIND, PATIENT_FIND)
    with associated(site.asked, models, negotiation=fields) as assoc:
        for query in (
            keys("STUDY", PatientName=NAME, StudyInstanceUID="", AccessionNumber=CANARY, StudyDescription=""),
            keys("STUDY", PatientName=f"*{CANARY[:4]}*", ModalitiesInStudy="", OtherPatientIDs=CANARY),
            keys("STUDY", StudyDate=CANARY, StudyTime=CANARY, TimezoneOffsetFromUTC="+0100"),
            keys("STUDY", TimezoneOffsetFromUTC=CANARY, StudyDate="20240101"),
            keys("SERIES", StudyInstanceUID=CANARY),
            keys("IMAGE", PatientID=CANARY),
            keys(CANARY.upper(), PatientName=NAME),
            keys("STUDY", PatientName=NAME * 200),
        ):
            find(assoc, query)
        find(assoc, keys("PATIENT", PatientID=CANARY, PatientName=NAME), PATIENT_FIND)
    contexts = [(STUDY_FIND, [EXPLICIT_LITTLE])]
    for data in (CANARY.encode() * 50, b"\x08\0\x52\0CS" + struct.pack("<H", 9999) + CANARY.encode()):
        with contextlib.suppress(Cut), Association(site.node.port, calling="ASKER", contexts=contexts) as plain:
            command = [(0x0002, STUDY_FIND.encode() + b"\0"), (0x0100, b"\x20\0"), (0x0110, b"\1\0")]
            plain.request(1, [*command, (0x0700, b"\0\0"), (0x0800, b"\0\0")], data)
            assert plain.response() in (0xA900, 0xC000)


def _retrieves(site: Site, series: dict[str, Series]) -> None:
    study = series["kept"].study_uid
    models = [(PATIENT_MOVE, [EXPLICIT_LITTLE]), (STUDY_MOVE, [EXPLICIT_LITTLE])]
    moves: list[tuple[Dataset, str, str]] = [(keys("STUDY", StudyInstanceUID=CANARY), "REFUSER", STUDY_MOVE)]
    for target in ("REFUSER", "BUSY", "AWAY", "STRANGER", CANARY.upper()):
        moves.append((keys("STUDY", StudyInstanceUID=study), target, STUDY_MOVE))
        moves.append((keys("PATIENT", PatientID=CANARY), target, PATIENT_MOVE))
    for move in moves:
        # Each on its own: pynetdicom as SCU may miss an answer, and then it aborts (see README, Decisions).
        with associated(site.asked, models) as assoc:
            list(assoc.send_c_move(*move))

    def take(_: Any) -> Dataset:
        ds = Dataset()
        ds.Status, ds.ErrorComment = 0xC001, NAME
        return ds

    ae = AE(ae_title="ASKER")
    ae.requested_contexts = [build_context(PATIENT_GET), build_context(CT_IMAGE)]
    roles = [build_role(CT_IMAGE, scp_role=True)]
    taking = ae.associate(
        "127.0.0.1", site.node.port, ae_title="DICOMNODE", ext_neg=roles, evt_handlers=[(evt.EVT_C_STORE, take)]
    )
    assert taking.is_established
    list(taking.send_c_get(keys("PATIENT", PatientID=CANARY), PATIENT_GET))
    taking.release()


def _steps(site: Site, series: dict[str, Series]) -> None:
    who = {"PatientName": NAME, "PatientID": CANARY, "StudyID": CANARY[:16]}
    with Modality(site.node.port) as modality:
        uid = modality.begin(series["kept"].study_uid, **who)
        refused = [
            begun(series["kept"].study_uid, **who, PerformedProcedureStepStatus=CANARY.upper()[:16]),
            begun(CANARY, **who),
            begun("1.2.3", **who, Modality=None),
        ]
        assert all(modality.create(ds)[0].Status != 0x0000 for ds in refused)
        assert modality.create(begun("1.2.3", **who), CANARY)[0].Status != 0x0000
        assert modality.set(uid, ended("COMPLETED", {CANARY: [CANARY]}, PatientName="Other"))[0].Status != 0x0000
        modality.end(uid, "COMPLETED", {series["kept"].series_uid: [i.sop_instance_uid for i in series["kept"].items]})
        assert modality.set(uid, ended("COMPLETED", {}, PatientName=NAME))[0].Status != 0x0000
        assert str(modality.get(uid)[1].PatientName) == NAME
        modality.get(CANARY)


def _commitments(site: Site, series: dict[str, Series]) -> None:
    with Requester().open(site.node.port) as modality:
        modality.ask(asked([series["kept"].items[0].sop_instance_uid]))
        modality.ask(asked([CANARY], CANARY))
        modality.ask(asked([CANARY]), sop_instance=CANARY)
        modality.heard.wait(1)
    ae = AE(ae_title="REFUSER")
    ae.add_requested_context(COMMITMENT)
    assoc = ae.associate(
        "127.0.0.1", site.node.port, ae_title="DICOMNODE", ext_neg=[build_role(COMMITMENT, scp_role=True)]
    )
    if assoc.is_established:
        assoc.send_n_event_report(asked([CANARY], CANARY), 1, COMMITMENT, INSTANCE)
        assoc.release()


def _delivered(site: Site, series: dict[str, Series]) -> None:
    """Every fault of the courier has come about."""
    node, uid = site.node, series["refused"].series_uid
    node.wait_job(uid)

    def told() -> bool:
        rows = {r["destination"]: r for r in node.deliveries(uid)}
        return len(rows) == 3 and all(r["last_error"] for r in rows.values())

    node.wait(told, 60, "every destination has failed once")
    node.wait_job(series["kept"].series_uid)
    node.wait(lambda: site.ris.asked, 60, "the RIS was told, and refused")


def _http(site: Site) -> None:
    canary = urllib.parse.quote(NAME)
    for path in ("/", "/?lang=zh", "/metrics", "/ready", "/health"):
        assert site.http(path) == 200
    for name in ("status", "jobs", "deliveries", "notifications", "commitments", "events", "cloud/items"):
        site.http(f"/api/v1/{name}")
    for job in site.node.rows("SELECT id FROM jobs"):
        assert site.http(f"/api/v1/jobs/{job['id']}") == 200
    for path, method in (
        (f"/api/v1/jobs?state={canary}", "GET"),
        (f"/api/v1/jobs/{canary}", "GET"),
        (f"/api/v1/{canary}", "GET"),
        (f"/{canary}?{canary}={canary}", "GET"),
        (f"/static/{canary}", "GET"),
        (f"/?lang={canary}", "GET"),
        (f"/api/v1/jobs/{canary}/retry", "POST"),
        ("/api/v1/jobs/999999/retry", "POST"),
        (f"/api/v1/status?{canary}", "DELETE"),
    ):
        site.http(path, method, NAME.encode() if method == "POST" else None)
    site.http("/api/v1/status", Host=f"{CANARY}.example")
    site.http("/api/v1/status", Cookie=NAME, Referer=NAME, Origin=NAME, **{"User-Agent": NAME, "Accept-Language": NAME})


def has(text: str) -> bool:
    return CANARY.casefold() in text.casefold()


def test_the_objects_and_the_index_have_it(site: Site) -> None:
    """Else this module would show nothing."""
    assert site.node.rows("SELECT 1 FROM patients WHERE PatientName = ?", (NAME,))
    stored = [p.read_bytes() for p in (site.node.data_dir / "objects").rglob("*.dcm")]
    assert any(CANARY.encode() in data for data in stored)
    assert site.refuser.asked and site.busy.asked and site.ris.asked


def test_the_log_does_not(site: Site) -> None:
    lines = [line for line in site.node.log.read_text(errors="replace").splitlines() if has(line)]
    assert lines == []


def test_pages_metrics_and_answers_do_not(site: Site) -> None:
    assert len(site.bodies) >= 25
    assert [body[:200] for body in site.bodies if has(body)] == []


def test_events_errors_and_reports_do_not(site: Site) -> None:
    node = site.node
    for table in ("events", "processes", "jobs", "deliveries", "notifications", "commitments", "associations"):
        rows = node.rows(f"SELECT * FROM {table}")
        columns = ("text", "subject", "last_error", "notes", "reason", "summary", "metrics", "cause")
        told = [json.dumps({k: str(v) for k, v in row.items() if k in columns}) for row in rows]
        assert [t for t in told if has(t)] == [], table


@pytest.mark.parametrize("verb", ["status", "events", "jobs list", "deliveries list", "commitments list"])
def test_the_command_line_does_not(site: Site, verb: str) -> None:
    assert not has(site.node.cli(*verb.split()))
    assert not has(site.node.cli(*verb.split(), "--json"))


def test_file_names_do_not(site: Site) -> None:
    assert [p.name for p in site.node.folder.rglob("*") if has(p.name)] == []
