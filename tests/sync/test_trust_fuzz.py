"""Metadata with any byte changed, cut or added: refused or away, never another offer than the one that was signed."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dicomnode.errors import NodeError, PeerError
from dicomnode.sync.source import Again, Answer
from dicomnode.sync.trust import BoundedFetcher, Refused, refresh
from tests.sync.tuf_case import TufRepository

REPOSITORY = TufRepository()
REPOSITORY.add("m/1.0.0.zip", b"archive")
REPOSITORY.publish()
BASE = "https://models.example/metadata"
NAMES = ["metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/2.targets.json"]


class Memory:
    """A source of files in memory, in pieces of ``piece`` bytes."""

    def __init__(self, files: dict[str, bytes], piece: int = 1 << 20) -> None:
        self.files, self.piece = files, piece

    @asynccontextmanager
    async def open(self, url: str, start: int = 0, etag: str = "") -> AsyncIterator[Answer]:
        data = self.files.get(url.removeprefix("https://models.example/"))
        if data is None:
            raise Again("the server answered HTTP 404", None, 404)
        yield Answer(0, len(data), "", self._pieces(data))

    async def _pieces(self, data: bytes) -> AsyncIterator[bytes]:
        for at in range(0, len(data), self.piece):
            yield data[at : at + self.piece]


def look(files: dict[str, bytes], folder: Path, piece: int = 1 << 20) -> list[str]:
    fetcher = BoundedFetcher(Memory(files, piece), 5.0)
    found = refresh(REPOSITORY.trusted_root, BASE, folder / "cache", folder / "work", fetcher)
    return [f"{o.version} {o.sha256} {o.length}" for o in found.offers]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = look(REPOSITORY.files, tmp_path_factory.mktemp("truth"))
    assert len(found) == 1
    return found


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 1 << 16),
    st.sampled_from(["flip", "cut", "add", "double"]),
    st.integers(1, 255),
)
@example(NAMES[2], 0, "cut", 1)
def test_any_change_is_noticed_or_means_the_same(truth: list[str], name: str, at: int, how: str, byte: int) -> None:
    data = REPOSITORY.files[name]
    at %= len(data)
    changed = {
        "flip": data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :],
        "cut": data[:at],
        "add": data[:at] + bytes([byte]) + data[at:],
        "double": data + data,
    }[how]
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = look(REPOSITORY.files | {name: changed}, Path(folder))
        except NodeError as error:
            assert isinstance(error, PeerError)
            assert len(str(error)) < 500 and str(error).isprintable()
            assert not (Path(folder) / "work").exists()
            return
        assert found == truth, "such as a change of white space, which the signature does not cover"


@pytest.mark.parametrize("piece", [1, 7])
def test_the_cap_holds_whatever_the_pieces(tmp_path: Path, piece: int) -> None:
    with pytest.raises(Refused, match="more than 16384 bytes"):
        look(REPOSITORY.files | {NAMES[0]: bytes(20_000)}, tmp_path, piece)
