"""The pages of the reference endpoint: results as people read them, figures, nodes, models; nothing runs in them."""

from __future__ import annotations

import asyncio
import base64
import io
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, TCPConnector
from PIL import Image

from dicomnode import wire
from dicomnode.cloud.content import describe, picture
from dicomnode.cloud.publish import Bundle, Publisher
from dicomnode.cloud.series import read_write_request
from dicomnode.cloud.storage import Storage
from dicomnode.encode import encode_results
from dicomnode.orders import order_for
from dicomnode.sync.remote_write import Collection, snappy, write_request
from tests.certificates import Authority
from tests.cloud.endpoint import endpoint, multipart, record
from tests.cloud.test_sites import ADMIN, TOKENS, A, bearer
from tests.encode.source_case import SOURCES, case_of
from tests.sync.fault_proxy import fault_proxy
from tests.sync.index_case import secondary_capture

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes]]:
    """Kind -> UID and file of what the node makes of a small series."""
    case = case_of(SOURCES["tilted-ct"](), tmp_path_factory.mktemp("case"))
    order = order_for(["pacs"], ["SEG", "SR", "SC"], "binary")
    made = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station, order=order)
    return {m.kind: (m.sop_instance_uid, m.part10) for m in made}


TrustedProxy = tuple[Path, ssl.SSLContext]


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> TrustedProxy:
    """Authority to trust, and what a TLS proxy shows."""
    authority = Authority(tmp_path_factory.mktemp("proxy") / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("cloud", dns=["localhost"]).files)
    return authority.ca_file, context


def password(token: str) -> dict[str, str]:
    """As a browser gives it."""
    return {"Authorization": f"Basic {base64.b64encode(f'me:{token}'.encode()).decode()}"}


def drive(
    folder: Path, body: Callable[[ClientSession, Storage], Awaitable[None]], models: Path | None = None, **how: Any
) -> None:
    async def main() -> None:
        async with endpoint(folder, models=models, **how) as (url, storage), ClientSession(url) as client:
            await body(client, storage)

    asyncio.run(main())


async def page(client: ClientSession, path: str = "/", status: int = 200, **headers: str) -> str:
    async with client.get(path, headers=headers) as answer:
        assert answer.status == status, path
        assert "script-src" not in answer.headers["Content-Security-Policy"]
        return await answer.text()


def test_results_are_shown_as_people_read_them(tmp_path: Path, results: dict[str, tuple[str, bytes]]) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        data, headers = multipart([part10 for _, part10 in results.values()])
        async with client.post("/studies", data=io.BytesIO(data), headers=headers) as answer:
            assert answer.status == 200
        overview = await page(client)
        for uid, _ in results.values():
            assert f'href="/objects/{uid}"' in overview
        report = await page(client, f"/objects/{results['SR'][0]}")
        assert "<li>Volume: <b>" in report and " ml</b>" in report and "<h2>Picture" not in report
        segments = await page(client, f"/objects/{results['SEG'][0]}")
        assert "<h2>Segments" in segments and "Lung" in segments
        for kind in ("SEG", "SC"):
            async with client.get(f"/objects/{results[kind][0]}/picture") as answer:
                assert answer.content_type == "image/png"
                pixels = np.asarray(Image.open(io.BytesIO(await answer.read())))
            assert pixels.max() == 255 and pixels.min() < 255, f"{kind} shows something"
        await page(client, f"/objects/{results['SR'][0]}/picture", 404)
        await page(client, "/objects/1.2.3", 404)

    drive(tmp_path, body)


def test_a_node_and_a_stranger_see_no_page(tmp_path: Path, results: dict[str, tuple[str, bytes]]) -> None:
    async def body(client: ClientSession, _: Storage) -> None:
        uid, part10 = results["SR"]
        data, headers = multipart([part10])
        async with client.post("/studies", data=data, headers={**headers, **bearer(A)}) as answer:
            assert answer.status == 200
        for path in ("/", f"/objects/{uid}", f"/objects/{uid}/picture"):
            await page(client, path, 403, **bearer(A))
            await page(client, path, 401, Host="cloud.example")
            await page(client, path, 401)
        assert "Volume" in await page(client, f"/objects/{uid}?site=north", **bearer(ADMIN))
        await page(client, f"/objects/{uid}", 404, **bearer(ADMIN))
        assert f"/objects/{uid}?site=north" in await page(client, **password(ADMIN)), "of all sites"
        await page(client, "/", 403, **password(A))
        await page(client, "/", 401, **password("wrong-0123456789abcdef"))
        async with client.get("/") as answer:
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        async with client.get("/v1/records", headers=password(ADMIN)) as answer:
            assert answer.status == 401, "a browser would also send it for a page of another site"

    drive(tmp_path, body, token=ADMIN, nodes=TOKENS)


@pytest.mark.parametrize("tokens", [True, False])
def test_a_proxy_on_this_host_opens_no_page(tmp_path: Path, trusted: TrustedProxy, tokens: bool) -> None:
    """It calls from loopback; one as simple as this passes nothing on but bytes, so no header tells of it."""
    authority, context = trusted

    async def main() -> None:
        async with endpoint(tmp_path, ADMIN if tokens else None) as (url, _), ClientSession(url) as here:
            port = int(url.rsplit(":", 1)[1])
            async with fault_proxy(("127.0.0.1", port), context) as proxy:
                connector = TCPConnector(ssl=ssl.create_default_context(cafile=authority))
                async with ClientSession(f"https://localhost:{proxy.port}", connector=connector) as outside:
                    if tokens:
                        await page(outside, "/", 401)
                        await page(outside, "/", 200, **password(ADMIN))
                    for name in ("X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "Via", "X-Real-IP"):
                        await page(outside, "/", 401 if tokens else 403, **{name: "192.0.2.1"})
                    await page(outside, "/", 401 if tokens else 403, Host="cloud.example")
            await page(here, "/", 401 if tokens else 200)

    asyncio.run(main())


def test_what_cannot_be_read_is_told_and_runs_nothing() -> None:
    ds, content = secondary_capture()
    assert describe(b"no DICOM").fault and picture(b"no DICOM") is None
    assert picture(content[:-32]) is None, "pixels that are cut short"
    ds.Rows, ds.Columns = 65535, 65535
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    assert not describe(buffer.getvalue()).picture and picture(buffer.getvalue()) is None
    ds.SeriesDescription, ds.Modality = "<script>alert(1)</script>", "SR"
    item: Any = type(ds)()
    item.ValueType, item.TextValue = "TEXT", "<img src=x onerror=alert(1)>"
    ds.ContentSequence = [item]
    for _ in range(40):  # deeper than any report
        deeper: Any = type(ds)()
        deeper.ValueType, deeper.ContentSequence = "CONTAINER", ds.ContentSequence
        ds.ContentSequence = [deeper]
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    from dicomnode.cloud.page import object_page

    text = object_page("1.2", "", buffer.getvalue())
    assert "<script" not in text and "<img src=x" not in text and text.count("<ul") == text.count("</ul>")


def pushed(value: float, time: int = 1_700_000_000_000, name: str = "dicomnode_up") -> bytes:
    labels = (("__name__", name), ("instance", "CT-A"), ("job", "dicomnode"), ("state", "<b>"))
    return snappy(write_request([Collection(time, [(labels, value)])]))


def test_figures_arrive_and_the_newest_is_shown(tmp_path: Path) -> None:
    async def body(client: ClientSession, storage: Storage) -> None:
        for value, time in ((7.0, 1_700_000_060_000), (3.0, 1_700_000_000_000)):  # the older one comes late
            async with client.post("/api/v1/write", data=pushed(value, time)) as answer:
                assert answer.status == 204
        [row] = storage.series("", "CT-A")
        assert (row["labels"], row["value"], row["samples"]) == ('dicomnode_up{state="<b>"}', 7.0, 2)
        text = await page(client)
        assert "CT-A: 1 series, 2 samples" in text and "dicomnode_up{state=&quot;&lt;b&gt;&quot;}" in text
        bomb = bytes([0xFF, 0xFF, 0xFF, 0xFF, 0x0F]) + b"\0" * 20  # says that 4 GiB will come out
        for wrong in (b"", b"no snappy", pushed(1.0)[:-3], bomb, snappy(b"\x0a\x02\x08\x01")):
            async with client.post("/api/v1/write", data=wrong) as answer:
                assert answer.status == 400, wrong[:20]
        assert storage.counts()["samples"] == 2

    drive(tmp_path, body)


def test_a_sample_that_leaves_fields_out_counts_as_zero() -> None:
    name = wire.put(1, wire.put(1, "__name__") + wire.put(2, "x"))
    body = wire.put(1, name + b"\x12\x00" + wire.put(2, b"\x09" + struct.pack("<d", 2.5) + b"\x10\x07"))
    [series] = read_write_request(snappy(body))
    assert (series.samples, series.value, series.time, series.label("__name__")) == (2, 2.5, 7, "x")


def test_nodes_their_states_and_the_models_that_are_offered(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    bundle = ROOT / "models" / "cxr-quality" / "1.0.0"
    Publisher(repository, tmp_path / "keys").publish([Bundle("cxr-quality", "1.0.0", bundle)])

    async def body(client: ClientSession, _: Storage) -> None:
        beat = {
            "node": "CT-A", "version": "0.1.0", "models": [{"name": "ct-lung", "version": "1.0.0"}],
            "queues": {"jobs": {"pending": 2, "done": 9}}, "disk": {"free_mb": 2048}, "clock_skew_seconds": -0.5,
            "processes": {"worker": False},
        }  # fmt: skip
        odd = {"node": "ODD", "models": "x", "queues": {"jobs": 3}, "disk": [], "clock_skew_seconds": "<b>"}
        for one in (beat, odd):
            async with client.post("/v1/heartbeat", json=one) as answer:
                assert answer.status == 200
        async with client.put("/v1/nodes/CT-A/desired", json={"state": {"log_level": "debug"}}) as answer:
            assert answer.status == 200
        assert "no answer yet" in await page(client)
        report = {"generation": 1, "applied": False, "reason": "<this> is refused"}
        async with client.post("/v1/nodes/CT-A/report", json=report) as answer:
            assert answer.status == 200
        sent = {"node": "CT-A", "records": [record(data={"text": "<script>" * 30})]}
        async with client.post("/v1/records", json=sent) as answer:
            assert answer.status == 200
        text = await page(client)
        for word in ("ct-lung 1.0.0", "jobs 2", "2.0 GiB", "-0.5 s", "down: worker", "log_level",
                     "generation 1 refused", "&lt;this&gt; is refused", "cxr-quality", "1.0.0"):  # fmt: skip
            assert word in text, word
        assert "<script" not in text

    drive(tmp_path / "cloud", body, repository)
