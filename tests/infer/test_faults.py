"""Errors of the device: what they mean, and what is tried next."""

from __future__ import annotations

import itertools

import pytest

from dicomnode.infer.faults import REMEDIES, STICKY, Fault, Remedy, classify, fault_of, leave_engine, remedy


def test_the_table_knows_every_case() -> None:
    assert set(REMEDIES) == set(itertools.product(Fault, (True, False), (True, False)))


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_order_of_the_remedies(shrink: bool, other: bool) -> None:
    """Smaller batch, other engine, later: a remedy that is there is never skipped for a later one."""
    oom = remedy("OOM", can_shrink=shrink, has_other=other)
    assert oom is (Remedy.smaller_batch if shrink else Remedy.other_engine if other else Remedy.later)
    for code in ("SHAPE", "RUN_FAILED", "BUILD_FAILED", "GOLDEN_MISMATCH", "anything"):
        assert remedy(code, can_shrink=shrink, has_other=other) is (Remedy.other_engine if other else Remedy.later)
    assert remedy("DEVICE_LOST", can_shrink=shrink, has_other=other) is Remedy.end_process


@pytest.mark.parametrize(
    ("text", "number", "fault"),
    [
        ("cuMemAlloc failed: out of memory", 0, Fault.oom),
        ("CUDA_ERROR_OUT_OF_MEMORY", 2, Fault.oom),
        ("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 8388608", 0, Fault.oom),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", 0, Fault.oom),
        ("CUDA failure 2: out of memory ; GPU=0", 0, Fault.oom),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", 0, Fault.lost),
        ("cuStreamSynchronize failed: an illegal memory access was encountered", 0, Fault.lost),
        ("Error Code 1: Cuda Runtime (unspecified launch failure)", 0, Fault.lost),
        ("cuEventRecord failed: uncorrectable ECC error encountered", 0, Fault.lost),
        ("", 719, Fault.lost),
        ("", 400, Fault.failed),
        ("CUDNN failure 3: CUDNN_STATUS_BAD_PARAM", 0, Fault.failed),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: x", 0, Fault.failed),
        ("Reshape node. Name:'r' input tensor cannot be reshaped", 0, Fault.failed),
    ],
)
def test_words_of_the_libraries(text: str, number: int, fault: Fault) -> None:
    assert classify(text, number) is fault


def test_codes() -> None:
    assert fault_of("OOM") is Fault.oom and fault_of("no such code") is Fault.failed
    assert 2 not in STICKY and 0 not in STICKY


def test_a_job_that_lost_the_device_starts_on_the_next_engine() -> None:
    told = "run model: DEVICE_LOST: CUDA error 700. See 'nvidia-smi'"
    assert leave_engine(2, told)
    assert not leave_engine(1, told)  # requeued by an operator: from the top
    assert not leave_engine(2, "run model: OOM: too little")
    assert not leave_engine(3, None)
