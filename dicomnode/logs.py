"""Structured logs on stderr: JSON with ECS-style names, or readable lines on a terminal.

Only fields on the allow-list pass, so that patient data cannot slip into a log by way of a
new field. UIDs are hashed: they identify a study to anyone with access to the PACS.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

ALLOWED = frozenset(
    (
        "event",
        "level",
        "timestamp",
        "process",
        "stage",
        "operation",
        "cause",
        "hint",
        "peer",
        "ae",
        "address",
        "port",
        "job",
        "delivery",
        "model",
        "version",
        "engine",
        "state",
        "attempts",
        "seconds",
        "service",
        "count",
        "read_ahead",
        "batch_studies",
        "bytes",
        "status",
        "reason",
        "result",
        "source",
        "rule",
        "revision",
        "series",
        "study",
        "instance",
        "signal",
        "pid",
        "exit",
        "error",
        "kind",
        "url",
        "path",
        "name",
        "digest",
        "destination",
        "free_mb",
        "code",
        "deadline",
        "limit",
        "association",
        "sop_class",
        "transfer_syntax",
        "key",
        "priority",
        "worker",
        "retry_in",
        "exc_type",
        "frames",
        "failed",
        "missing",
    )
)


def uid_hash(uid: str) -> str:
    """Short stable pseudonym of a UID for logs."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]


def fault(error: BaseException) -> str:
    """Type and places of an exception, innermost last; neither its message nor any value."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
    return f"{type(error).__name__} at {places}"


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """In place of a traceback on stderr, which quotes values."""
    if failed.exc_value is not None and failed.exc_type is not SystemExit:
        get().error("thread ended", exc_type=fault(failed.exc_value), name=failed.thread.name if failed.thread else "")


def _allow_listed(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    dropped = [key for key in event if key not in ALLOWED and not key.startswith("_")]
    for key in dropped:
        del event[key]
    return event


def _ecs(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    out: dict[str, Any] = {
        "@timestamp": event.pop("timestamp", None),
        "log.level": event.pop("level", "info"),
        "message": event.pop("event", ""),
        "process.name": event.pop("process", "dicomnode"),
    }
    out.update({f"dicomnode.{key}": value for key, value in event.items()})
    return out


def configure(process: str, level: str = "info", style: str = "auto") -> None:
    """Set up logging for this process. ``style``: ``auto``, ``json`` or ``console``."""
    console = style == "console" or (style == "auto" and sys.stderr.isatty())

    def name_process(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    shared: list[Any] = [
        name_process,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _allow_listed,
    ]
    tail: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
        if console
        else [_ecs, structlog.processors.JSONRenderer(default=str, ensure_ascii=False)]
    )
    structlog.configure(
        processors=shared + tail,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    threading.excepthook = _thread_failed
    # Libraries: pynetdicom logs identifiers and addresses of its own; only its silence is safe.
    logging.basicConfig(stream=sys.stderr, level=logging.CRITICAL, force=True)
    for name in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def set_level(level: str) -> None:
    """From now on, in this process; the loggers that were got before follow."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()])
    )


def get() -> Any:
    """The logger of this process."""
    return structlog.get_logger()
