"""[tls] and [[peers]]: what is accepted, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import SettingsError
from dicomnode.settings import Peer, Settings, Tls, load_settings
from tests.e2e.harness import toml

FILES = {"certificate_file": "node.crt", "key_file": "node.key", "ca_file": "ca.crt"}
ON = {"port": 2762, **FILES}
PEER = {"name": "pacs", "ae_title": "PACS"}


def load(folder: Path, peers: list[dict[str, Any]], **sections: dict[str, Any]) -> Settings:
    lines = []
    for name, keys in sections.items():
        lines += [f"[{name}]", *(f"{k} = {toml(v)}" for k, v in keys.items())]
    for peer in peers:
        lines += ["[[peers]]", *(f"{k} = {toml(v)}" for k, v in peer.items())]
    path = folder / "node.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_settings(path)


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ({"port": 2762}, "certificate_file and key_file of this node are needed"),
        ({"certificate_file": "a"}, "certificate_file and key_file, or neither"),
        ({"key_file": "a"}, "certificate_file and key_file, or neither"),
        ({"port": 2762, "certificate_file": "a", "key_file": "b"}, "ca_file is needed to check the certificates"),
        ({"crl_file": "a"}, "give ca_file"),
        ({"required": True}, "give port, usually 2762"),
        ({**ON, "port": 11112}, "TLS needs a port of its own"),
        ({**ON, "minimum_version": "1.1"}, "'1.2' or '1.3'"),
        ({**ON, "client_certificates": "yes"}, "'required', 'optional' or 'none'"),
        ({**ON, "handshake_seconds": 0}, "greater than 0"),
        ({"key": "-----BEGIN PRIVATE KEY-----SECRET"}, "unknown key"),
    ],
)
def test_wrong_tls_section(tmp_path: Path, tls: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, [], tls=tls)
    assert said in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("peer", "tls", "said"),
    [
        ({"tls": True, "allow": ["store"], "certificate_name": "p"}, {}, "tls.port is not given"),
        ({"tls": True, "host": "10.0.0.9", "port": 104}, {}, "tls.ca_file is needed"),
        ({"tls": True}, ON, "give certificate_name or certificate_sha256"),
        ({"tls": True, "host": "10.0.0.0/24"}, ON, "give certificate_name or certificate_sha256"),
        (
            {"tls": True, "certificate_name": "p", "allow": ["echo"]},
            {**ON, "client_certificates": "none"},
            'client_certificates = "none" asks nobody',
        ),
        ({"called_ae": "OTHER"}, {}, "called_ae names 'OTHER'"),
        ({"host": "10.0.0.0/24", "port": 104}, {}, "needs one address"),
        ({"host": "10.0.0.5/24"}, {}, "did you mean the network 10.0.0.0/24"),
        ({"host": "10.0.0"}, {}, "neither an IPv4 nor an IPv6 address"),
        ({"host": "10.0.0.5:104"}, {}, "a port has a key of its own"),
        ({"more_hosts": ["pacs hospital"]}, {}, "a host name, or a network"),
        ({"certificate_sha256": "ABCD"}, {}, "openssl x509"),
        ({"certificate_name": "*.hospital"}, {}, "without '*'"),
        ({"certificate_name": ["a\nb"]}, {}, "printable"),
    ],
)
def test_wrong_peer(tmp_path: Path, peer: dict[str, Any], tls: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, [{**PEER, **peer}], tls=tls)
    assert said in str(caught.value)


def test_plain_only_both_and_tls_only(tmp_path: Path) -> None:
    assert load(tmp_path, []).tls == Tls()
    both = load(tmp_path, [{**PEER, "tls": True, "host": "10.0.0.9", "port": 2762, "allow": ["store"]}], tls=ON)
    assert (both.tls.port, both.dimse.port, both.tls.required) == (2762, 11112, False)
    only = load(tmp_path, [], tls={**ON, "required": True}, dimse={"host": "127.0.0.1"})
    assert only.tls.required
    sending = load(tmp_path, [{**PEER, "tls": True, "host": "10.0.0.9", "port": 2762}], tls={"ca_file": "ca.crt"})
    assert sending.tls.port is None and sending.peers[0].reachable


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    tls = load(tmp_path, [], tls={**ON, "crl_file": "/etc/x.crl"}).tls
    assert tls.files == (tmp_path / "node.crt", tmp_path / "node.key", tmp_path / "ca.crt", Path("/etc/x.crl"))


def test_fingerprints_in_every_notation() -> None:
    digits = "0123456789abcdef" * 4
    colons = ":".join(digits[n : n + 2].upper() for n in range(0, 64, 2))
    peer = Peer(**PEER, certificate_sha256=[digits, colons, f"sha256 Fingerprint={colons}", digits.upper()])
    assert set(peer.certificate_sha256) == {digits}
    assert peer.bound


def test_one_text_stands_for_a_list_of_one() -> None:
    peer = Peer(**PEER, certificate_name="a", called_ae=" QR ", more_hosts="10.0.0.0/8")
    assert (peer.certificate_name, peer.called_ae, peer.more_hosts) == (("a",), ("QR",), ("10.0.0.0/8",))
    assert Peer(**PEER, host="10.0.0.1", more_hosts="::1").hosts == ("10.0.0.1", "::1")


def test_same_ae_title_for_several_ways_of_coming(tmp_path: Path) -> None:
    ways = [
        {**PEER, "name": "plain", "host": "10.0.0.9"},
        {**PEER, "name": "tls", "host": "10.0.0.9", "tls": True},
        {**PEER, "name": "named", "host": "10.0.0.9", "tls": True, "certificate_name": "x"},
        {**PEER, "name": "called", "host": "10.0.0.9", "called_ae": ["DICOMNODE"]},
        {**PEER, "name": "elsewhere", "host": "10.0.0.9", "more_hosts": ["10.0.0.10"]},
    ]
    assert len(load(tmp_path, ways, tls=ON).peers) == 5
    for way in ways:
        with pytest.raises(SettingsError, match="the same ae_title and host"):
            load(tmp_path, [*ways, {**way, "name": "again"}], tls=ON)


def test_further_ae_titles_are_titles(tmp_path: Path) -> None:
    assert load(tmp_path, [], node={"more_ae_titles": ["QR", "AI "]}).node.ae_titles == ("DICOMNODE", "QR", "AI")
    with pytest.raises(SettingsError, match="1 to 16 printable"):
        load(tmp_path, [], node={"more_ae_titles": ["A\\B"]})
