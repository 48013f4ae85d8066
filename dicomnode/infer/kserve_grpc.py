"""KServe v2 over gRPC, with grpcio (extra ``kserve``) and messages of our own (``kserve_proto``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from dicomnode import __version__
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import EngineError, OperatorError
from dicomnode.infer import kserve_proto as proto
from dicomnode.infer.engine import Array
from dicomnode.infer.kserve_tensors import Reply, Signature
from dicomnode.infer.kserve_transport import away, mismatch, read_token, shown, unusable

_PASSES = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"})
"""Codes that say 'not now'; INTERNAL and UNKNOWN are answers to this very request."""


class GrpcTransport:
    """See ``kserve_transport.Transport``.

    The size of a message is capped for a whole channel, so a channel is kept whose cap is
    the power of two above what the present reply may have, and replaced when that grows.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._grpc = _library()
        self._channel: Any = None
        self._cap = 0

    def ready(self, seconds: float) -> str:
        operation = "probe"
        if not self._is_true(self._call("ServerReady", b"", seconds, operation), operation):
            raise away(operation, self._endpoint.name, "says that it is not ready")
        try:
            return shown(proto.server_name(self._call("ServerMetadata", b"", seconds, operation)))
        except (ValueError, EngineError):
            return ""

    def model_ready(self, name: str, version: str, seconds: float) -> bool:
        operation = "probe model"
        try:
            return self._is_true(
                self._call("ModelReady", proto.name_version(name, version), seconds, operation), operation
            )
        except EngineError:
            return False

    def metadata(self, name: str, version: str, seconds: float) -> Signature:
        operation = "read model metadata"
        data = self._call("ModelMetadata", proto.name_version(name, version), seconds, operation)
        try:
            return proto.model_metadata(data)
        except ValueError as error:
            raise unusable(operation, self._endpoint.name, f"sent metadata that cannot be read ({error})") from None

    def infer(
        self, name: str, version: str, inputs: Mapping[str, Array], outputs: Sequence[str], *, limit: int
    ) -> Reply:
        operation = "run model"
        request = proto.infer_request(name, version, inputs, outputs)
        most = limit + proto.OVERHEAD_BYTES
        data = self._call("ModelInfer", request, self._endpoint.timeout_seconds, operation, most)
        if len(data) > most:
            raise unusable(operation, self._endpoint.name, f"sent more than the {limit} bytes that its reply can have")
        try:
            return proto.infer_reply(data)
        except ValueError as error:
            raise unusable(operation, self._endpoint.name, f"sent a reply that cannot be read ({error})") from None

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _is_true(self, data: bytes, operation: str) -> bool:
        try:
            return proto.is_true(data)
        except ValueError as error:
            raise unusable(operation, self._endpoint.name, f"sent a reply that cannot be read ({error})") from None

    def _call(
        self, method: str, request: bytes, seconds: float, operation: str, limit: int = proto.OVERHEAD_BYTES
    ) -> bytes:
        token = read_token(self._endpoint.token_file)
        metadata = [("authorization", f"Bearer {token}")] if token else []
        call = self._open(limit).unary_unary(proto.SERVICE + method)
        try:
            answer: bytes = call(request, timeout=seconds, metadata=metadata)
        except self._grpc.RpcError as error:
            raise self._refused(error.code().name, str(error.details() or ""), seconds, operation) from None
        return answer

    def _refused(self, code: str, details: str, seconds: float, operation: str) -> Exception:
        name, said = self._endpoint.name, shown(details)
        if code == "RESOURCE_EXHAUSTED" and "larger than max" in details.lower():
            return unusable(operation, name, "sent more bytes than its reply can have")
        if code == "DEADLINE_EXCEEDED":
            return away(operation, name, f"did not answer within {seconds:g} s")
        if code in _PASSES:
            return away(operation, name, f"cannot be reached ({code})" if code == "UNAVAILABLE" else f"answered {code}")
        cause = f"answered {code}" + (f": {said}" if said else "")
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return unusable(operation, name, cause, "Check token_file of this endpoint")
        if code == "NOT_FOUND":
            return mismatch(operation, name, f"it does not have the model ({cause.removeprefix('answered ')})")
        if code == "UNIMPLEMENTED":
            return unusable(operation, name, "does not speak KServe v2 over gRPC", "Check the port of its url")
        return unusable(operation, name, cause, "See the server's log")

    def _open(self, limit: int) -> Any:
        if self._channel is not None and limit <= self._cap:
            return self._channel
        self.close()
        self._cap = max(1 << 20, 1 << (limit - 1).bit_length())
        options = [
            ("grpc.max_receive_message_length", self._cap),
            ("grpc.max_send_message_length", -1),
            ("grpc.primary_user_agent", f"dicomnode/{__version__}"),
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.min_reconnect_backoff_ms", int(1000 * self._endpoint.connect_seconds)),
            ("grpc.service_config_disable_resolution", 1),
        ]
        target = urlsplit(self._endpoint.url).netloc
        if self._endpoint.encrypted:
            credentials = self._grpc.ssl_channel_credentials(root_certificates=self._authorities())
            self._channel = self._grpc.secure_channel(target, credentials, options)
        else:
            self._channel = self._grpc.insecure_channel(target, options)
        return self._channel

    def _authorities(self) -> bytes | None:
        path = self._endpoint.ca_file
        try:
            return path.read_bytes() if path is not None else None
        except OSError as error:
            cause = error.strerror or "unreadable"
            raise OperatorError("read ca_file of an inference endpoint", cause, "Check the file") from None


def _library() -> Any:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would write lines of its own between those of the log
    try:
        import grpc
    except ImportError:
        hint = "Install dicomnode[kserve], or use the server's HTTP port"
        raise EngineError("open inference endpoint", "LIB_MISSING", "grpcio is not installed", hint) from None
    return grpc
