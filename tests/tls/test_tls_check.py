"""doctor and check-config about TLS: each fault is found, said in words and comes with what to do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dicomnode.doctor import examine
from dicomnode.findings import Finding, Level
from dicomnode.settings import Settings
from dicomnode.tls_check import tls_findings
from tests.certificates import SERVER_ONLY, Authority, Issued, make_key, self_signed, write_key
from tests.e2e.harness import toml

PLAIN = {"name": "ct1", "ae_title": "CT1", "host": "127.0.0.1", "allow": ["store"]}
PACS = {
    "name": "pacs",
    "ae_title": "PACS",
    "host": "10.0.0.9",
    "tls": True,
    "allow": ["store"],
    "certificate_name": "P",
}


class Setup:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.own = self.authority.issue("node", dns=["node.hospital"])

    def settings(self, *, peers: list[dict[str, Any]] | None = None, own: Issued | None = None, **tls: Any) -> Settings:
        own = own or self.own
        keys = {
            "port": 0,
            "certificate_file": own.certificate_file,
            "key_file": own.key_file,
            "ca_file": self.authority.ca_file,
            **tls,
        }
        return Settings(tls=keys, peers=[PLAIN, PACS] if peers is None else peers)

    def findings(self, **keys: Any) -> list[Finding]:
        found = list(tls_findings(self.settings(**keys)))
        assert all(f.hint for f in found if f.level in (Level.warn, Level.fault)), found
        return found


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def one(findings: list[Finding], words: str) -> Finding:
    found = [f for f in findings if words in f.text]
    assert len(found) == 1, [f.as_dict() for f in findings]
    return found[0]


def test_sound_setup(setup: Setup) -> None:
    found = setup.findings()
    assert {f.level for f in found} == {Level.ok}
    assert setup.own.sha256 in one(found, "this node's certificate").text
    assert "the name P" in one(found, "peer pacs uses TLS").text


def test_without_tls() -> None:
    (note,) = tls_findings(Settings(peers=[{**PLAIN, "host": "10.0.0.5"}]))
    assert (note.level, "not set up" in note.text) == (Level.note, True)
    assert list(tls_findings(Settings(peers=[PLAIN]))) == []


@pytest.mark.parametrize(
    ("days", "level", "words"),
    [(31, Level.ok, "valid until"), (29, Level.warn, "runs out in 28 days"), (-1, Level.fault, "ran out on")],
)
def test_end_of_the_certificate(setup: Setup, days: float, level: Level, words: str) -> None:
    own = setup.authority.issue("node", dns=["n"], start_days=-40, days=days, file="other")
    found = one(setup.findings(own=own), "this node's certificate")
    assert (found.level, words in found.text) == (level, True)


def test_certificate_of_the_future(setup: Setup) -> None:
    found = list(tls_findings(setup.settings(), datetime.now(UTC) - timedelta(days=10)))
    assert one(found, "not valid before").level is Level.fault


def test_missing_and_damaged_files(setup: Setup) -> None:
    setup.own.certificate_file.unlink()
    assert one(setup.findings(), "No such file").level is Level.fault
    setup.own.certificate_file.write_text("hello")
    found = one(setup.findings(), "cannot be understood")
    assert (found.level, "PEM" in found.hint) == (Level.fault, True)


def test_key_that_belongs_to_another(setup: Setup) -> None:
    write_key(setup.own.key_file, make_key())
    assert one(setup.findings(), "is not the key of").level is Level.fault


def test_key_that_others_may_read(setup: Setup) -> None:
    for mode, level in ((0o600, None), (0o640, None), (0o644, Level.warn), (0o660, Level.warn)):
        setup.own.key_file.chmod(mode)
        found = [f for f in setup.findings() if "others on this box" in f.text]
        assert [f.level for f in found] == ([level] if level else [])


def test_purpose_of_the_certificate(setup: Setup) -> None:
    own = setup.authority.issue("node", dns=["n"], usages=SERVER_ONLY, file="other")
    assert not [f for f in setup.findings(own=own) if "not for clients" in f.text]
    sending = [PLAIN, {**PACS, "port": 2762}]
    assert one(setup.findings(own=own, peers=sending), "not for clients").level is Level.warn
    from cryptography.x509.oid import ExtendedKeyUsageOID

    caller = setup.authority.issue("node", dns=["n"], usages=(ExtendedKeyUsageOID.CLIENT_AUTH,), file="caller")
    assert one(setup.findings(own=caller), "not for servers").level is Level.warn


def test_certificate_without_names(setup: Setup) -> None:
    own = setup.authority.issue("node", file="nameless")
    assert one(setup.findings(own=own), "no DNS name").level is Level.note


def test_authorities(setup: Setup, tmp_path: Path) -> None:
    old = setup.authority.issue("Old device", days=-1, start_days=-9)
    both = tmp_path / "both.pem"
    both.write_bytes(setup.authority.ca_file.read_bytes() + old.certificate_file.read_bytes())
    found = setup.findings(ca_file=both)
    assert one(found, "2 trusted certificates").level is Level.ok
    assert one(found, "trusted certificate 'Old device' ran out").level is Level.warn


@pytest.mark.parametrize("authority", [True, False])
def test_device_that_could_sign_for_others(setup: Setup, tmp_path: Path, authority: bool) -> None:
    """What 'openssl req -x509' makes is an authority; listed as trusted it could make itself a PACS."""
    device = self_signed(tmp_path, "CT1", ca=authority)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(setup.authority.ca_file.read_bytes() + device.certificate_file.read_bytes())
    ct = {**PLAIN, "tls": True, "certificate_sha256": device.sha256}
    found = [f for f in setup.findings(ca_file=trusted, peers=[ct, PACS]) if "may sign others" in f.text]
    assert [(f.level, "pacs" in f.text) for f in found] == ([(Level.warn, True)] if authority else [])


def test_revocation_lists(setup: Setup) -> None:
    crl = setup.authority.revocations()
    found = setup.findings(crl_file=crl)
    assert one(found, "revocation lists in").level is Level.ok
    assert not any("intermediate" in f.text for f in found)
    other = Authority(setup.authority.folder / "other", "Other CA").revocations()
    assert one(setup.findings(crl_file=other), "intermediate").level is Level.note
    setup.authority.revocations(days=-1)
    assert one(setup.findings(crl_file=crl), "out of date").level is Level.fault
    crl.write_text("")
    assert one(setup.findings(crl_file=crl), "tls.crl_file").level is Level.fault


def test_callers_without_certificate(setup: Setup) -> None:
    assert one(setup.findings(client_certificates="optional"), "without a certificate").level is Level.warn


@pytest.mark.parametrize(("required", "level"), [(False, Level.note), (True, Level.warn)])
def test_peer_that_is_sent_to_in_plain(setup: Setup, required: bool, level: Level) -> None:
    peer = {**PLAIN, "host": "10.0.0.5", "port": 104}
    assert one(setup.findings(peers=[peer], required=required), "sent to without TLS").level is level


def test_peer_that_may_still_call_in_plain(setup: Setup) -> None:
    peers = [{**PLAIN, "host": "10.0.0.5", "certificate_name": "CT1"}]
    found = setup.findings(peers=peers)
    assert one(found, "may also call without TLS").level is Level.warn
    assert one(found, "may call without TLS").level is Level.note


def test_open_plain_port_where_tls_is_required(setup: Setup) -> None:
    assert 'dimse.host = "127.0.0.1"' in one(setup.findings(required=True), "stays open").hint


def test_files_that_do_not_work_together(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from dicomnode import tls_context

    monkeypatch.setattr(tls_context, "SUITES", "NONSENSE")
    assert one(setup.findings(), "do not work together").level is Level.fault


def test_doctor_looks_at_the_tls_port(setup: Setup) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = setup.settings(host="127.0.0.1", port=taken.getsockname()[1])
        found = [f for f in examine(settings) if f.check == "TLS port"]
    assert [(f.level, "tls.port" in f.hint) for f in found] == [(Level.fault, True)]


def check_config(setup: Setup, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = setup.settings(peers=[])
    keys = {**settings.tls.model_dump(exclude_none=True, mode="json"), "port": 2762}
    config = setup.folder / "node.toml"
    config.write_text("[tls]\n" + "\n".join(f"{k} = {toml(v)}" for k, v in keys.items()), encoding="utf-8")
    argv = [sys.executable, "-m", "dicomnode", "check-config", "--config", str(config), *arguments]
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)


def test_check_config_tells_about_tls(setup: Setup) -> None:
    done = check_config(setup)
    assert done.returncode == 0, done.stderr
    assert "TLS 1.2 or newer on 0.0.0.0:2762, client certificates required" in done.stdout
    assert setup.own.sha256 in done.stdout
    write_key(setup.own.key_file, make_key())
    done = check_config(setup, "--json")
    assert done.returncode == 78
    assert "FAULT" in {f["level"] for f in json.loads(done.stdout)["findings"]}
