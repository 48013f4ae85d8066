"""Extended negotiation and what it allows, sequences, and the limit on queries; by pynetdicom and findscu."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from tests.e2e.harness import Node, item_from
from tests.peers import run_program, send_items
from tests.serve.asking import PATIENT_FIND, STUDY_FIND, STUDY_GET, STUDY_MOVE, associated, extended, find, keys
from tests.serve.cases import STUDY_A, STUDY_B, STUDY_C, STUDY_D, dataset
from tests.serve.conftest import Site
from tests.serve.test_dcmtk import find as findscu

RELATIONAL, COMBINED, FUZZY, ZONE = b"\x01", b"\x00\x01", b"\x00\x00\x01", b"\x00\x00\x00\x01"


@pytest.mark.parametrize(
    ("model", "proposed", "accepted"),
    [
        (STUDY_FIND, b"\x01", b"\x01"),
        (STUDY_FIND, b"\x00", b"\x00"),
        (STUDY_FIND, b"\x01\x01\x01\x01\x01", b"\x01\x01\x01\x01\x00"),
        (PATIENT_FIND, b"\x00\x01\x00\x01", b"\x00\x01\x00\x01"),
        (STUDY_FIND, b"\x01\x02\xff\x01\x01\x01\x01", b"\x01\x00\x00\x01\x00\x00\x00"),
        (STUDY_MOVE, b"\x01\x01", b"\x01\x00"),
        (STUDY_GET, b"\x01", b"\x01"),
    ],
)
def test_each_field_is_answered(site: Site, model: str, proposed: bytes, accepted: bytes) -> None:
    """C.5.1.1: as many fields as were proposed; what is not supported is turned down with 0."""
    contexts = [(model, ["1.2.840.10008.1.2.1"])]
    with associated(site, contexts, negotiation=extended(proposed, model)) as assoc:
        assert assoc.acceptor.sop_class_extended == {model: accepted}


def studies(site: Site, fields: bytes, **tags: Any) -> set[str]:
    with associated(site, negotiation=extended(fields, STUDY_FIND) if fields else ()) as assoc:
        found, statuses = find(assoc, keys("STUDY", StudyInstanceUID="", **tags))
    assert statuses == [0xFF00] * len(found) + [0x0000]
    return {ds.StudyInstanceUID for ds in found}


def test_date_and_time_as_one_range(site: Site) -> None:
    """Every study is of 10:15:30; on the days in between any time is in the range."""
    moments = {"StudyDate": "20220101-20240105", "StudyTime": "1200-1100"}
    assert studies(site, b"", **moments) == set()
    assert studies(site, RELATIONAL, **moments) == set()
    assert studies(site, COMBINED, **moments) == {STUDY_A, STUDY_C}
    assert studies(site, COMBINED, StudyDate="20230101-", StudyTime="1100-") == {STUDY_A, STUDY_B}
    assert studies(site, b"", StudyDate="20230101-", StudyTime="1100-") == set()


def test_fuzzy_names(site: Site) -> None:
    assert studies(site, b"", PatientName="Joerg^Mueller") == set()
    assert studies(site, FUZZY, PatientName="Joerg^Mueller") == {STUDY_C}
    assert studies(site, FUZZY, PatientName="Jamada^Taro") == {STUDY_B}
    assert studies(site, FUZZY, PatientName="mül*", SpecificCharacterSet="ISO_IR 192") == {STUDY_C}
    assert studies(site, FUZZY, PatientName="Nobody") == set()


def test_times_in_the_zone_of_the_query(site: Site) -> None:
    """Study B was made at 10:15:30.5 +0900, which is the night before in Los Angeles."""
    moment = {"StudyDate": "20240209", "StudyTime": "171530-171531", "TimezoneOffsetFromUTC": "-0800"}
    assert studies(site, b"", **moment) == set()
    assert studies(site, ZONE, **moment) == {STUDY_B}
    with associated(site, negotiation=extended(ZONE, STUDY_FIND)) as assoc:
        (answer,), _ = find(assoc, keys("STUDY", StudyInstanceUID=STUDY_B, StudyDate="", StudyTime="", **ONE_ZONE))
        assert (answer.StudyDate, answer.StudyTime) == ("20240209", "171530.5")
        assert answer.TimezoneOffsetFromUTC == "-0800"
        (answer,), _ = find(assoc, keys("STUDY", StudyInstanceUID=STUDY_B, StudyTime=""))
        assert (answer.StudyTime, answer.TimezoneOffsetFromUTC) == ("101530.5", "+0900")
        bad = keys("STUDY", StudyInstanceUID=STUDY_B, StudyTime="", TimezoneOffsetFromUTC="+9900")
        assert find(assoc, bad) == ([], [0xA900])


ONE_ZONE = {"TimezoneOffsetFromUTC": "-0800"}


# Request Attributes Sequence


@pytest.fixture(scope="module")
def requested(site: Site) -> tuple[str, str, str]:
    """A study, its series that was requested twice, and one that was not."""
    study, first, second = (str(generate_uid()) for _ in range(3))
    apart = {"PatientID": "Q8", "PatientName": "Other", "AccessionNumber": "Z", "StudyDate": "", "StudyTime": ""}
    items = []
    for number, why in ((1, "Husten"), (2, "Fieber")):
        one = Dataset()
        one.RequestedProcedureID, one.ScheduledProcedureStepID = f"RP{number}", f"SPS{number}"
        one.AccessionNumber, one.ReasonForTheRequestedProcedure = "Z", why
        items.append(one)
    sent = [
        dataset(first, study, str(generate_uid()), **apart, RequestAttributesSequence=items),
        dataset(first, study, str(generate_uid()), **apart, RequestAttributesSequence=items[:1]),
        dataset(second, study, str(generate_uid()), **apart),
    ]
    assert set(send_items(site.node.port, [item_from(ds) for ds in sent])) == {0x0000}
    return study, first, second


def item(**tags: Any) -> list[Dataset]:
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return [ds]


@pytest.mark.parametrize(
    ("asked", "returned"),
    [
        (
            item(RequestedProcedureID="RP1", ScheduledProcedureStepID=""),
            [{"RequestedProcedureID": "RP1", "ScheduledProcedureStepID": "SPS1"}],
        ),
        (item(RequestedProcedureID="RP?"), [{"RequestedProcedureID": "RP1"}, {"RequestedProcedureID": "RP2"}]),
        (item(ReasonForTheRequestedProcedure="Fie*"), [{"ReasonForTheRequestedProcedure": "Fieber"}]),
        (item(RequestedProcedureID="RP1", ScheduledProcedureStepID="SPS2"), None),
        (item(RequestedProcedureID="rp1"), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", [STUDY_FIND, PATIENT_FIND])
def test_sequence_matching(
    site: Site, requested: tuple[str, str, str], model: str, asked: list[Dataset], returned: Any
) -> None:
    study, series, _ = requested
    query = keys(
        "SERIES", PatientID="Q8", StudyInstanceUID=study, SeriesInstanceUID="", RequestAttributesSequence=asked
    )
    with associated(site) as assoc:
        found, statuses = find(assoc, query, model)
    assert statuses[-1] == 0x0000
    got = {
        ds.SeriesInstanceUID: [{e.keyword: e.value for e in one} for one in ds.RequestAttributesSequence]
        for ds in found
    }
    assert got == ({} if returned is None else {series: returned})


def test_an_empty_sequence_asks_for_all_of_it(site: Site, requested: tuple[str, str, str]) -> None:
    study, first, second = requested
    for asked in ([], [Dataset()]):
        query = keys("SERIES", StudyInstanceUID=study, SeriesInstanceUID="", RequestAttributesSequence=asked)
        with associated(site) as assoc:
            found, _ = find(assoc, query)
        whole = {ds.SeriesInstanceUID: ds.RequestAttributesSequence for ds in found}
        assert set(whole) == {first, second}
        assert [one.ReasonForTheRequestedProcedure for one in whole[first]] == ["Husten", "Fieber"]
        assert len(whole[second]) == 0


def test_item_keys_that_are_not_known(site: Site, requested: tuple[str, str, str]) -> None:
    study = requested[0]
    with associated(site) as assoc:
        asked = item(RequestedProcedureID="RP1", ReasonForVisit="x")
        query = keys("SERIES", StudyInstanceUID=study, SeriesInstanceUID="", RequestAttributesSequence=asked)
        found, statuses = find(assoc, query)
        assert statuses == [0xFF01, 0x0000]
        assert [[e.keyword for e in one] for one in found[0].RequestAttributesSequence] == [["RequestedProcedureID"]]
        query.RequestAttributesSequence = item(ReasonForVisit="x")
        found, statuses = find(assoc, query)
        assert statuses == [0xFF01, 0xFF01, 0x0000]
        assert "RequestAttributesSequence" not in found[0]
        query.RequestAttributesSequence = [Dataset(), Dataset()]
        assert find(assoc, query)[1] == [0xC000], "one item is allowed (C.2.2.2.6)"


@pytest.mark.peers
def test_sequence_matching_by_findscu(site: Site, requested: tuple[str, str, str], tmp_path: Path) -> None:
    study, series, _ = requested
    inside = "RequestAttributesSequence[0]."
    found = findscu(
        site, tmp_path / "f", "QueryRetrieveLevel=SERIES", f"StudyInstanceUID={study}", "SeriesInstanceUID",
        f"{inside}RequestedProcedureID=RP2", f"{inside}ScheduledProcedureStepID",
    )  # fmt: skip
    assert [ds.SeriesInstanceUID for ds in found] == [series]
    assert [one.ScheduledProcedureStepID for one in found[0].RequestAttributesSequence] == ["SPS2"]


@pytest.mark.peers
def test_without_negotiation_findscu_gets_separate_ranges(site: Site, tmp_path: Path) -> None:
    found = findscu(
        site, tmp_path / "f", "QueryRetrieveLevel=STUDY", "StudyInstanceUID",
        "StudyDate=20220101-20240105", "StudyTime=1000-1100", "PatientName=*",
    )  # fmt: skip
    assert {ds.StudyInstanceUID for ds in found} == {STUDY_A, STUDY_C, STUDY_D}


# A flood


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    node = Node(
        tmp_path_factory.mktemp("flooded"),
        peers=[
            {"name": "asker", "ae_title": "ASKER", "allow": ["echo", "find"]},
            {"name": "other", "ae_title": "OTHER", "allow": ["echo", "find"]},
        ],
        dimse={"workers": 1, "query_per_second": 2.0, "queries_at_once": 1},
    ).start("run", "receiver")
    yield node
    assert node.stop() == 0


@pytest.mark.slow
def test_a_flood_of_queries_does_not_stop_intake(flooded: Node) -> None:
    site = Site(flooded, 0, 0, 0)
    study, stop = str(generate_uid()), threading.Event()
    statuses: list[int] = []
    ready = threading.Barrier(51)

    def told() -> list[dict[str, Any]]:
        return [e for e in flooded.events("query-refused") if e["subject"] == "asker"]

    def ask() -> None:
        with associated(site) as assoc:
            ready.wait(60)
            while not stop.is_set():
                statuses.append(find(assoc, keys("STUDY", PatientName="*", StudyInstanceUID=""))[1][-1])

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    sent = [item_from(dataset(str(generate_uid()), study, str(generate_uid()))) for _ in range(20)]
    answers = send_items(flooded.port, sent)
    with associated(site, calling="OTHER") as assoc:
        assert find(assoc, keys("STUDY", StudyInstanceUID=study))[1] == [0xFF00, 0x0000], "another caller is served"
    (event,) = flooded.wait(lambda: told()[:1], 30, "an event tells of the flood")
    stop.set()
    for thread in threads:
        thread.join()
    assert set(answers) == {0x0000}
    assert all(flooded.instance(one.sop_instance_uid) for one in sent)
    assert 0xA700 in statuses and set(statuses) <= {0x0000, 0xA700}
    assert "0xA700" in event["text"]
    assert len(told()) < 0.1 * statuses.count(0xA700), "not one event for each"


@pytest.mark.peers
def test_a_refused_query_is_told_to_findscu(flooded: Node) -> None:
    """The first one or two are served; after them the bucket is empty for half a second each."""

    def ask(number: int) -> None:
        done = run_program(
            "findscu", "-S", "-d", "-aet", "OTHER", "-aec", "DICOMNODE", *(["--repeat", 6] if number else []),
            "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3", "127.0.0.1", flooded.port,
        )  # fmt: skip
        out.append(done.stderr + done.stdout)

    out: list[str] = []
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any("0xa700" in text for text in out)
    assert any("0x0000: Success" in text for text in out)
