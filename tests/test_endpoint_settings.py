"""[[inference.endpoints]]: what is accepted, what is said of it, and how a bundle finds its name there."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dicomnode.endpoint_settings import Endpoint, endpoint_findings
from dicomnode.errors import SettingsError
from dicomnode.settings import Settings, load_settings


@pytest.mark.parametrize(
    "url", ["http://gpu1", "https://gpu1:8000/pool/", "grpc://10.0.0.1:8001", "grpcs://[::1]:8001"]
)
def test_addresses(url: str) -> None:
    assert Endpoint(name="a", url=url).url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("gpu1:8000", "ftp://gpu1", "http://", "grpc://gpu1", "grpc://gpu1:8001/x", "http://gpu1:99999"),
        *("http://user:secret@gpu1", "http://gpu1/?token=secret"),
    ],
)
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValidationError):
        Endpoint(name="a", url=url)


def test_a_token_goes_over_encrypted_connections_only() -> None:
    for url in ("https://gpu1", "grpcs://gpu1:1", "http://127.0.0.1:8000", "grpc://localhost:1"):
        assert Endpoint(name="a", url=url, token_file="t").token_file
    for url in ("http://gpu1", "grpc://10.0.0.1:1"):
        with pytest.raises(ValidationError, match="token_file needs"):
            Endpoint(name="a", url=url, token_file="t")


def test_the_name_on_the_server() -> None:
    entry = Endpoint(name="a", url="http://x", models={"m@1.0.0": "m_one@7", "m": "m_any", "n": "n@"})
    assert entry.remote("m", "1.0.0") == ("m_one", "7")
    assert entry.remote("m", "2.0.0") == ("m_any", "2.0.0")
    assert entry.remote("n", "2.0.0") == ("n", "")
    assert entry.remote("o", "1.2.3") == ("o", "1.2.3")
    with pytest.raises(ValidationError, match="maps NAME"):
        Endpoint(name="a", url="http://x", models={"m": "../etc"})


def load(folder: Path, text: str) -> Settings:
    path = folder / "node.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(path)


def test_in_a_configuration(tmp_path: Path) -> None:
    entry = '[[inference.endpoints]]\nname = "gpu1"\nurl = "https://gpu1"\ntoken_file = "secret"\n'
    inference = load(tmp_path, f'[inference]\nengine = "kserve"\n{entry}').inference
    assert inference.endpoints[0].token_file == tmp_path / "secret" and len(inference.places) == 1
    assert load(tmp_path, f'[inference]\nengine = "onnxruntime-cpu"\n{entry}').inference.places == ()
    for text, said in (
        ('[inference]\nengine = "kserve"', "at least one"),
        (entry + entry, "differ"),
        (entry.replace("gpu1", "local"), "local"),
        (entry.replace("token_file", "tokenfile"), "did you mean 'token_file'"),
        ("[inference]\nplacement_locality = 0\nplacement_fit = 0\nplacement_load = 0\nplacement_cost = 0", "weights"),
    ):
        with pytest.raises(SettingsError, match=said):
            load(tmp_path, text)


def test_findings(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o644)
    plain = Endpoint(name="plain", url="http://gpu1")
    safe = Endpoint(name="safe", url="https://gpu1", token_file=token, ca_file=tmp_path / "absent")
    found = [(f.level.value, f.text) for f in endpoint_findings([plain, safe], used=True)]
    assert [level for level, _ in found] == ["WARN", "WARN", "FAULT"]
    assert "unencrypted" in found[0][1] and "others on this box" in found[1][1] and "absent" in found[2][1]
    assert "does not use them" in next(iter(endpoint_findings([safe], used=False))).text
