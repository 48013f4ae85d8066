"""A patient's name takes every path of the node and comes out of none that it should not."""

from __future__ import annotations

import contextlib
import urllib.request

from tests.e2e.harness import CANARY, Node, make_series
from tests.peers import Association, Cut, Item, Rejected, contexts_for, send_items


def test_a_patients_name_is_in_no_log_metric_event_or_error(node: Node) -> None:
    canary = {"PatientID": f"{CANARY}-1", "OtherPatientNames": CANARY, "ReferringPhysicianName": f"{CANARY}^Dr"}
    analysed = make_series("pacs canary", **canary)
    assert set(send_items(node.port, analysed.items)) == {0x0000}
    gap = make_series("local canary", **canary)
    assert set(send_items(node.port, [*gap.items[:10], *gap.items[14:]])) == {0x0000}
    item = make_series("local bad canary", **canary).items[0]
    odd = make_series("local odd canary", Manufacturer=CANARY, StudyID=CANARY[:16], KVP="120").items[0]
    with Association(node.port, contexts=contexts_for([item])) as assoc:
        assert assoc.store(item) == assoc.store(item) == assoc.store(odd) == 0x0000
        assert assoc.store(item, uid="1.2.3") == 0xA900
        cut = Item(item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid, item.data[:400])
        assert assoc.store(cut) in (0xC000, 0xA900)
    # The name where a UID has to be: libraries warn about such values and quote them.
    for uid in (CANARY, f"{CANARY}^Test"):
        with contextlib.suppress(Cut), Association(node.port, contexts=contexts_for([item])) as assoc:
            assert assoc.store(item, uid=uid) == 0xA900
    with contextlib.suppress(Cut, Rejected):
        Association(node.port, called="OTHER", contexts=[(CANARY, [CANARY])])
    with contextlib.suppress(Cut):
        Association(node.port, contexts=[("1.2.840.10008.5.1.4.1.1.2", [CANARY])]).release()
    node.wait_job(analysed.series_uid)
    node.wait_job(gap.series_uid, state="refused")
    node.wait_delivered(analysed.series_uid)
    said = {verb: node.cli(*verb.split(), "--json") for verb in ("status", "events", "jobs list", "deliveries list")}
    said["job"] = node.cli("jobs", "show", str(node.jobs(gap.series_uid)[0]["id"]), "--json")
    said["log"] = node.log.read_text(errors="replace")
    said["rows"] = str([node.rows(f"SELECT * FROM {t}") for t in ("events", "processes", "jobs", "deliveries")])
    if "sidecar" in node.expected():
        for path in ("metrics", "health", "ready"):
            with urllib.request.urlopen(f"http://127.0.0.1:{node.http_port}/{path}", timeout=10) as answer:
                said[path] = answer.read().decode()
        assert "dicomnode_" in said["metrics"]
    assert len(said["log"]) > 1000
    assert [where for where, text in said.items() if CANARY.casefold() in text.casefold()] == []
