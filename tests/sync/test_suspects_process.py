"""A sidecar that dies of one item, each time: a real process, with SIGKILL in the middle of its request."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from dicomnode.index.database import Database
from dicomnode.pseudonyms import KEY_BYTES, Pseudonyms
from tests.peers import quiet_environment
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import add_results, states
from tests.sync.test_sidecar import until

DEADLY = """
import os, signal, sys
if "sidecar" in sys.orig_argv:
    from dicomnode.index import cloud_outbox
    from dicomnode.sync import sender
    cloud_outbox.MOST_ENDED = 2
    plain = sender.store
    async def store(session, url, headers, parts, **more):
        if any(p.uid == {uid!r} for p in parts):
            os.kill(os.getpid(), signal.SIGKILL)
        return await plain(session, url, headers, parts, **more)
    sender.store = store
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_is_left_behind_and_everything_else_arrives(tmp_path: Path) -> None:
    data, key = tmp_path / "data", b"k" * KEY_BYTES
    db = Database(data)
    (data / "cloud-pseudonyms.key").write_bytes(key)
    (data / "cloud-pseudonyms.key").chmod(0o600)
    codec = Pseudonyms(key)
    [first], [bad, behind], [last] = add_results(db, data), add_results(db, data, 2), add_results(db, data)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY.format(uid=codec.uid(bad)))
    environment = quiet_environment()
    environment["PYTHONPATH"] = f"{tmp_path / 'site'}:{environment.get('PYTHONPATH', '')}"
    fake = FakeCloud()

    async def main() -> int:
        async with served(fake.handle) as url:
            config = tmp_path / "node.toml"
            config.write_text(
                f'[node]\ndata_dir = "{data}"\nreserve_mb = 1\n[http]\nport = 0\n[cloud]\nstow_url = "{url}"\n'
                "[sync]\nnormal_seconds = 0.2\n[delivery]\nbackoff_seconds = 0.1\n"
            )
            command = [sys.executable, "-m", "dicomnode", "run", "sidecar", "--config", str(config)]
            null, lives = subprocess.DEVNULL, 0
            while True:
                lives += 1
                process = subprocess.Popen(command, stdout=null, stderr=null, env=environment)
                try:
                    await until(
                        lambda p=process: p.poll() is not None or not {"pending", "sending"} & set(states(db)), 120
                    )
                    if process.poll() is None:
                        return lives
                    assert process.returncode == -9
                finally:
                    process.terminate()
                    process.wait(30)

    lives = asyncio.run(main())
    assert states(db) == ["stored", "rejected", "stored", "stored"]
    assert set(fake.stored) == {codec.uid(u) for u in (first, behind, last)}
    assert lives == 4, "once with the others, twice alone, then it is parked"
    assert "the sidecar ended 2 times" in db.value("SELECT last_error FROM sync_items WHERE id = 2")
    db.close()
