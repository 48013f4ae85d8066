"""Logs: only what is on the allow-list, UIDs as pseudonyms, libraries silent."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.logs import ALLOWED, uid_hash

CANARY = "CANARY^PATIENT"
SCRIPT = f"""
import logging, sys
from dicomnode import logs
logs.configure("test", "debug", sys.argv[1])
log = logs.get()
log.info("fine", peer="ct1", count=3, patient="{CANARY}", PatientName="{CANARY}", uid="{CANARY}", query="{CANARY}")
log.bind(dataset="{CANARY}").warning("bound")
try:
    int("{CANARY}")
except ValueError:
    log.exception("failed", exc_type="ValueError")
    log.error("failed", exc_info=True, stack_info=True)
for name in ("pynetdicom", "pynetdicom.acse", "pydicom", "highdicom"):
    logging.getLogger(name).error("{CANARY}")
logging.getLogger("someone.else").error("{CANARY}")
"""


@pytest.mark.parametrize("style", ["json", "console", "auto"])
def test_canary_reaches_no_log(style: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, style], capture_output=True, text=True, timeout=60, check=True)
    assert CANARY not in done.stdout + done.stderr
    assert "fine" in done.stderr and "ct1" in done.stderr and done.stdout == ""
    if style != "console":
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert lines[0]["dicomnode.peer"] == "ct1" and lines[0]["dicomnode.count"] == 3
        assert {"@timestamp", "log.level", "message", "process.name"} <= set(lines[0])
        assert [line["message"] for line in lines] == ["fine", "bound", "failed", "failed"]


def test_level_is_kept() -> None:
    code = (
        "from dicomnode import logs\nlogs.configure('t', 'warning', 'json')\n"
        "logs.get().info('no')\nlogs.get().error('yes')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["yes"]


def test_no_attribute_name_is_on_the_list() -> None:
    from pydicom.datadict import keyword_dict  # type: ignore[attr-defined]

    assert not ALLOWED & set(keyword_dict)


@given(st.text("0123456789.", min_size=1, max_size=64))
def test_uid_is_a_pseudonym(uid: str) -> None:
    assert uid_hash(uid) == uid_hash(uid) and len(uid_hash(uid)) == 12
    assert len(uid) < 5 or uid not in uid_hash(uid)
