"""Messages of the KServe v2 protocol: against Google's protobuf, against damage, and what counts as the same model."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.infer import endpoint_load, kserve_json, kserve_proto, local_load
from dicomnode.infer.endpoint_load import LatencyLoad, triton_load
from dicomnode.infer.kserve_tensors import (
    Signature,
    Tensor,
    TensorSpec,
    checked_outputs,
    input_problem,
    misfit,
    onnx_signature,
    output_shapes,
    reply_bytes,
)
from dicomnode.infer.local_load import LoadOfOthers, share_of_others
from tests.infer.infer_case import MODEL
from tests.infer.kserve_double import MESSAGES

ONNX = (MODEL / "model.onnx").read_bytes()
CT_LUNG = Signature(
    (TensorSpec("hu", "FP32", ("slices", 1, "rows", "columns")),),
    (TensorSpec("air", "UINT8", ("slices", 1, "rows", "columns")),),
)
HU = np.zeros((2, 1, 3, 5), np.float32)

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)
arrays = shapes.flatmap(
    lambda shape: st.sampled_from([np.float32, np.uint8, np.int64, np.float16]).map(
        lambda dtype: np.arange(int(np.prod(shape)), dtype=np.float64).astype(dtype).reshape(shape)
    )
)
names = st.text("abc_1", min_size=1, max_size=5)
tensors = st.dictionaries(names, arrays, min_size=1, max_size=3)


def test_the_signature_of_an_onnx_file() -> None:
    assert onnx_signature(ONNX) == CT_LUNG
    for damaged in (b"", b"not a model", ONNX[:40]):
        with pytest.raises(ValueError):
            onnx_signature(damaged)


@given(names, st.sampled_from(["", "1", "1.0.0"]), tensors, st.lists(names, max_size=3, unique=True))
def test_a_grpc_request_is_what_googles_protobuf_reads(
    model: str, version: str, inputs: dict[str, np.ndarray], outputs: list[str]
) -> None:
    read = MESSAGES["ModelInferRequest"].FromString(kserve_proto.infer_request(model, version, inputs, outputs))
    assert (read.model_name, read.model_version, read.id) == (model, version, "")
    assert [o.name for o in read.outputs] == outputs
    for entry, raw, (name, array) in zip(read.inputs, read.raw_input_contents, inputs.items(), strict=True):
        assert entry.name == name and list(entry.shape) == list(array.shape)
        assert raw == array.tobytes()


@given(tensors)
def test_a_grpc_reply_by_googles_protobuf_is_read(outputs: dict[str, np.ndarray]) -> None:
    made = MESSAGES["ModelInferResponse"](model_name="m", model_version="7", id="x")
    for name, array in outputs.items():
        made.outputs.add(name=name, datatype="FP32", shape=array.shape)
        made.raw_output_contents.append(array.tobytes())
    read = kserve_proto.infer_reply(made.SerializeToString())
    assert (read.model, read.version) == ("m", "7")
    assert [(t.name, t.shape, bytes(t.data)) for t in read.outputs] == [
        (name, array.shape, array.tobytes()) for name, array in outputs.items()
    ]


def test_grpc_metadata_with_free_dimensions() -> None:
    made = MESSAGES["ModelMetadataResponse"](name="m", versions=["1"], platform="x")
    made.inputs.add(name="hu", datatype="FP32", shape=[-1, 1, -1, -1])
    made.outputs.add(name="air", datatype="UINT8", shape=[-1, 1, 512, 512])
    read = kserve_proto.model_metadata(made.SerializeToString())
    assert read.inputs == (TensorSpec("hu", "FP32", (-1, 1, -1, -1)),)
    assert read.outputs[0].shape == (-1, 1, 512, 512)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_readers_do_anything_but_refuse(data: bytes) -> None:
    for read in (
        kserve_proto.infer_reply,
        kserve_proto.model_metadata,
        kserve_proto.is_true,
        kserve_proto.server_name,
        kserve_json.model_metadata,
        kserve_json.server_name,
        onnx_signature,
        lambda d: kserve_json.infer_reply(memoryview(d), len(d) // 2),
    ):
        with contextlib.suppress(ValueError):
            read(data)
    assert isinstance(kserve_json.error_text(data), str)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["outputs", "inputs", "name", "shape", "datatype", "parameters", "binary_data_size"]),
            inner,
            max_size=4,
        )
    ),
)


@given(json_values, st.binary(max_size=8))
def test_no_json_makes_the_readers_do_anything_but_refuse(value: object, rest: bytes) -> None:
    for data in (value, {"outputs": value}, {"outputs": [value]}):
        header = json.dumps(data).encode()
        with contextlib.suppress(ValueError):
            kserve_json.infer_reply(memoryview(header + rest), len(header))
        with contextlib.suppress(ValueError):
            kserve_json.model_metadata(header)


@given(tensors)
def test_an_http_request_holds_what_a_reply_in_the_same_form_gives_back(inputs: dict[str, np.ndarray]) -> None:
    header, parts = kserve_json.infer_request(inputs, ["air"])
    assert b'"id"' not in header
    body = json.dumps({"outputs": json.loads(header)["inputs"]}).encode()
    whole = body + b"".join(parts)
    read = kserve_json.infer_reply(memoryview(whole), len(body))
    assert [(t.name, t.shape, bytes(t.data)) for t in read.outputs] == [
        (n, a.shape, a.tobytes()) for n, a in inputs.items()
    ]
    with pytest.raises(ValueError, match="follow"):
        kserve_json.infer_reply(memoryview(whole + b"x"), len(body))


def served(**change: object) -> Signature:
    there = Signature((TensorSpec("hu", "FP32", (-1, 1, -1, -1)),), (TensorSpec("air", "UINT8", (-1, 1, -1, -1)),))
    return replace(there, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"outputs": (*served().outputs, TensorSpec("more", "FP32", (1,)))}, ""),
        ({"inputs": (TensorSpec("image", "FP32", (-1, 1, -1, -1)),)}, "further input image"),
        ({"inputs": ()}, "no input hu"),
        ({"outputs": ()}, "no output air"),
        ({"inputs": (TensorSpec("hu", "FP16", (-1, 1, -1, -1)),)}, "input hu is FP16"),
        ({"outputs": (TensorSpec("air", "UINT8", (-1, -1, -1)),)}, "3 dimensions"),
        ({"inputs": (TensorSpec("hu", "FP32", (-1, 1, 512, -1)),)}, "axis 2: 512 there, any size"),
        ({"inputs": (TensorSpec("hu", "FP32", (-1, 3, -1, -1)),)}, "axis 1: 3 there, 1"),
    ],
)
def test_whether_a_servers_model_is_the_bundles(change: dict[str, object], said: str) -> None:
    problem = misfit(CT_LUNG, served(**change))
    assert (said in problem) if said else problem == ""


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"hu": HU, "more": HU},
        {"hu": HU.astype(np.float64)},
        {"hu": HU.astype(complex)},
        {"hu": HU[:, 0]},
        {"hu": np.concatenate([HU, HU], axis=1)},
    ],
)
def test_inputs_that_are_not_the_models_are_not_sent(inputs: dict[str, np.ndarray]) -> None:
    assert input_problem(CT_LUNG, inputs)
    assert not input_problem(CT_LUNG, {"hu": HU})


def test_big_endian_arrays_are_not_taken_for_little_endian_ones() -> None:
    swapped = (HU + 1).astype(">f4")
    assert not input_problem(CT_LUNG, {"hu": swapped})
    _, parts = kserve_json.infer_request({"hu": swapped}, [])
    assert bytes(parts[0]) == swapped.astype("<f4").tobytes()
    sent = MESSAGES["ModelInferRequest"].FromString(kserve_proto.infer_request("m", "", {"hu": swapped}, []))
    assert sent.raw_input_contents[0] == swapped.astype("<f4").tobytes()


def test_the_size_of_a_reply_follows_from_the_shapes() -> None:
    assert output_shapes(CT_LUNG, {"hu": HU}) == {"air": (2, 1, 3, 5)}
    assert reply_bytes(CT_LUNG, {"hu": HU}) == 30
    open_ended = replace(CT_LUNG, outputs=(TensorSpec("air", "FP32", ("boxes", 6)),))
    assert output_shapes(open_ended, {"hu": HU}) == {"air": (None, 6)}
    assert 30 * 4 < reply_bytes(open_ended, {"hu": HU}) < 1 << 20


def tensor(**change: object) -> Tensor:
    return replace(Tensor("air", "UINT8", (2, 1, 3, 5), memoryview(bytes(30))), **change)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([tensor()], ""),
        ([tensor(), tensor(name="more", datatype="BYTES")], ""),
        ([], "no output air"),
        ([tensor(), tensor()], "twice"),
        ([tensor(datatype="FP32")], "is FP32"),
        ([tensor(shape=(2, 1, 5, 3))], "shape"),
        ([tensor(shape=(2, 1, 15))], "shape"),
        ([tensor(data=memoryview(bytes(29)))], "29 bytes"),
        ([tensor(data=None)], "binary tensor data"),
    ],
)
def test_outputs_are_what_was_asked_for_or_nothing(outputs: list[Tensor], said: str) -> None:
    found, problem = checked_outputs(CT_LUNG, {"hu": HU}, outputs)
    if said:
        assert said in problem and found == {}
    else:
        assert problem == "" and found["air"].flags.writeable and found["air"].shape == (2, 1, 3, 5)


def test_what_is_not_finite_or_not_truth_is_refused() -> None:
    floats = replace(CT_LUNG, outputs=(TensorSpec("p", "FP32", (2,)),))
    for bad in (np.nan, np.inf, -np.inf):
        data = memoryview(np.array([0, bad], np.float32).tobytes())
        assert "finite" in checked_outputs(floats, {"hu": HU}, [Tensor("p", "FP32", (2,), data)])[1]
    truths = replace(CT_LUNG, outputs=(TensorSpec("p", "BOOL", (2,)),))
    assert "BOOL" in checked_outputs(truths, {"hu": HU}, [Tensor("p", "BOOL", (2,), memoryview(b"\x00\x02"))])[1]


# Load


def test_load_by_latency_is_that_of_a_queue_and_fades() -> None:
    load = LatencyLoad()
    for second in range(10):
        load.record(("m", 1), 0.1, float(second))
    assert load.value(9.0) == pytest.approx(0.0, abs=1e-9)
    for second in range(10, 40):
        load.record(("m", 1), 1.0, float(second))
    assert load.value(39.0) > 0.88  # ten times as slow: 90 %
    assert load.value(39.0 + endpoint_load.HALF_LIFE_SECONDS) < 0.85  # and it is asked again
    assert load.value(1e6) == pytest.approx(0.0, abs=1e-6)


def test_jitter_of_small_requests_is_no_load() -> None:
    load = LatencyLoad()
    for second in range(20):
        load.record(("m", 1), 0.005 + 0.04 * (second % 2), float(second))
    assert load.value(19.0) == 0.0


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 100), st.floats(0, 1e4)), max_size=100))
def test_load_by_latency_stays_between_0_and_1(records: list[tuple[int, float, float]]) -> None:
    load = LatencyLoad()
    for key, seconds, now in records:
        load.record(key, seconds, now)
        assert 0 <= load.value(now) <= 1
    assert len(load._best) <= endpoint_load.MAX_KEYS


def test_load_by_tritons_metrics() -> None:
    text = (
        "# TYPE nv_gpu_utilization gauge\n"
        'nv_gpu_utilization{gpu_uuid="a"} 0.5\nnv_gpu_utilization{gpu_uuid="b"} 0.7\n'
        "# TYPE nv_inference_pending_request_count gauge\n"
        'nv_inference_pending_request_count{model="ct",version="1"} %d\n'
        'nv_inference_pending_request_count{model="other",version="1"} 99\n'
    )
    assert triton_load(text % 0, "ct") == pytest.approx(0.6)
    assert triton_load(text % 9, "ct") == pytest.approx(0.9)
    assert triton_load("", "ct") is None
    with pytest.raises(ValueError):
        triton_load("{{{{", "ct")


def test_load_of_this_box_is_what_others_use_of_it() -> None:
    assert share_of_others(busy=10, own=10, elapsed=5, cores=2) == 0
    assert share_of_others(busy=10, own=1, elapsed=5, cores=2) == pytest.approx(0.9)
    assert share_of_others(busy=10, own=11, elapsed=5, cores=2) == 0
    assert share_of_others(busy=10, own=1, elapsed=0, cores=2) == 0
    moments = iter([0.0, 0.5, 10.0])
    measured = LoadOfOthers(lambda: next(moments))
    first = measured.sample()
    assert 0 <= first <= 1 and 0 <= measured.sample() <= 1


def test_work_of_children_that_have_ended_is_no_load_of_others() -> None:
    """A decoder or a comparison takes its past with it when it ends; the load of that time was our own."""
    burn = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\nimport sys; sys.stdin.read()"
    before = local_load._cpu_seconds()[1]
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        alive = local_load._cpu_seconds()[1]
    ended = local_load._cpu_seconds()[1]
    assert before + 0.35 < alive <= ended + 0.05
