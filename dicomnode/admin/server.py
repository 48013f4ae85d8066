"""The admin server in a thread of its own, with an event loop of its own.

What the sidecar says to the cloud would otherwise take turns with the answers of the API, and would
have their short turns: a reply without an end kept from intake what it takes from nobody here.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from aiohttp import web, web_response

from dicomnode.admin.connection import Runner
from dicomnode.errors import OperatorError
from dicomnode.promptness import ask_for_short_turns
from dicomnode.settings import Settings

SHUTDOWN_SECONDS = 2.0
ANSWER_SECONDS = 10.0


class AdminServer:
    """Serves ``app`` (:func:`dicomnode.admin.application.make_app`) at ``http.host`` and ``http.port``."""

    def __init__(self, settings: Settings, app: web.Application) -> None:
        self._settings, self._app = settings, app
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._bound: Future[int] = Future()
        self.ended: Future[None] = Future()
        """Set when the thread is over: with what ended it, or with None after :meth:`stop`."""
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)

    async def start(self) -> int:
        """The port. Raises OperatorError when it cannot be had."""
        self._thread.start()
        return await asyncio.wrap_future(self._bound)

    async def answers(self) -> None:
        """Raises TimeoutError when its loop is stuck."""
        assert self._loop is not None
        turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)
        async with asyncio.timeout(ANSWER_SECONDS):
            await asyncio.wrap_future(turn)

    async def stop(self) -> None:
        """Close what is open, within seconds."""
        if self._loop is not None and not self.ended.done():
            self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join, 2 * SHUTDOWN_SECONDS)

    def _run(self) -> None:
        ask_for_short_turns()
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 it is raised where it is waited for
            self.ended.set_exception(error)
            if not self._bound.done():
                self._bound.set_exception(error)
        else:
            self.ended.set_result(None)

    async def _serve(self) -> None:
        # Also on answers that the parser gives, outside of the application.
        web_response.SERVER_SOFTWARE = "dicomnode"  # type: ignore[attr-defined]
        runner = Runner(self._app, access_log=None, keepalive_timeout=30.0, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        http = self._settings.http
        try:
            await web.TCPSite(runner, http.host, http.port).start()
            self._loop = asyncio.get_running_loop()
            self._bound.set_result(int(runner.addresses[0][1]))
            await self._stop.wait()
        except OSError as error:
            raise OperatorError(
                "start the HTTP server",
                f"{http.host} port {http.port}: {error.strerror}",
                "Choose another http.port, or stop the program that holds it",
            ) from error
        finally:
            await runner.cleanup()
