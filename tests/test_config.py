"""What lies in config/ agrees with the code: settings, metrics, alert rules, dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dicomnode.admin.exposition import metric_names
from dicomnode.cloud_settings import Conflicts
from dicomnode.endpoint_settings import Endpoint
from dicomnode.settings import (
    CloudEndpoint,
    ModelPull,
    Peer,
    Range,
    Repository,
    Rule,
    RuleStep,
    Section,
    Settings,
    load_settings,
)

CONFIG = Path(__file__).parent.parent / "config"
EXAMPLE = CONFIG / "dicomnode.toml"
LISTS: dict[str, type[BaseModel]] = {
    "peers": Peer,
    "rules": Rule,
    "cloud.models": ModelPull,
    "cloud.repository": Repository,
    "cloud.backups": CloudEndpoint,
    "inference.endpoints": Endpoint,
    "rules.steps": RuleStep,
}
TEXT = EXAMPLE.read_text(encoding="utf-8")


def block(name: str) -> str:
    """The lines of one section, commented ones too, up to the next section."""
    parts = re.split(r"^(?:# )?\[\[?([a-z.]+)\]\]?$", TEXT, flags=re.M)
    return "\n".join(text for section, text in zip(parts[1::2], parts[2::2], strict=True) if section == name)


def sections() -> dict[str, type[BaseModel]]:
    found = {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    return {**found, "sync.conflicts": Conflicts}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


@pytest.mark.parametrize("name", sections())
def test_each_section_has_each_key_with_its_default(name: str) -> None:
    example, text = reduce(getitem, name.split("."), tomllib.loads(TEXT)), block(name)
    for key, field in sections()[name].model_fields.items():
        default = plain(field.get_default(call_default_factory=True))
        if f"{name}.{key}" in LISTS or f"{name}.{key}" in sections():
            continue  # a section of its own
        if key in example:
            assert example[key] == default, f"{name}.{key}"
        else:
            assert default is None, f"{name}.{key} is missing"
            assert re.search(rf"^# {key} = ", text, re.M), f"{name}.{key} is missing"


@pytest.mark.parametrize("name", LISTS)
def test_each_list_entry_shows_each_key(name: str) -> None:
    text = block(name)
    for key, field in LISTS[name].model_fields.items():
        shown_as = rf"^(# )?{key} = " if f"{name}.{key}" not in LISTS else rf"^# \[\[{name}\.{key}\]\]"
        assert re.search(shown_as, text if f"{name}.{key}" not in LISTS else TEXT, re.M), f"{name}.{key} is missing"
        if field.default is not PydanticUndefined and field.default is not None:
            default = field.default
            told = ", ".join(default) if isinstance(default, tuple) and default else str(default)
            shown = {"()": "none"}.get(told, told.lower())
            comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
            assert shown in comments.lower(), f"the default of {name}.{key} is not told"


def test_no_key_stands_without_a_comment() -> None:
    seen: set[str] = set()
    section, comment = "", False
    for line in TEXT.splitlines():
        if match := re.fullmatch(r"(?:# )?\[\[?([a-z.]+)\]\]?", line):
            section, comment = match[1], False
        elif match := re.match(r"(?:# )?([a-z_0-9]+) = ", line):
            key = f"{section}.{match[1]}"
            told = comment or key in seen or section in ("cloud.models", "cloud.backups")
            assert told, f"{key} has no comment"
            seen.add(key)
            comment = False
        elif line.startswith("#"):
            comment = True


def test_example_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("DICOMNODE")]:
        monkeypatch.delenv(name)
    settings = load_settings(EXAMPLE)
    head, chain = TEXT.split("# [[rules]]", 1)
    assert settings.cloud.stow_url == ""
    # The commented entries are right, too.
    before, rest = head.split("# [[cloud.backups]]")
    entry, rest = rest.split("\n\n", 1)
    before = before.replace('stow_url = ""', 'stow_url = "https://cloud.example.org/studies"')
    head = f"{before}[[cloud.backups]]{re.sub(r'^# ?', '', entry, flags=re.M)}\n\n{rest}"
    uncommented = re.sub(
        r"^# (\[\[cloud\.models\]\]|(?:name|version|url|sha256|token_file|ca_file|port|certificate_file|key_file"
        r"|crl_file|tls|certificate_name|certificate_sha256) = )",
        r"\1",
        head,
        flags=re.M,
    )
    head, rest = uncommented.split("# [[inference.endpoints]]")
    entry, rest = rest.split("\n\n", 1)
    uncommented = f"{head}[[inference.endpoints]]{re.sub(r'^# ', '', entry, flags=re.M)}\n\n{rest}"
    path = tmp_path / "dicomnode.toml"
    path.write_text(uncommented + "[[rules]]" + re.sub(r"^# ?", "", chain, flags=re.M), encoding="utf-8")
    full = load_settings(path)
    assert [m.name for m in full.cloud.models] == ["ct-lung"]
    assert full.cloud.token_file is not None
    assert [e.name for e in full.cloud.endpoints] == ["primary", "second"]
    assert full.inference.endpoints[0].remote("ct-lung", "1.0.0") == ("ct_lung", "1")
    assert [e.name for e in full.inference.places] == ["gpu1"]
    assert (full.tls.port, full.peers[1].tls, full.peers[1].bound) == (2762, True, True)
    assert [(s.name, s.needs.steps) for s in full.rules[1].ordered_steps] == [("lungs", ()), ("detail", ("lungs",))]
    assert (full.rules[2].models, full.rules[2].match["Modality"]) == (("cxr-quality",), ("CR", "DX"))
    assert Range.model_fields.keys() == {"min", "max"}


def used_metrics(text: str) -> set[str]:
    return set(re.findall(r"\bdicomnode_[a-z_]+\b", text))


@pytest.mark.parametrize("name", ["prometheus-alerts.yml", "prometheus-alerts-test.yml", "grafana-dashboard.json"])
def test_metrics_that_are_used_exist(name: str) -> None:
    used = used_metrics((CONFIG / name).read_text(encoding="utf-8"))
    assert used
    assert used - metric_names() == set()


SIDECAR = re.compile(
    r"dicomnode_(cloud|sync|queue_sync|queue_oldest_sync|remote_write|desired|record|records|clock|departures|warning"
    r"|scheduled|model_pull|model_pulls|model_repository|model_waiting|tls)_"
)
"""Figures of what the sidecar does for the node: each of them is worth a panel, or it would not be measured."""


def test_every_figure_of_the_sidecar_has_a_panel() -> None:
    every = {name for name in metric_names() if SIDECAR.match(name)}
    assert len(every) > 25 and "dicomnode_cloud_heartbeat_timestamp_seconds" in every
    assert every - used_metrics((CONFIG / "grafana-dashboard.json").read_text(encoding="utf-8")) == set()


def test_every_alert_is_tried_by_promtool() -> None:
    """An alert that no test raises may never fire, or always."""
    rules, tests = (
        (CONFIG / name).read_text(encoding="utf-8") for name in ("prometheus-alerts.yml", "prometheus-alerts-test.yml")
    )
    every, tried = set(re.findall(r"alert: (\w+)", rules)), set(re.findall(r"alertname: (\w+)", tests))
    assert every - tried == set() and tried - every == set()


def test_dashboard_is_whole() -> None:
    dashboard = json.loads((CONFIG / "grafana-dashboard.json").read_text(encoding="utf-8"))
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(t["expr"] for p in dashboard["panels"] for t in p["targets"])
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        g = panel["gridPos"]
        own = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not own & cells, f"{panel['title']} overlaps"
        assert g["x"] + g["w"] <= 24
        cells |= own


@pytest.mark.parametrize(
    "arguments", [["check", "rules", "prometheus-alerts.yml"], ["test", "rules", "prometheus-alerts-test.yml"]]
)
def test_alert_rules(arguments: list[str]) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run([tool, *arguments], cwd=CONFIG, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
