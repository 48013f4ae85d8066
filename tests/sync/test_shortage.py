"""A passing shortage of this machine parks nothing."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dicomnode import deidentify, durable
from dicomnode.index.database import Database
from dicomnode.pseudonyms import Pseudonyms
from dicomnode.sync.aside import leave
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import (
    FakeClock,
    add_results,
    as_they_are,
    make_settings,
    secondary_capture,
    sender_of,
    states,
)


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), OSError(errno.EIO, "Input/output error"), MemoryError()]
)
@pytest.mark.parametrize("where", ["digest", "prepare"])
def test_a_result_waits_until_the_shortage_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    clock, fake = FakeClock(), FakeCloud()
    db = Database(tmp_path, clock)
    [first], [second] = add_results(db, tmp_path), add_results(db, tmp_path)
    as_they_are(db)

    def short(*_: Any) -> Any:
        raise error

    async def main() -> None:
        async with served(fake.handle) as url:
            sender = sender_of(make_settings(tmp_path, cloud={"stow_url": url}), db)
            with monkeypatch.context() as patch:
                if where == "digest":
                    patch.setattr(durable, "sha256_file", short)
                else:
                    patch.setattr(sender._prepare, "object", short)
                assert await sender.flush() == 0
                assert states(db) == ["pending"] * 2
                assert "is tried again" in db.value("SELECT last_error FROM sync_items")
            clock.now += 3600
            assert await sender.flush() == 2

    asyncio.run(main())
    db.close()
    assert set(fake.stored) == {first, second}


def test_reading_and_parsing_tell_a_shortage_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IsADirectoryError):
        leave(tmp_path, b"k" * 32)
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):

        def short(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(deidentify, "_object", short)
        with pytest.raises(type(error)):
            deidentify.deidentify(secondary_capture()[1], Pseudonyms(b"k" * 32))
