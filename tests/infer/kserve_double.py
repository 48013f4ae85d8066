"""A small KServe v2 server over HTTP and gRPC, with onnxruntime behind it, that can misbehave.

It shares no code with the node: JSON by hand, protobuf by Google's runtime from descriptors
built here. Runs in threads of the test on loopback, on ports that the system chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from aiohttp import web

TYPES = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8, "INT64": np.int64, "BOOL": np.bool_}
NAMES = {np.dtype(v): k for k, v in TYPES.items()}
ORT = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(float16)": "FP16", "tensor(int64)": "INT64"}


class Model:
    """A served model; ``change`` may alter its outputs, ``describe`` its metadata."""

    def __init__(self, onnx: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self.change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda outputs: outputs
        self.ready = True
        self.describe: Callable[[dict[str, Any]], dict[str, Any]] = lambda metadata: metadata

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        def spec(value: Any) -> dict[str, Any]:
            shape = [d if isinstance(d, int) else -1 for d in value.shape]
            return {"name": value.name, "datatype": ORT[value.type], "shape": shape}

        return self.describe(
            {
                "name": name,
                "versions": [version],
                "platform": "onnxruntime_onnx",
                "inputs": [spec(v) for v in self.session.get_inputs()],
                "outputs": [spec(v) for v in self.session.get_outputs()],
            }
        )

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [o.name for o in self.session.get_outputs()]
        return self.change(dict(zip(names, self.session.run(names, inputs), strict=True)))


class HttpDouble:
    """``script`` is used up one entry per inference: None behaves well, a function answers in its place."""

    def __init__(self, models: dict[tuple[str, str], Model], tls: ssl.SSLContext | None = None) -> None:
        self.models = models
        self.tls = tls
        self.script: list[Any] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.headers: list[dict[str, Any]] = []
        self.metrics = ""
        self.healthy = True
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> HttpDouble:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def stop(self) -> None:
        """Everything is cut, as when the server dies."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _end(self) -> None:
        await self._runner.cleanup()
        for _ in range(5):  # connections that were cut, and failed handshakes, go some turns of the loop later
            await asyncio.sleep(0.01)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.requests.append((request.method, path, dict(request.headers)))
        if path == "v2/health/ready":
            return web.Response(status=200 if self.healthy else 503)
        if path == "v2":
            return web.json_response({"name": "double", "version": "1.0", "extensions": ["binary_tensor_data"]})
        if path == "metrics":
            return web.Response(text=self.metrics)
        parts = path.split("/")
        if parts[:2] != ["v2", "models"]:
            return web.Response(status=404)
        version = parts[4] if len(parts) > 4 and parts[3] == "versions" else ""
        model = self.models.get((parts[2], version))
        if model is None:
            return web.json_response({"error": f"Request for unknown model: '{parts[2]}' is not found"}, status=400)
        if parts[-1] == "ready":
            return web.Response(status=200 if model.ready else 400)
        if parts[-1] == "infer":
            return await self._infer(request, model, parts[2], version)
        return web.json_response(model.metadata(parts[2], version))

    async def _infer(self, request: web.Request, model: Model, name: str, version: str) -> web.StreamResponse:
        body = await request.read()
        assert len(body) == int(request.headers["Content-Length"]) and "Transfer-Encoding" not in request.headers
        length = int(request.headers["Inference-Header-Content-Length"])
        header = json.loads(body[:length])
        self.headers.append(header)
        action = self.script.pop(0) if self.script else None
        at, inputs = length, {}
        for entry in header["inputs"]:
            size = entry["parameters"]["binary_data_size"]
            data = np.frombuffer(body[at : at + size], TYPES[entry["datatype"]])
            inputs[entry["name"]] = data.reshape(entry["shape"])
            at += size
        assert at == len(body)
        outputs = await asyncio.to_thread(model.run, inputs)
        wanted = [o["name"] for o in header["outputs"] if o["parameters"]["binary_data"] is True]
        good = reply(name, version, {n: outputs[n] for n in wanted})
        if action is not None:
            answer = action(request, good)
            return await answer if asyncio.iscoroutine(answer) else answer
        return good


def reply(model: str, number: str, outputs: dict[str, np.ndarray], /, **change: Any) -> web.Response:
    """A whole reply; ``change`` replaces keys of each output's entry."""
    parts = [np.ascontiguousarray(v).tobytes() for v in outputs.values()]
    listed = [
        {
            "name": key,
            "datatype": NAMES[value.dtype],
            "shape": list(value.shape),
            "parameters": {"binary_data_size": len(part)},
            **change,
        }
        for (key, value), part in zip(outputs.items(), parts, strict=True)
    ]
    header = json.dumps({"model_name": model, "model_version": number, "outputs": listed}).encode()
    return web.Response(
        body=header + b"".join(parts),
        content_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(header))},
    )


# gRPC


def _messages() -> dict[str, Any]:
    """The messages of package inference, as Google's protobuf makes them from their descriptors."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    text, raw, integer, truth, nested = 9, 12, 3, 8, 11
    shapes: dict[str, list[tuple[str, int, int, bool, str]]] = {
        "ServerReadyResponse": [("ready", 1, truth, False, "")],
        "ServerMetadataResponse": [("name", 1, text, False, ""), ("version", 2, text, False, "")],
        "ModelReadyResponse": [("ready", 1, truth, False, "")],
        "ModelRequest": [("name", 1, text, False, ""), ("version", 2, text, False, "")],
        "TensorMetadata": [
            ("name", 1, text, False, ""),
            ("datatype", 2, text, False, ""),
            ("shape", 3, integer, True, ""),
        ],
        "ModelMetadataResponse": [
            ("name", 1, text, False, ""),
            ("versions", 2, text, True, ""),
            ("platform", 3, text, False, ""),
            ("inputs", 4, nested, True, "TensorMetadata"),
            ("outputs", 5, nested, True, "TensorMetadata"),
        ],
        "ModelInferRequest": [
            ("model_name", 1, text, False, ""),
            ("model_version", 2, text, False, ""),
            ("id", 3, text, False, ""),
            ("inputs", 5, nested, True, "TensorMetadata"),
            ("outputs", 6, nested, True, "TensorMetadata"),
            ("raw_input_contents", 7, raw, True, ""),
        ],
        "ModelInferResponse": [
            ("model_name", 1, text, False, ""),
            ("model_version", 2, text, False, ""),
            ("id", 3, text, False, ""),
            ("outputs", 5, nested, True, "TensorMetadata"),
            ("raw_output_contents", 6, raw, True, ""),
        ],
    }
    file = descriptor_pb2.FileDescriptorProto(name="double.proto", package="inference", syntax="proto3")
    for name, listed in shapes.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated, of in listed:
            made = message.field.add(name=field, number=number, type=kind, label=3 if repeated else 1)
            if of:
                made.type_name = f".inference.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{n}")) for n in shapes}


MESSAGES = _messages()


class GrpcDouble:
    """As ``HttpDouble``; a function in ``script`` gets the context and the good reply as a message."""

    def __init__(self, models: dict[tuple[str, str], Model], tls: tuple[bytes, bytes] | None = None) -> None:
        """``tls``: private key and certificate, PEM."""
        import grpc

        self.models = models
        self.script: list[Any] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.messages: list[Any] = []
        self.healthy = True
        self.stopping = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(4),
            options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        calls = ("ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
        handlers = {name: grpc.unary_unary_rpc_method_handler(getattr(self, f"_{name}")) for name in calls}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
        )
        self.tls = tls is not None
        if tls is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            credentials = grpc.ssl_server_credentials([tls])
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    def start(self) -> GrpcDouble:
        self._server.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._server.stop(None).wait(10)

    @property
    def url(self) -> str:
        return f"grpc{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def _note(self, name: str, context: Any) -> None:
        self.requests.append((name, dict(context.invocation_metadata())))

    def _ServerReady(self, request: bytes, context: Any) -> bytes:
        self._note("ServerReady", context)
        return MESSAGES["ServerReadyResponse"](ready=self.healthy).SerializeToString()

    def _ServerMetadata(self, request: bytes, context: Any) -> bytes:
        return MESSAGES["ServerMetadataResponse"](name="double", version="1.0").SerializeToString()

    def _model(self, request: bytes, context: Any) -> tuple[Model, Any]:
        import grpc

        asked = MESSAGES["ModelRequest"].FromString(request)
        model = self.models.get((asked.name, asked.version))
        if model is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model")
        return model, asked

    def _ModelReady(self, request: bytes, context: Any) -> bytes:
        model, _ = self._model(request, context)
        return MESSAGES["ModelReadyResponse"](ready=model.ready).SerializeToString()

    def _ModelMetadata(self, request: bytes, context: Any) -> bytes:
        model, asked = self._model(request, context)
        told = model.metadata(asked.name, asked.version)
        return MESSAGES["ModelMetadataResponse"](**told).SerializeToString()

    def _ModelInfer(self, request: bytes, context: Any) -> bytes:
        self._note("ModelInfer", context)
        asked = MESSAGES["ModelInferRequest"].FromString(request)
        self.messages.append(asked)
        model = self.models[asked.model_name, asked.model_version]
        inputs = {
            entry.name: np.frombuffer(raw, TYPES[entry.datatype]).reshape(entry.shape)
            for entry, raw in zip(asked.inputs, asked.raw_input_contents, strict=True)
        }
        outputs = model.run(inputs)
        good = MESSAGES["ModelInferResponse"](model_name=asked.model_name, model_version=asked.model_version)
        for wanted in asked.outputs:
            value = outputs[wanted.name]
            good.outputs.add(name=wanted.name, datatype=NAMES[value.dtype], shape=value.shape)
            good.raw_output_contents.append(np.ascontiguousarray(value).tobytes())
        action = self.script.pop(0) if self.script else None
        if action is not None:
            good = action(context, good)
        return good if isinstance(good, bytes) else good.SerializeToString()


@contextlib.contextmanager
def running(kind: str, models: dict[tuple[str, str], Model]) -> Iterator[Any]:
    double = (HttpDouble if kind == "http" else GrpcDouble)(models).start()
    try:
        yield double
    finally:
        double.stop()
