"""What stands at both ends of the node while its line is measured, each in a process of its own.

``python -m benchmarks.line_ends cloud FOLDER``: a cloud behind the fault proxy of the tests, with a sink for
remote-write; a line with the name of a fault on standard input sets it. ``... senders``: modalities; a line
``PORT SECONDS RUN`` has them store at their pace and is answered with the milliseconds of each C-STORE, as JSON
by size.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
import sys
import threading
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from benchmarks.data import ct_image, uid

KINDS = ((256, 0.04),) * 3 + ((1024, 0.25),)
"""Side of the images and seconds between two of them, of each association: three scanners with 25 a second, and one
that sends images of 2 MB, which are acknowledged with their row, not from the journal."""

_NUMBERS = re.compile(rb"2\.25\.1(\d{10})\d{5}(\d{6})")


class Image:
    """A data set whose UIDs are changed in place."""

    def __init__(self, sender: int, side: int, pace: float) -> None:
        self.pace = pace
        ds = ct_image(sender, 0, side)
        noise = np.random.default_rng(sender).integers(0, 4096, side * side, "<u2")
        ds.add_new("PixelData", "OW", noise.tobytes())
        del ds.file_meta
        stream = DicomIO(BytesIO())
        stream.is_little_endian, stream.is_implicit_VR = True, False
        write_dataset(stream, ds)
        self._sender, self._data = sender, bytearray(stream.parent.getvalue())
        found = list(_NUMBERS.finditer(self._data[:8192]))
        instance = uid(sender, 3, 0).encode()
        self._runs = [m.start(1) for m in found]
        self._instances = [m.start(2) for m in found if m.group() == instance]

    def renewed(self, run: int, number: int) -> tuple[str, bytes]:
        for place in self._runs:
            self._data[place : place + 10] = b"%010d" % run
        for place in self._instances:
            self._data[place : place + 6] = b"%06d" % number
        return uid(self._sender, 3, number, run), bytes(self._data)


def store(image: Image, port: int, seconds: float, run: int, found: list[float]) -> None:
    """One association; milliseconds from a request to its answer."""
    from tests.peers import Association, Item

    syntax = str(ExplicitVRLittleEndian)
    contexts = [(str(CTImageStorage), [syntax])]
    with Association(port, calling="BENCH", contexts=contexts) as association:
        begin = due = time.perf_counter()
        number = 0
        while due < begin + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            item = Item(str(CTImageStorage), *_order(image.renewed(run, number), syntax))
            at = time.perf_counter()
            status = association.store(item)
            found.append(1000 * (time.perf_counter() - at))
            if status != 0:
                raise SystemExit(f"a C-STORE was answered with {status:#06x}")
            number += 1
            due = max(due + image.pace, time.perf_counter() - image.pace)


def _order(named: tuple[str, bytes], syntax: str) -> tuple[str, str, bytes]:
    return named[0], syntax, named[1]


def senders() -> None:
    images = [Image(n, *kind) for n, kind in enumerate(KINDS)]
    print("ready", flush=True)
    for line in sys.stdin:
        port, seconds, run = line.split()
        found: dict[str, list[float]] = {"small": [], "large": []}
        arguments: Sequence[Any] = (int(port), float(seconds), int(run))
        threads = [
            threading.Thread(target=store, args=(image, *arguments, found["small" if side < 512 else "large"]))
            for image, (side, _) in zip(images, KINDS, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps(found), flush=True)


def cloud(folder: Path) -> None:
    """The first line of its output has the ports and the authority to trust."""
    from aiohttp import web

    from dicomnode import logs
    from tests.certificates import Authority
    from tests.cloud.endpoint import endpoint
    from tests.sync.cloud_fake import served
    from tests.sync.fault_proxy import ResolverFault, fault_proxy

    logs.configure("cloud", "error", "json")  # to standard error
    logging.disable(logging.CRITICAL)
    authority = Authority(folder / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("cloud", dns=["localhost"]).files)
    names = ResolverFault(folder)

    async def sink(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=204)

    def port_of(url: str) -> tuple[str, int]:
        return "127.0.0.1", int(url.split(":")[2].partition("/")[0])

    async def main() -> None:
        async with (
            endpoint(folder / "cloud") as (url, storage),
            served(sink, "/api/v1/write") as sink_url,
            fault_proxy(port_of(url), context) as line,
            fault_proxy(port_of(sink_url), context) as other,
        ):
            told = {"line": line.port, "metrics": other.port, "ca_file": str(authority.ca_file)}
            print(json.dumps(told), flush=True)
            while fault := (await asyncio.to_thread(sys.stdin.readline)).strip():
                names.gone(fault == "dns")
                line.fault = other.fault = "pass" if fault == "dns" else fault
                seen = names.seen() if fault == "dns" else line.seen.get(fault, 0)
                print(json.dumps({"seen": seen, "arrived": len(storage.arrivals(1_000_000))}), flush=True)

    asyncio.run(main())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    senders() if sys.argv[1] == "senders" else cloud(Path(sys.argv[2]))
