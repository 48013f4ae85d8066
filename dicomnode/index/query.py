"""Runs a plan of :mod:`dicomnode.index.matching` with a row limit, a deadline and cancellation.

Rows are read to the end before any is sent: a slow peer must not hold a read transaction
open, which would keep the write-ahead log from being folded back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import apsw

from dicomnode.errors import StorageError
from dicomnode.index.database import Database
from dicomnode.index.matching import Plan, Row

_STEPS = 20_000
"""Virtual machine instructions of SQLite between two looks at deadline and cancel: under a millisecond."""


class Ended(StrEnum):
    """Why a query stopped reading."""

    complete = "complete"
    limit = "limit"
    deadline = "deadline"
    cancelled = "cancelled"


@dataclass(frozen=True, slots=True)
class Found:
    rows: list[Row]
    ended: Ended


def run(
    db: Database, plan: Plan, *, limit: int, seconds: float, cancelled: Callable[[], bool] = lambda: False
) -> Found:
    """At most ``limit`` matching rows. Raises StorageError when the index cannot be read."""
    deadline = time.monotonic() + seconds
    stopped: list[Ended] = []

    def stop() -> bool:
        if cancelled():
            stopped.append(Ended.cancelled)
        elif time.monotonic() > deadline:
            stopped.append(Ended.deadline)
        return bool(stopped)

    connection = db.reader()  # looking for a cancel may serve a C-STORE, which writes
    rows: list[Row] = []
    cursor = connection.cursor()
    connection.set_progress_handler(stop, _STEPS)
    try:
        cursor.execute(plan.sql, plan.parameters)
        names: list[str] = []
        for number, values in enumerate(cursor):
            if not names:
                names = [d[0] for d in cursor.get_description()]
            row = dict(zip(names, values, strict=True))
            if plan.predicate(row):
                if len(rows) >= limit:
                    return Found(rows, Ended.limit)
                rows.append(row)
            if number % 256 == 0 and stop():
                break
    except apsw.InterruptError:
        pass
    except apsw.Error as error:
        raise StorageError("query the index", type(error).__name__, "Look at the volume of data_dir") from None
    finally:
        cursor.close(True)
        connection.set_progress_handler(None)
    return Found(rows, stopped[0] if stopped else Ended.complete)
