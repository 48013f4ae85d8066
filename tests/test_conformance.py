"""The conformance statement says what the node does: it is compared with a running listener and with the code."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID
from pynetdicom import AE, sop_class
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import build_context
from typer.testing import CliRunner

from dicomnode import serve
from dicomnode.app import dimse_services
from dicomnode.cli import app
from dicomnode.commitment import Verdict
from dicomnode.conformance import RESULTS, SERVICE_SECTIONS, statement
from dicomnode.conformance_page import Document, Section, Table, as_data, markdown, table
from dicomnode.conformance_services import INITIATED
from dicomnode.conformance_statuses import FAILURE_REASONS, OF_MODULE, REJECTIONS, behaviour
from dicomnode.deliver.scu import classify_store_status
from dicomnode.encode.results import encode_results
from dicomnode.index.database import Database
from dicomnode.receive import policy
from dicomnode.receive.acceptor import Door, listen
from dicomnode.receive.listener import Listener
from dicomnode.settings import Service, Settings
from tests.encode.conftest import make_case as encoding_case

PACKAGE = Path(__file__).resolve().parent.parent / "dicomnode"
DAY = date(2024, 2, 29)
UNCOMPRESSED = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"]
EVERY = list(get_args(Service))


def tables(sections: tuple[Section, ...]) -> Iterator[Table]:
    for section in sections:
        yield from (b for b in section.blocks if isinstance(b, Table))
        yield from tables(section.sections)


def roles(document: Document) -> dict[str, tuple[str, str, str]]:
    """SOP class -> SCU, SCP and SCU where the peer calls, of every table that has them."""
    found: dict[str, tuple[str, str, str]] = {}
    for block in tables(document.sections):
        if block.columns[1:4] == ("SOP class UID", "SCU", "SCP"):
            for row in block.rows:
                assert found.setdefault(row[1], row[2:]) == row[2:], f"{row[1]} is told in two ways"
    return found


@pytest.fixture(scope="module")
def document() -> Document:
    return statement(Settings(), DAY)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A listener with a peer that may do everything."""
    settings = Settings(
        node={"data_dir": tmp_path / "data", "reserve_mb": 1},
        peers=[{"name": "all", "ae_title": "ALL", "allow": EVERY, "commitment": True}],
    )
    db = Database(tmp_path / "data")
    listening = listen("127.0.0.1", 0)
    listener = Listener(settings, db, [Door(listening)], "receiver-1", dimse_services(settings, db))
    listener.start()
    yield int(listening.getsockname()[1])
    listener.close()
    db.close()


def accepted(port: int, uids: list[str]) -> dict[str, tuple[bool, bool]]:
    """SOP class -> the roles that the listener gives the caller, of those that it accepts."""
    items = []
    for uid in uids:
        item = SCP_SCU_RoleSelectionNegotiation()
        item.sop_class_uid, item.scu_role, item.scp_role = uid, True, True
        items.append(item)
    ae = AE(ae_title="ALL")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    contexts = [build_context(uid, UNCOMPRESSED) for uid in uids]
    assoc = ae.associate("127.0.0.1", port, contexts=contexts, ae_title="DICOMNODE", ext_neg=items)
    found = {str(c.abstract_syntax): (bool(c.as_scu), bool(c.as_scp)) for c in assoc.accepted_contexts}
    if assoc.is_established:
        assoc.release()
    return found


def test_says_what_a_listener_accepts_and_nothing_else(port: int, document: Document) -> None:
    known = sorted({str(uid) for uid in vars(sop_class).values() if isinstance(uid, UID)})
    assert len(known) > 250
    seen: dict[str, tuple[bool, bool]] = {}
    for start in range(0, len(known), 100):
        seen |= accepted(port, known[start : start + 100])
    told = {uid: (scp == "Yes", back == "Yes") for uid, (_, scp, back) in roles(document).items()}
    assert {uid: both for uid, both in told.items() if any(both)} == seen


def test_transfer_syntaxes_are_those_of_negotiation(document: Document) -> None:
    section = document.find("contexts")
    assert section is not None
    found = [{row[1] for row in t.rows} for t in tables((section,)) if t.title == "Transfer syntaxes accepted"]
    assert set(UNCOMPRESSED) in found and any("1.2.840.10008.1.2.4.90" in one for one in found)


def test_every_service_has_a_section_of_its_own(document: Document) -> None:
    assert set(serve.__all__) == set(SERVICE_SECTIONS)
    services = document.find("services")
    assert services is not None
    assert {s.key for s in services.sections} == {
        *("verification", "storage", "query-retrieve", "mpps", "commitment", "notification", "stow")
    }


def test_a_service_without_a_section_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch, document: Document) -> None:
    monkeypatch.delitem(SERVICE_SECTIONS, "Commitment")
    bare = statement(Settings(), DAY)
    assert bare.find("commitment") is not None and roles(bare) == roles(document)


def imported_classes(path: Path) -> set[str]:
    """SOP classes that a module imports from pynetdicom."""
    return {
        str(getattr(sop_class, alias.name))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "pynetdicom.sop_class"
        for alias in node.names
    } - {str(sop_class.StorageCommitmentPushModelInstance)}


def test_every_sop_class_that_the_code_names_is_told(document: Document) -> None:
    told = roles(document)
    named = {uid for path in PACKAGE.rglob("*.py") if "demo" not in path.parts for uid in imported_classes(path)}
    assert len(named) > 8 and named <= set(told)
    opened = {uid for path in (PACKAGE / "deliver").glob("*.py") for uid in imported_classes(path)}
    assert opened <= INITIATED and all(told[uid][0] == "Yes" for uid in opened)


CONSTANT = re.compile(r"^([A-Z][A-Z_]+) = 0x([0-9A-F]{4})$", re.MULTILINE)


@pytest.mark.parametrize("module", OF_MODULE, ids=lambda m: m.__name__)
def test_every_status_of_a_service_is_told(module: Any, document: Document) -> None:
    constants = dict(CONSTANT.findall(Path(module.__file__).read_text(encoding="utf-8")))
    constants.pop("MAY_NO_LONGER_BE_UPDATED", None)  # an Error ID
    told = [s.code for s in OF_MODULE[module]]
    assert sorted(told) == sorted({int(value, 16) for value in constants.values()})
    text = markdown(document)
    assert all(f"| 0x{value} |" in text for value in constants.values())


def test_statuses_are_defined_in_modules_that_the_statement_knows() -> None:
    """A service that brings constants of its own has to be told of too."""
    folders = [PACKAGE / "serve", PACKAGE / "receive"]
    found = {p for f in folders for p in f.glob("*.py") if CONSTANT.search(p.read_text(encoding="utf-8"))}
    assert found <= {Path(str(m.__file__)) for m in OF_MODULE}


def test_failure_reasons_and_rejections_are_complete() -> None:
    assert set(FAILURE_REASONS) == set(Verdict)
    source = (PACKAGE / "receive" / "policy.py").read_text(encoding="utf-8")
    used = set(re.findall(r"_rejected\(\s*([A-Z_]+)", source)) | set(re.findall(r"_misfit\(.*, ([A-Z_]+)\)", source))
    used |= set(re.findall(r"reason: int = ([A-Z_]+)", source))
    assert {getattr(policy, name) for name in used} == {reason for _, _, reason, _ in REJECTIONS}


TOLD = behaviour(classify_store_status)


@given(st.integers(0, 0xFFFF) | st.sampled_from([0x0000, 0x0111, 0xA700, 0xA7FF, 0xA800, 0xB000, 0xBFFF, 0xC000]))
def test_behaviour_is_what_the_code_does(status: int) -> None:
    told = dict(TOLD)
    for spans, fate in told.items():
        for span in spans.split(", "):
            bounds = [int(part, 16) for part in span.split(" to ") if part.startswith("0x")]
            if bounds and bounds[0] <= status <= bounds[-1]:
                assert fate == classify_store_status(status)[0]
                return
    assert told["any other"] == classify_store_status(status)[0]


make_case = encoding_case


def test_objects_created_are_those_that_are_encoded(make_case: Callable[..., Any]) -> None:
    case = make_case()
    objects = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    assert {o.sop_class_uid for o in objects} == {str(uid) for uid in RESULTS.values()}


def test_a_setting_shows() -> None:
    changed = Settings(
        node={"ae_title": "ELSEWHERE", "more_ae_titles": ["SECOND"]},
        dimse={"port": 4321, "max_pdu_bytes": 65536, "idle_seconds": 77, "query_max_answers": 123},
        delivery={"commitment_timeout_seconds": 999},
    )
    text, before = markdown(statement(changed, DAY)), markdown(statement(Settings(), DAY))
    for shown in (
        "| ELSEWHERE | 4321 |",
        "| SECOND | 4321 |",
        "| 65536 bytes |",
        "| 77.0 s |",
        "123 matches",
        "999.0 s",
    ):
        assert shown in text and shown not in before


def test_tls_shows_its_suites() -> None:
    text, newest = (markdown(statement(Settings(tls={"minimum_version": v}), DAY)) for v in ("1.2", "1.3"))
    assert "ECDHE-RSA-AES256-GCM-SHA384" in text and "TLS_AES_256_GCM_SHA384" in text
    assert "ECDHE-RSA" not in newest and "TLS_AES_256_GCM_SHA384" in newest
    assert "CBC" not in text


def test_every_setting_is_listed_with_its_meaning(document: Document) -> None:
    section = document.find("configuration")
    assert section is not None
    listed = {row[0]: row[-1] for block in tables((section,)) for row in block.rows}
    for name, field in Settings.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            assert listed[f"{name}.{key}"] == inner.description != ""


def test_says_nothing_about_the_site_that_is_not_for_others() -> None:
    secret = Settings(
        node={"data_dir": "/canary/data", "institution": "CANARY HOSPITAL"},
        dimse={"host": "10.9.8.7"},
        cloud={"stow_url": "https://canary.example/studies", "token_file": "/canary/token"},
        peers=[{"name": "canary", "ae_title": "CANARYAE", "host": "10.9.8.6", "port": 104, "allow": ["store", "get"]}],
    )
    document = statement(secret, DAY)
    text = markdown(document) + json.dumps(as_data(document))
    assert not re.search(r"canary|10\.9\.8", text, re.IGNORECASE)
    assert "| Remote application entities (peers) | 1 |" in text and "| of which may use 'get' | 1 |" in text


def cells(line: str) -> int:
    return len(re.sub(r"\\.", "", line).strip().strip("|").split("|"))


def check_tables(text: str) -> int:
    """Each table has its caption, a rule, and rows of one width; the number of tables."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for block in blocks:
        lines = block.splitlines()
        assert re.fullmatch(r"\|( --- \|)+", lines[1]), lines[1]
        assert {cells(line) for line in lines} == {cells(lines[1])}, block[:200]
    return len(blocks)


def test_tables_are_well_formed(document: Document) -> None:
    text = markdown(document)
    assert check_tables(text) == len(list(tables(document.sections))) + 1
    numbers = [int(n) for n in re.findall(r"^\*\*Table (\d+)\.", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    headings = re.findall(r"^#{2,6} ([\d.]+ .*)", text, re.MULTILINE)
    contents = re.findall(r"^ *- ([\d.]+ .*)", text, re.MULTILINE)
    assert headings == contents
    assert all(row for block in tables(document.sections) for row in block.rows)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_no_value_breaks_a_table(found: list[tuple[str, str]]) -> None:
    values = [tuple("".join(c for c in cell if c.isprintable() or c == "\n") for cell in row) for row in found]
    block = table("T", ("a", "b"), values)
    text = markdown(Document("D", table("C", ("Item", "Value"), []), (Section("s", "S", (block,)),)))
    lines = text.split("\n")
    place = next(i for i, line in enumerate(lines) if line == "| a | b |")
    assert len([line for line in lines[place + 2 :] if line.startswith("| ")]) == len(values)


def test_a_row_of_another_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="other than 2 cells"):
        table("T", ("a", "b"), [("1", "2"), ("1",)])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\nae_title = "HERE"\n')
    return path


def test_verb_writes_a_file_and_json(config: Path, tmp_path: Path) -> None:
    target = tmp_path / "statement.md"
    done = CliRunner().invoke(app, ["conformance", "--config", str(config), "--output", str(target)])
    assert done.exit_code == 0 and "# DICOM Conformance Statement" in target.read_text(encoding="utf-8")
    assert not (tmp_path / "data").exists()  # nothing of the node is touched
    printed = CliRunner().invoke(app, ["conformance", "--config", str(config), "--json"], catch_exceptions=False)
    data = json.loads(printed.stdout)
    assert data["cover"]["AE title"] == "HERE"
    assert "commitment" in {s["key"] for s in next(s for s in data["sections"] if s["key"] == "services")["sections"]}


def test_verb_says_why_it_cannot_write(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["conformance", "--config", str(config), "--output", str(tmp_path / "no" / "x.md")])
    assert done.exit_code != 0 and "No such file" in str(done.exception)
