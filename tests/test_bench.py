"""What the figures of scripts/bench rest on: data that is new each time, counting, verdicts. No measurement."""

from __future__ import annotations

import importlib
import json
import sys
from io import StringIO
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.peers import program

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from benchmarks import clients, data, intake, report, tools, upper_layer  # noqa: E402
from benchmarks.peers import storescp  # noqa: E402


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.5, 0.95, 1.0]))
def test_percentile(values: list[float], share: float) -> None:
    found = tools.percentile(values, share)
    assert sum(v <= found for v in values) >= share * len(values)
    assert found in values
    assert found == min(values) or sum(v < found for v in values) < share * len(values)


def test_objects_are_new_each_time_and_keep_their_length(tmp_path: Path) -> None:
    objects = data.write_set("ct", tmp_path / "ct", 3, 16, sender=2)
    other = data.write_set("ct", tmp_path / "other", 3, 16, sender=3)
    seen: set[str] = set()
    for _ in range(3):
        objects.renew(durably=False)
        other.renew(durably=False)
        found = [pydicom.dcmread(p) for p in (*objects.files, *other.files)]
        uids = {ds.SOPInstanceUID for ds in found}
        assert len(uids) == 6 and not uids & seen
        seen |= uids
        assert all(ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID for ds in found)
        assert len({ds.StudyInstanceUID for ds in found}) == len({ds.SeriesInstanceUID for ds in found}) == 2
        assert objects.study_uid() == found[0].StudyInstanceUID
        assert all(pydicom.uid.UID(uid).is_valid for uid in uids)
        assert sum(p.stat().st_size for p in objects.files) == objects.size


def test_the_large_object_is_one_that_readers_take(tmp_path: Path) -> None:
    objects = data.multi_frame(tools.Bench(tmp_path, quick=True, repeat=1))
    ds = pydicom.dcmread(objects.files[0])
    assert len(ds.PixelData) == ds.NumberOfFrames * ds.Rows * ds.Columns * 2 == 160 * data.FRAME_BYTES
    assert objects.files[0].stat().st_blocks * 512 < 100_000  # a hole, not two gigabytes on the disk
    assert len(objects.places[0]) == 4  # study, series, instance twice


@pytest.fixture
def three(tmp_path: Path) -> data.ObjectSet:
    program("storescp")
    program("dcmsend")
    return data.write_set("ct", tmp_path / "ct", 3, 16)


def test_what_arrives_is_counted(tmp_path: Path, three: data.ObjectSet) -> None:
    with storescp(tmp_path / "scp") as acceptor:
        for turn in (1, 2):
            seconds = clients.send(three, acceptor, clients.dcmsend(three, "PACS"), no_delay=True, what="three")
            assert seconds > 0 and acceptor.count() == 3 * turn
        assert clients.start_up(clients.dcmsend(three, "PACS"), times=1) > 0  # sends nothing
        assert acceptor.count() == 6


def test_idle_associations_are_held(tmp_path: Path) -> None:
    program("storescp")
    with storescp(tmp_path / "scp", fork=True) as acceptor:
        held = upper_layer.several(3, acceptor.port, acceptor.called)
        for association in held:
            association.echo()
            association.close()
    assert len(held) == 3
    with pytest.raises(tools.BenchError, match="no association"):
        upper_layer.several(1, acceptor.port, acceptor.called)


def test_a_fast_failure_is_no_result(tmp_path: Path, three: data.ObjectSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """This storescp answers success and keeps nothing: its client is content, the bench is not."""
    monkeypatch.setattr("benchmarks.peers.PATIENCE_SECONDS", 0.1)
    with (
        storescp(tmp_path / "scp", more=("--ignore",)) as acceptor,
        pytest.raises(tools.BenchError, match="0 objects arrived, 3 were sent"),
    ):
        clients.send(three, acceptor, clients.dcmsend(three, "PACS"), no_delay=True, what="three")
    with tools.closed_port() as port, pytest.raises(tools.BenchError, match="dcmsend ended with"):
        tools.timed(clients.dcmsend(three, "PACS")(port), {})


def samples(**seconds: float) -> dict[intake.Cell, tools.Samples]:
    names = {"ours": "dicomnode", "single": "storescp, TCP_NODELAY", "fork": "storescp --fork, TCP_NODELAY"}
    found = {}
    for key, value in seconds.items():
        who, objects = key.split("_")
        found[names[who], objects, "TCP_NODELAY"] = tools.Samples([value + 5, value])
    return found


@pytest.mark.parametrize(
    ("seconds", "verdicts"),
    [
        ({"ours_ct": 1.0, "single_ct": 1.2, "fork_ct": 0.9}, [False, None]),  # the faster of the two modes counts
        ({"ours_ct": 0.9, "single_ct": 1.2, "fork_ct": 0.9}, [True, None]),
        ({"ours_small": 1.25, "fork_small": 1.0}, [None, True]),
        ({"ours_small": 1.35, "fork_small": 1.0}, [None, False]),
    ],
)
def test_verdicts_on_intake(seconds: dict[str, float], verdicts: list[bool | None]) -> None:
    goals = intake._goals(samples(**seconds), {"ct": 0.0, "small": 0.0})
    assert [g.met for g in goals[:2]] == verdicts
    assert all(g.met is None for g in goals[2:])  # nothing was measured with an untuned client


def test_report() -> None:
    section = report.Section(
        [report.Figures("Things", [{"what": "a|b", "s": 1.5}], "A note.")],
        [report.Goal("speed", "< 1 s", "1.5 s", False), report.Goal("rest", "any", "-", None)],
        {"raw": [1, 2]},
    )
    text = report.as_markdown("head", {"things": section}, ["storescp is not installed"])
    assert "| a/b | 1.5 |" in text and "| speed | < 1 s | 1.5 s | NOT MET |" in text
    assert "Left out: storescp is not installed." in text
    found = json.loads(report.as_json({"date": "now"}, {"things": section}, []))
    assert found["sections"]["things"]["goals"][0]["met"] is False
    assert found["sections"]["things"]["samples"] == {"raw": [1, 2]}
    out = StringIO()
    report.show(Console(file=out, width=100), "head", {"things": section}, [])
    assert "not measured" in out.getvalue()


def test_every_section_can_be_run() -> None:
    import bench as command

    for name in command.SECTIONS:
        assert callable(importlib.import_module(f"benchmarks.{name}").run)
