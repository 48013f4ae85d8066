"""The engine ``kserve`` against servers on loopback, over HTTP and gRPC, good and bad ones."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from aiohttp import web
from onnx import TensorProto, helper

from dicomnode import metrics
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import EngineError, NodeError, PeerAway
from dicomnode.infer.engine import ByName, Ok, Rejected
from dicomnode.infer.golden import open_model
from dicomnode.infer.kserve import KServe
from tests.certificates import Authority
from tests.infer.infer_case import MODEL
from tests.infer.kserve_double import GrpcDouble, HttpDouble, Model, reply, running
from tests.peers import free_port

ONNX = (MODEL / "model.onnx").read_bytes()
KEY = ("ct-lung", "1.0.0")
HU = np.full((2, 1, 8, 8), -900, np.float32)


def halves() -> bytes:
    """A network with a float output: y = x / 2."""
    shape = ["n", "m"]
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["half"], value=helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])),
            helper.make_node("Mul", ["x", "half"], ["y"]),
        ],
        "halves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(made))
    return made


@pytest.fixture(params=["http", "grpc"])
def double(request: pytest.FixtureRequest) -> Iterator[Any]:
    with running(request.param, {KEY: Model(ONNX)}) as server:
        yield server


@pytest.fixture
def http() -> Iterator[HttpDouble]:
    with running("http", {KEY: Model(ONNX)}) as server:
        yield server


@pytest.fixture
def engines() -> Iterator[Callable[..., KServe]]:
    made: list[KServe] = []

    def make(url: str, **keys: Any) -> KServe:
        made.append(KServe(Endpoint(name="gpu1", url=url, **{"timeout_seconds": 20, **keys})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def session(engine: KServe) -> Any:
    return engine.for_model(*KEY).load(ONNX)


def test_a_model_through_an_endpoint_gives_what_it_gives_here(double: Any, engines: Callable[..., KServe]) -> None:
    engine = engines(double.url)
    assert isinstance(engine, ByName) and engine.probe() == Ok() and engine.version == "double 1.0"
    model = open_model(MODEL, engine)  # the golden cases pass
    assert model.report.passed and model.report.engine == "kserve gpu1 (double 1.0)"
    outputs = model.session.run({"hu": HU})
    assert outputs["air"].dtype == np.uint8 and outputs["air"].all() and outputs["air"].flags.writeable
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.session.run({"hu": HU})


def test_only_tensors_are_sent(double: Any, engines: Callable[..., KServe]) -> None:
    """No UID, no request id, nothing of the patient's: headers and fields are these and no others."""
    session(engines(double.url)).run({"hu": HU})
    if isinstance(double, HttpDouble):
        method, path, headers = double.requests[-1]
        assert (method, path) == ("POST", "v2/models/ct-lung/versions/1.0.0/infer")
        assert set(headers) == {
            *("Host", "User-Agent", "Accept", "Accept-Encoding"),
            *("Content-Type", "Content-Length", "Inference-Header-Content-Length"),
        }
        assert double.headers[-1].keys() == {"inputs", "outputs"}
        assert double.headers[-1]["inputs"][0].keys() == {"name", "shape", "datatype", "parameters"}
    else:
        assert set(double.requests[-1][1]) <= {"user-agent"}
        sent = double.messages[-1]
        assert {f.name for f, _ in sent.ListFields()} == {
            *("model_name", "model_version", "inputs", "outputs", "raw_input_contents"),
        }


def test_the_model_may_have_another_name_there(double: Any, engines: Callable[..., KServe]) -> None:
    double.models["ct_lung", "3"] = double.models.pop(KEY)
    with pytest.raises(EngineError, match="model"):
        session(engines(double.url))
    engine = engines(double.url, models={"ct-lung@1.0.0": "ct_lung@3", "ct-lung": "other"})
    assert open_model(MODEL, engine).report.passed
    double.models["any", ""] = double.models["ct_lung", "3"]
    assert open_model(MODEL, engines(double.url, models={"ct-lung": "any@"})).report.passed


def test_another_model_under_the_name_is_found_out(double: Any, engines: Callable[..., KServe]) -> None:
    """By its metadata, or where those agree by the golden cases."""
    model = double.models[KEY]
    model.describe = lambda m: {**m, "outputs": [{**m["outputs"][0], "datatype": "FP32"}]}
    with pytest.raises(EngineError, match="output air is FP32") as caught:
        session(engines(double.url))
    assert caught.value.code == "MODEL_MISMATCH"
    model.describe = lambda m: m
    model.change = lambda outputs: {"air": np.roll(outputs["air"], 3, axis=-1)}
    with pytest.raises(EngineError) as caught:
        open_model(MODEL, engines(double.url))
    assert caught.value.code == "GOLDEN_MISMATCH"


def test_a_server_or_model_that_is_not_ready_passes(double: Any, engines: Callable[..., KServe]) -> None:
    double.models[KEY].ready = False
    with pytest.raises(PeerAway, match="not ready yet"):
        session(engines(double.url))
    double.healthy = False
    answer = engines(double.url).probe()
    assert isinstance(answer, Rejected) and answer.code == "ENDPOINT_AWAY"
    with pytest.raises(PeerAway):
        session(engines(double.url))


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there(scheme: str, engines: Callable[..., KServe]) -> None:
    engine = engines(f"{scheme}://127.0.0.1:{free_port()}")
    answer = engine.probe()
    assert isinstance(answer, Rejected) and answer.code == "ENDPOINT_AWAY" and "gpu1" in answer.text
    with pytest.raises(PeerAway) as caught:
        session(engine)
    assert caught.value.retryable


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_one_that_never_answers_is_left_at_the_deadline(scheme: str, engines: Callable[..., KServe]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = engines(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", connect_seconds=0.3)
        begin = time.monotonic()
        with pytest.raises(PeerAway, match=r"0\.3 s|UNAVAILABLE"):
            engine.transport.ready(0.3)
        assert time.monotonic() - begin < 5


def test_a_run_that_hangs_is_left_at_the_deadline(double: Any, engines: Callable[..., KServe]) -> None:
    """Also when the bytes keep dripping: the deadline is absolute."""
    engine = engines(double.url)
    opened = session(engine)  # with a busy machine's time
    engine.transport._endpoint = engine.endpoint.model_copy(update={"timeout_seconds": 0.5})  # type: ignore[attr-defined]
    release = threading.Event()

    async def drip(request: web.Request, good: web.Response) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Inference-Header-Content-Length": "20"})
        await answer.prepare(request)
        for _ in range(200):
            await answer.write(b" ")
            await asyncio.sleep(0.05)
        return answer

    def hang(context: Any, good: Any) -> Any:
        release.wait(10)
        return good

    double.script = [drip if isinstance(double, HttpDouble) else hang]
    begin = time.monotonic()
    with pytest.raises(PeerAway, match=r"within 0\.5 s"):
        opened.run({"hu": HU})
    assert time.monotonic() - begin < 4
    release.set()


# Wrong answers over HTTP


def half(request: web.Request, good: web.Response) -> web.StreamResponse:
    async def answer() -> web.StreamResponse:
        cut = web.StreamResponse(headers={**good.headers, "Content-Length": str(len(good.body))})
        await cut.prepare(request)
        await cut.write(good.body[: len(good.body) // 2])
        request.transport.close()
        return cut

    return answer()


def huge(request: web.Request, good: web.Response) -> Any:
    async def answer() -> web.StreamResponse:
        endless = web.StreamResponse(headers={"Inference-Header-Content-Length": "100"})
        await endless.prepare(request)
        try:
            for _ in range(4096):
                await endless.write(b"x" * 65536)
        finally:
            huge.written = True
        return endless

    return answer()


def dies(request: web.Request, good: web.Response) -> Any:
    request.transport.abort()
    return good


def outputs_of(good: web.Response) -> np.ndarray:
    return np.frombuffer(good.body[-128:], np.uint8).reshape(HU.shape)


def with_header(**keys: Any) -> Callable[[web.Request, web.Response], web.Response]:
    def answer(request: web.Request, good: web.Response) -> web.Response:
        return reply(*KEY, {"air": outputs_of(good)}, **keys)

    return answer


def raw(body: bytes, **headers: str) -> Callable[..., web.Response]:
    return lambda request, good: web.Response(
        body=body, headers={k.replace("_", "-"): v for k, v in headers.items()}, content_type="application/octet-stream"
    )


LENGTH = "Inference-Header-Content-Length"


@pytest.mark.parametrize(
    ("action", "kind", "said"),
    [
        (
            lambda r, g: web.Response(status=500, text=json.dumps({"error": "out of\nmemory"})),
            EngineError,
            "out of mem",
        ),
        (lambda r, g: web.Response(status=500, body=b"x" * (1 << 20)), EngineError, "HTTP 500"),
        (lambda r, g: web.Response(status=503), PeerAway, "HTTP 503"),
        (lambda r, g: web.Response(status=429), PeerAway, "HTTP 429"),
        (lambda r, g: web.Response(status=401), EngineError, "token_file"),
        (lambda r, g: web.Response(status=302, headers={"Location": "/elsewhere"}), EngineError, "Redirects"),
        (lambda r, g: web.Response(status=204), EngineError, "HTTP 204"),
        (half, PeerAway, "middle of its reply"),
        (huge, EngineError, "more than the"),
        (with_header(shape=[2, 1, 4, 16]), EngineError, "shape"),
        (with_header(shape=[2, 1, 8, -8]), EngineError, "shape"),
        (with_header(shape=[2, 1, 8, 1 << 62]), EngineError, "shape"),
        (with_header(datatype="FP32"), EngineError, "is FP32"),
        (with_header(datatype="BYTES"), EngineError, "BYTES"),
        (with_header(name="water"), EngineError, "no output air"),
        (with_header(parameters={"binary_data_size": 127}), EngineError, "cannot be read"),
        (with_header(parameters={"binary_data_size": 1 << 40}), EngineError, "cannot be read"),
        (with_header(parameters={"binary_data_size": True}), EngineError, "cannot be read"),
        (with_header(parameters={}, data=[0] * 128), EngineError, "cannot be read"),
        (raw(b"not json", **{LENGTH: "8"}), EngineError, "cannot be read"),
        (raw(b"[" * 5000, **{LENGTH: "5000"}), EngineError, "cannot be read"),
        (raw(b"{}", **{LENGTH: "99"}), EngineError, "cannot be read"),
        (raw(b"{}", **{LENGTH: "-1"}), EngineError, "wrong header length"),
        (raw(b"{}", Content_Encoding="gzip"), EngineError, "compressed"),
        (lambda r, g: reply("other", "1.0.0", {"air": outputs_of(g)}), EngineError, "model other"),
        (lambda r, g: reply("ct-lung", "2.0.0", {"air": outputs_of(g)}), EngineError, "version 2.0.0"),
    ],
)
def test_a_wrong_answer_over_http_is_an_error_and_the_next_right_one_is_taken(
    http: HttpDouble, engines: Callable[..., KServe], action: Any, kind: type[NodeError], said: str
) -> None:
    opened = session(engines(http.url))
    http.script = [action]
    with pytest.raises(kind) as caught:
        opened.run({"hu": HU})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert opened.run({"hu": HU})["air"].all()


def test_one_that_closes_a_kept_connection_is_asked_again_once(
    http: HttpDouble, engines: Callable[..., KServe]
) -> None:
    opened = session(engines(http.url))
    http.script = [dies]
    assert opened.run({"hu": HU})["air"].all()
    assert len(http.headers) == 2
    http.script = [dies, dies, None]
    with pytest.raises(PeerAway):
        opened.run({"hu": HU})
    assert len(http.headers) == 4, "twice in all, not more"


def test_the_reply_is_read_no_further_than_it_can_be(http: HttpDouble, engines: Callable[..., KServe]) -> None:
    huge.written = False
    opened = session(engines(http.url))
    http.script = [huge]
    begin = time.monotonic()
    with pytest.raises(EngineError, match="more than"):
        opened.run({"hu": HU})
    assert time.monotonic() - begin < 5


# Wrong answers over gRPC


def aborts(code: str) -> Callable[..., Any]:
    import grpc

    return lambda context, good: context.abort(getattr(grpc.StatusCode, code), "its reason")


def changed(**keys: Any) -> Callable[..., Any]:
    def answer(context: Any, good: Any) -> Any:
        for key, value in keys.items():
            if key == "shape":
                good.outputs[0].ClearField("shape")
                good.outputs[0].shape.extend(value)
            elif key == "raw":
                good.ClearField("raw_output_contents")
                good.raw_output_contents.extend(value)
            else:
                setattr(good.outputs[0], key, value)
        return good

    return answer


@pytest.mark.parametrize(
    ("action", "kind", "said"),
    [
        (aborts("INTERNAL"), EngineError, "INTERNAL: its reason"),
        (aborts("UNAVAILABLE"), PeerAway, "UNAVAILABLE"),
        (aborts("RESOURCE_EXHAUSTED"), PeerAway, "RESOURCE_EXHAUSTED"),
        (aborts("UNAUTHENTICATED"), EngineError, "token_file"),
        (aborts("NOT_FOUND"), EngineError, "does not have the model"),
        (aborts("UNIMPLEMENTED"), EngineError, "does not speak"),
        (changed(shape=[2, 1, 4, 16]), EngineError, "shape"),
        (changed(shape=[2, 1, 8, -8]), EngineError, "shape"),
        (changed(shape=[1] * 40), EngineError, "cannot be read"),
        (changed(datatype="FP32"), EngineError, "is FP32"),
        (changed(name="water"), EngineError, "no output air"),
        (changed(raw=[b"x"]), EngineError, "1 bytes"),
        (changed(raw=[b"x", b"y"]), EngineError, "cannot be read"),
        (changed(raw=[]), EngineError, "binary tensor data"),
        (changed(raw=[b"\0" * (3 << 20)]), EngineError, "more bytes|more than"),
        (lambda context, good: b"\xff" * 50, EngineError, "cannot be read"),
        (lambda context, good: good.SerializeToString()[:-5], EngineError, "cannot be read"),
    ],
)
def test_a_wrong_answer_over_grpc_is_an_error_and_the_next_right_one_is_taken(
    engines: Callable[..., KServe], action: Any, kind: type[NodeError], said: str
) -> None:
    with running("grpc", {KEY: Model(ONNX)}) as server:
        opened = session(engines(server.url))
        server.script = [action]
        with pytest.raises(kind) as caught:
            opened.run({"hu": HU})
        assert any(s in str(caught.value) for s in said.split("|"))
        assert opened.run({"hu": HU})["air"].all()


def test_a_server_that_dies_between_two_slabs_is_away(double: Any, engines: Callable[..., KServe]) -> None:
    opened = session(engines(double.url))
    assert opened.run({"hu": HU})["air"].all()
    double.stop()
    with pytest.raises(PeerAway):
        opened.run({"hu": HU})


def test_a_large_tensor_over_grpc_is_not_cut_by_its_default_limits(engines: Callable[..., KServe]) -> None:
    """grpcio takes 4 MiB by default, less than a slab's reply may have."""
    with running("grpc", {KEY: Model(ONNX)}) as server:
        opened = session(engines(server.url))
        large = np.full((5, 1, 1024, 1024), -900, np.float32)
        assert opened.run({"hu": large})["air"].shape == large.shape
        assert opened.run({"hu": HU})["air"].shape == HU.shape


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused(kind: str, bad: float, engines: Callable[..., KServe]) -> None:
    content = halves()
    with running(kind, {("halves", "1"): Model(content)}) as server:
        opened = engines(server.url).for_model("halves", "1").load(content)
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.testing.assert_array_equal(opened.run({"x": x})["y"], x / 2)
        server.models["halves", "1"].change = lambda outputs: {"y": np.where(x == 4, bad, outputs["y"])}
        with pytest.raises(EngineError, match="not finite"):
            opened.run({"x": x})


# Token, TLS


def test_the_token_goes_to_the_endpoint_and_is_read_anew(
    http: HttpDouble, engines: Callable[..., KServe], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    engine = engines(http.url, token_file=token, metrics_url=f"{http.url}/metrics")
    engine.probe()
    token.write_text("second")
    engine.probe()
    sent = [headers.get("Authorization") for _, path, headers in http.requests if path == "v2/health/ready"]
    assert sent == ["Bearer first", "Bearer second"]
    engine.load_of("ct-lung")
    assert "Authorization" not in http.requests[-1][2], "the metrics port is another one"
    token.write_text("two words")
    answer = engine.probe()
    assert isinstance(answer, Rejected) and "words" not in answer.text and "token" in answer.text


@pytest.mark.parametrize("kind", ["https", "grpcs"])
def test_tls_and_a_certificate_that_is_not_trusted(kind: str, engines: Callable[..., KServe], tmp_path: Path) -> None:
    issued = Authority(tmp_path / "ours", "pool").issue("gpu", ips=["127.0.0.1"])
    other = Authority(tmp_path / "theirs", "other")
    server: HttpDouble | GrpcDouble
    if kind == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*issued.files)
        server = HttpDouble({KEY: Model(ONNX)}, context)
    else:
        server = GrpcDouble({KEY: Model(ONNX)}, (issued.key_file.read_bytes(), issued.certificate_file.read_bytes()))
    server.start()
    try:
        assert server.url.startswith(f"{kind}://")
        token = tmp_path / "token"
        token.write_text("secret")
        trusting = engines(server.url, ca_file=tmp_path / "ours" / "pool.pem", token_file=token)
        assert session(trusting).run({"hu": HU})["air"].all()
        trusting.close()  # before the server, which would wait for the end of its TLS connection
        asked = len(server.requests)
        for ca_file in (other.ca_file, None):
            answer = engines(server.url, ca_file=ca_file, token_file=token).probe()
            assert isinstance(answer, Rejected)
        assert len(server.requests) == asked, "neither token nor tensor went to a server that was not known"
    finally:
        server.stop()


def test_load_by_metrics_and_by_latency(http: HttpDouble, engines: Callable[..., KServe]) -> None:
    http.metrics = "# TYPE nv_gpu_utilization gauge\nnv_gpu_utilization 0.95\n"
    engine = engines(http.url, metrics_url=f"{http.url}/metrics")
    assert engine.load_of("ct-lung") == pytest.approx(0.95)
    asked = len(http.requests)
    assert engine.load_of("ct-lung") == pytest.approx(0.95) and len(http.requests) == asked, "kept for a moment"
    unknown = engines(http.url, metrics_url=f"http://127.0.0.1:{free_port()}/metrics")
    assert unknown.load_of("ct-lung") == 0.0


def test_requests_are_counted(http: HttpDouble, engines: Callable[..., KServe]) -> None:
    def count(outcome: str) -> float:
        found = metrics.REGISTRY.get_sample_value(
            "dicomnode_inference_endpoint_requests_total", {"endpoint": "gpu1", "outcome": outcome}
        )
        return found or 0.0

    before = {o: count(o) for o in ("ok", "away", "error")}
    opened = session(engines(http.url))
    http.script = [None, lambda r, g: web.Response(status=503), lambda r, g: web.Response(status=500)]
    opened.run({"hu": HU})
    for error in (PeerAway, EngineError):
        with pytest.raises(error):
            opened.run({"hu": HU})
    assert {o: count(o) - before[o] for o in before} == {"ok": 1, "away": 1, "error": 1}


def test_grpc_without_its_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, engines: Callable[..., KServe]
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    answer = engines("grpc://127.0.0.1:1").probe()
    assert isinstance(answer, Rejected) and answer.code == "LIB_MISSING"
