"""What the handlers of the API share: the limit of a listing, and an answer as JSON."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from dicomnode.errors import OperatorError

LIMIT_DEFAULT, LIMIT_MOST = 100, 1000


def limit_of(request: web.Request) -> int:
    """``limit`` of the query, 1 to 1000. Raises OperatorError."""
    try:
        limit = int(request.query.get("limit", LIMIT_DEFAULT))
    except ValueError:
        limit = 0
    if not 1 <= limit <= LIMIT_MOST:
        raise OperatorError("read query", "limit is not a number in range", f"Use 1 to {LIMIT_MOST}")
    return limit


def json_answer(value: Any) -> web.Response:
    """Text as it is, and what JSON does not know as its text."""
    body = json.dumps(value, ensure_ascii=False, default=str).encode()
    return web.Response(body=body, headers={"Content-Type": "application/json"})
