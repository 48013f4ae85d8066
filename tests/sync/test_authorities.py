"""Authorities are read once, and again when their file is another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dicomnode.errors import OperatorError
from dicomnode.settings import Cloud
from dicomnode.sync.http import authorities, open_session
from tests.certificates import Authority


def test_a_file_is_read_once_and_its_successor_too(tmp_path: Path) -> None:
    one, two = (Authority(tmp_path / name, name) for name in ("one", "two"))
    file = tmp_path / "ca.pem"
    file.write_bytes(one.ca_file.read_bytes())
    first = authorities(file)
    assert authorities(file) is first and [len(first.get_ca_certs())] == [1]
    (tmp_path / "next").write_bytes(two.ca_file.read_bytes())
    (tmp_path / "next").replace(file)  # as certificates are renewed
    second = authorities(file)
    assert second is not first and second.get_ca_certs() != first.get_ca_certs()
    assert authorities(one.ca_file) is not first, "another file of the same content is another"


def test_those_of_the_system_are_read_once() -> None:
    first = authorities(None)
    assert authorities(None) is first and first.check_hostname


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("hello")

    async def main() -> None:
        for path in (tmp_path / "none", tmp_path / "ca.pem"):
            for _ in range(2):
                with pytest.raises(OperatorError, match="ca_file"):
                    open_session(Cloud(ca_file=path), "https://localhost")

    asyncio.run(main())
