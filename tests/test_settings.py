"""The configuration: what is accepted, and how a mistake is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dicomnode.errors import SettingsError
from dicomnode.settings import Dimse, Node, Peer, Range, Settings, caller_matches, load_settings

PEER = '[[peers]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'


def load(folder: Path, text: str) -> Settings:
    path = folder / "node.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(path)


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ('[node]\nae_titel = "X"', "node.ae_titel", "'ae_title'"),
        ("[dimse]\nprot = 1", "dimse.prot", "'port'"),
        ("[dimsee]\nport = 1", "dimsee", "'dimse'"),
        ('[[peers]]\nname = "a"\nae_title = "A"\nhots = "x"', "peers.0.hots", "'host'"),
        ('[[rules]]\nname = "r"\nmodels = ["m"]\nsend_too = []', "rules.0.send_too", "'send_to'"),
        ("[completeness]\nzzz = 1", "completeness.zzz", "quiet_seconds"),
    ],
)
def test_unknown_key_names_the_one_that_was_meant(tmp_path: Path, text: str, key: str, near: str) -> None:
    said = complaint(tmp_path, text)
    assert f"{key}: unknown key" in said and near in said and str(tmp_path / "node.toml") in said


PACS = '[[peers]]\nname = "pacs"\nae_title = "PACS"\nhost = "10.0.0.9"\nport = 104\n'
PACS += '[[rules]]\nname = "r"\nmodels = ["m"]\n'
STEPS = '[[rules]]\nname = "r"\nsteps = [{ name = "a", model = "m" }, { name = "b", model = "m",'
CIRCLE = STEPS.replace('"m" }', '"m", after = ["b"] }') + ' after = ["a"] }]'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[dimse]\nport = "x"', "dimse.port = 'x': Input should be a valid integer"),
        ("[dimse]\nport = 70000", "dimse.port = 70000: Input should be less than or equal to 65535"),
        ("[dimse]\nworkers = 0", "dimse.workers = 0: Input should be greater than or equal to 1"),
        ('[node]\nae_title = "SEVENTEEN CHARS XX"', "node.ae_title = 'SEVENTEEN CHARS XX': an AE title has 1 to 16"),
        ('[inference]\nengine = "cuda"', "'onnxruntime-cpu'"),
        ('[logging]\nlevel = "loud"', "'warning'"),
        ("[dimse]\nlog_identifiers = true", "dimse.log_identifiers = True"),
        ('[[peers]]\nae_title = "A"', "peers.0.name: Field required"),
        ('[[peers]]\nname = "A B"\nae_title = "A"', "peers.0.name = 'A B'"),
        ('[[rules]]\nname = "r"\nmodels = []', "rules.0.models"),
        ('[[rules]]\nname = "r"\nmodels = ["m"]\nmatch = { Modalty = "CT" }', "'Modalty' is not a DICOM keyword"),
        ('[[rules]]\nname = "r"\nmodels = ["m"]\nmatch = { KVP = {} }', "give min, max or both"),
        ('[[rules]]\nname = "r"', "rules.0: rule 'r': give models (each by itself) or [[rules.steps]], and not both"),
        (f'{STEPS} after = ["c"] }}]', "rules.0.steps: step 'b' names step 'c', which the rule lacks"),
        (f'{STEPS} after = ["b"] }}]', "step 'b' names itself"),
        (f'{STEPS} after = ["a"] }}, {{ name = "a", model = "m" }}]', "two steps have the same name"),
        (CIRCLE, "steps wait for one another: "),
        (f'{STEPS} when = [{{ step = "a" }}] }}]', "ask one thing of the step"),
        (f'{STEPS} when = [{{ step = "a", measurement = "v" }}] }}]', "measurement 'v': give min, max or both"),
        (f'{STEPS} when = [{{ step = "a", segment = "s", min = 1 }}] }}]', "min and max need a measurement"),
        (f"{STEPS} whem = [] }}]", "did you mean 'when'?"),
        (f'{STEPS} send_to = ["x"] }}]', "send_to names the peer 'x', which [[peers]] lacks"),
        (f"{STEPS} when = [{{ prior = true }}] }}]", "step 'b' has a condition on prior; give it prior = { ... }"),
        (f"{STEPS} inputs = {{ x = {{}} }} }}]", "'x': give conditions, or any series of the study is taken"),
        (f'{STEPS} inputs = {{ x = {{ Modalty = "MR" }} }} }}]', "'Modalty' is not a DICOM keyword"),
        ('[[rules]]\nname = "r"\nmodels = ["m"]\nprior = { from = ["x"] }', "prior.from names the peer 'x'"),
        (f'{PACS}prior = {{ from = ["pacs"] }}', 'may not send them; add "store" to its allow'),
        ('[cloud]\nstow_url = "s3://bucket"', "must begin with https://"),
        ("[node\n", "is not TOML"),
    ],
)
def test_wrong_value_names_key_value_and_remedy(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    said = complaint(tmp_path, "[dimse]\nport = -1\nworkers = 99\n[http]\nport = 99999")
    assert all(key in said for key in ("dimse.port", "dimse.workers", "http.port"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PEER + PEER.replace("PACS", "OTHER"), "two peers have the same name"),
        (PEER + PEER.replace('"pacs"', '"two"'), "the same ae_title and host"),
        ('[[rules]]\nname = "r"\nmodels = ["m"]\nsend_to = ["pacs"]', "names the peer 'pacs', which [[peers]] lacks"),
        (PEER.replace("port = 104", "") + '[[rules]]\nname = "r"\nmodels = ["m"]\nsend_to = ["pacs"]', "host and port"),
        ('[[rules]]\nname = "r"\nmodels = ["m"]\nnotify = ["ris"]', "notify names the peer 'ris'"),
        (PEER.replace("port = 104", "") + '[[rules]]\nname = "r"\nmodels = ["m"]\nnotify = ["pacs"]', "to be notified"),
        (2 * '[[rules]]\nname = "r"\nmodels = ["m"]\n', "two rules have the same name"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMNODE__DIMSE__PORT", "4242")
    monkeypatch.setenv("DICOMNODE__PEERS", json.dumps([{"name": "x", "ae_title": "X", "allow": ["echo"]}]))
    settings = load(tmp_path, "[dimse]\nport = 104\nworkers = 3\n" + PEER)
    assert (settings.dimse.port, settings.dimse.workers) == (4242, 3)
    assert [p.name for p in settings.peers] == ["x"]


def test_error_shows_the_value_of_the_environment_not_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMNODE__DIMSE__PORT", "abc")
    said = complaint(tmp_path, "[dimse]\nport = 104")
    assert "dimse.port = 'abc'" in said and "104" not in said


def test_bad_json_in_the_environment_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMNODE__PEERS", "[{")
    assert "JSON" in complaint(tmp_path, "")


def test_unknown_key_of_a_section_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMNODE__NODE__AE_TITEL", "X")
    assert "did you mean 'ae_title'?" in complaint(tmp_path, "")


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = load(tmp_path, "")
    with pytest.raises(ValidationError):
        settings.node = Node()
    with pytest.raises(ValidationError):
        settings.dimse.port = 1


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    settings = load(
        tmp_path,
        '[node]\ndata_dir = "state/../data"\n[inference]\nmodels_dir = "mine"\n[cloud]\ntoken_file = "token"\n',
    )
    assert settings.node.data_dir == tmp_path / "data"
    assert settings.inference.models_dir == tmp_path / "mine"
    assert settings.cloud.token_file == tmp_path / "token"
    assert load(tmp_path, '[node]\ndata_dir = "/var/x"').node.data_dir == Path("/var/x")


def test_shipped_models_serve_where_the_file_has_none(tmp_path: Path) -> None:
    assert (load(tmp_path, "").inference.models_dir / "ct-lung").is_dir()


@pytest.mark.parametrize(
    "text",
    [
        '[cloud]\ntoken = "SECRET"',
        '[cloud]\nstow_url = "ftp://user:SECRET@cloud.example/studies"',
        '[cloud.auth]\npassword = "SECRET"',
        '[[peers]]\nname = "a"\nae_title = "A"\npassword = "SECRET"',
    ],
)
def test_no_secret_in_an_error(tmp_path: Path, text: str) -> None:
    assert "SECRET" not in complaint(tmp_path, text)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings(tmp_path / "none.toml")
    with pytest.raises(SettingsError, match="permissions"):
        load_settings(tmp_path)


def test_match_takes_scalars_lists_and_ranges(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        '[[rules]]\nname = "r"\nmodels = ["m@1.0.0"]\n'
        'match = { Modality = "CT", KVP = 120, SliceThickness = { max = 1.5 }, StudyDate = { min = "20260101" },'
        ' BodyPartExamined = ["CHEST", "LUNG*"] }',
    )
    (rule,) = settings.rules
    assert rule.match["Modality"] == "CT" and rule.match["KVP"] == 120
    assert rule.match["SliceThickness"] == Range(max=1.5) and rule.match["StudyDate"] == Range(min="20260101")
    assert rule.match["BodyPartExamined"] == ("CHEST", "LUNG*")
    assert settings.rule_keywords == set(rule.match)


AE_CHARACTERS = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "\\")


@given(st.text(AE_CHARACTERS, min_size=1, max_size=16).filter(lambda t: t.strip(" ")))
def test_legal_ae_titles_pass_without_padding(title: str) -> None:
    assert Node(ae_title=title).ae_title == title.strip(" ")


@given(
    st.one_of(
        st.text(" ", max_size=20),
        st.text(AE_CHARACTERS, min_size=17, max_size=40).filter(lambda t: len(t.strip(" ")) > 16),
        st.tuples(st.text(AE_CHARACTERS, max_size=7), st.sampled_from("\\\0\t\n\r\x1b\x7fäß漢"), st.just("A")).map(
            "".join
        ),
    )
)
def test_illegal_ae_titles_are_refused(title: str) -> None:
    with pytest.raises(ValidationError):
        Node(ae_title=title)


@pytest.mark.parametrize(
    ("host", "address", "matches"),
    [
        ("", "10.1.2.3", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("10.0.0.5", "10.0.0.50", False),
        ("10.0.0.5", "::ffff:10.0.0.5", True),
        ("::1", "0:0:0:0:0:0:0:1", True),
        ("localhost", "127.0.0.1", True),
        ("localhost", "10.0.0.5", False),
        ("does-not-exist.invalid", "10.0.0.5", False),
    ],
)
def test_caller_address(host: str, address: str, matches: bool) -> None:
    assert caller_matches(Peer(name="a", ae_title="A", host=host), address) is matches


def test_every_field_is_described() -> None:
    for name, section in Settings.model_fields.items():
        fields = getattr(section.annotation, "model_fields", {})
        missing = [f"{name}.{key}" for key, field in fields.items() if not field.description]
        assert not missing
    assert Dimse().log_identifiers is False
