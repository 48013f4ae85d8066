"""The node's end of config/cloud-api.yaml: every request that it makes, held against the description."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.sync.node_record import describe_node
from tests.cloud import endpoint as served
from tests.cloud.test_description import OPERATIONS
from tests.sync.index_case import add_results
from tests.sync.test_records import Cloud, Node, nodes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Exchange:
    method: str
    path: str
    query: dict[str, str]
    body: bytes
    status: int


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """What the endpoint was asked, and how it answered."""
    found: list[Exchange] = []
    make_app = served.make_app

    @web.middleware
    async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
        json_body = request.content_type == "application/json"
        body = await request.read() if json_body else b""
        answer = await handler(request)
        if request.headers.get("User-Agent", "").startswith("dicomnode/"):
            found.append(Exchange(request.method, request.path, dict(request.query), body, answer.status))
        return answer

    def app(*arguments: Any) -> web.Application:
        made = make_app(*arguments)
        made.middlewares.insert(0, noted)
        return made

    monkeypatch.setattr(served, "make_app", app)
    return found


def operation(one: Exchange) -> Any:
    for made in OPERATIONS.values():
        pattern = re.sub(r"\{\w+\}", "[^/]+", made.path)
        if made.method.upper() == one.method and re.fullmatch(pattern, one.path):
            return made
    raise AssertionError(f"{one.method} {one.path} is not described")


def test_every_request_of_the_node_is_as_described(tmp_path: Path, exchanges: list[Exchange]) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 2, conflicts={"preferences": "review"}) as parts:
            cloud: Cloud = parts[0]
            one: Node = parts[1]
            two: Node = parts[2]
            add_results(one.db, one.settings.node.data_dir, cloud=one.settings.cloud_plan)
            describe_node(one.settings, one.db)
            for node in (one, two):
                node.set("preferences", "dashboard", refresh_seconds=5 if node is one else 6)
                node.set("limits", "warnings", open_reviews=5 if node is one else 6)
            for node in (one, two, one, two):
                await node.endpoints.probe()
                await node.exchange()
            two.reviews.decide(1, "edge", who="cli:anna")
            await two.exchange()
            assert cloud.open() == []

    asyncio.run(main())
    described = [e for e in exchanges if not e.path.startswith("/studies")]
    asked = set()
    for one in described:
        made = operation(one)
        asked.add(made.label)
        assert str(one.status) in made.definition.raw["responses"], f"{made.label} answered {one.status}"
        if one.body:
            [body] = list(made.body)
            body.validate(json.loads(one.body))
        known = {p.name: p for p in made.query}
        for name, value in one.query.items():
            known[name].validate(int(value) if value.isdigit() else value)
    assert asked == {"POST /v1/records", "GET /v1/records", "GET /health"}
    settles = [r for e in described if e.body for r in json.loads(e.body)["records"] if r["settles"]]
    assert settles and all(r["base_key"] for r in settles)


def test_a_request_that_is_not_as_described_is_found() -> None:
    [body] = list(OPERATIONS["POST /v1/records"].body)
    with pytest.raises(Exception, match="node"):
        body.validate({"records": []})
