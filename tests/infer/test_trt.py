"""TensorRT on the fake: overlap, graphs, profiles, refusals, memory, cache, crashes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from dicomnode import metrics
from dicomnode.errors import EngineError
from dicomnode.infer.cuda import CudaError, Device
from dicomnode.infer.engine import Limits, Ok, Rejected
from dicomnode.infer.isolated import inline
from dicomnode.infer.onnxshape import onnx_inputs, profile_ranges
from dicomnode.infer.plans import MAX_TRIES
from dicomnode.infer.trt import TensorRt, missing_here
from dicomnode.infer.trt_build import Toolkit, least_capability
from tests.infer.fake_cuda import FakeCuda
from tests.infer.fake_trt import FakeTrt, open_fake, open_segfault
from tests.infer.test_engines_contract import ONNX, fake_tensorrt, hu, reference

FAILS = ONNX + b"\x32\x05fails"


def counted(name: str, **labels: str) -> float:
    registry: CollectorRegistry = metrics.REGISTRY
    return registry.get_sample_value(name, labels) or 0.0


def cache_counts() -> dict[str, float]:
    return {
        o: counted("dicomnode_inference_plan_cache_total", outcome=o) for o in ("hit", "miss", "rejected")
    }  # fmt: skip


def test_two_slots_overlap_and_no_more_is_in_flight(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    taken = 0

    def batches():
        nonlocal taken
        for n in range(6):
            taken += 1
            yield {"hu": hu(n, 4, 1, 16, 16)}

    ahead = []
    for n, out in enumerate(session.stream(batches())):
        ahead.append(taken - n)
        np.testing.assert_array_equal(out["air"], reference(hu(n, 4, 1, 16, 16)))
    assert max(ahead) == 3  # one is yielded, two are in flight
    assert len({stream for stream, _ in trt.executed}) == 2
    assert trt.cuda.balanced
    session.close()
    assert not trt.cuda.blocks and not trt.cuda.hosts and not trt.cuda.graphs and not trt.cuda.events


class Once(dict[str, CudaError]):
    """Faults of calls that pass with the first."""

    def __getitem__(self, call: str) -> CudaError:
        return self.pop(call)


@pytest.mark.parametrize("fault", ["elapsed", "synchronise"])
def test_a_batch_that_fails_to_land_between_two_of_another_stream_fails_its_own(tmp_path: Path, fault: str) -> None:
    """A more urgent job needs the slots of the one that it goes before, and lands that one's batches."""
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    outer = session.stream({"hu": hu(n, 4, 1, 16, 16)} for n in range(5))
    np.testing.assert_array_equal(next(outer)["air"], reference(hu(0, 4, 1, 16, 16)))
    trt.cuda.fail = Once({fault: CudaError("time a batch", 719, "unspecified launch failure")})
    urgent = [hu(20 + n, 2, 1, 32, 16) for n in range(3)]
    for batch, out in zip(urgent, session.stream({"hu": b} for b in urgent), strict=True):
        np.testing.assert_array_equal(out["air"], reference(batch))
    assert not trt.cuda.fail, "it was met"
    with pytest.raises(EngineError, match="unspecified launch failure") as caught:
        next(outer)
    assert caught.value.code == "DEVICE_LOST"
    after = hu(9, 4, 1, 16, 16)
    np.testing.assert_array_equal(session.run({"hu": after})["air"], reference(after))
    session.close()


def test_an_urgent_batch_that_cannot_be_started_takes_nothing_from_the_stream_around_it(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    for number, out in enumerate(session.stream({"hu": hu(n, 4, 1, 16, 16)} for n in range(5))):
        np.testing.assert_array_equal(out["air"], reference(hu(number, 4, 1, 16, 16)))
        trt.faults.execute = True
        with pytest.raises(EngineError, match="did not start"):
            session.run({"hu": hu(20, 2, 1, 32, 16)})
        trt.faults.execute = False
    assert number == 4
    session.close()


def test_batches_before_one_that_cannot_be_started_come_in_order_and_none_is_begun_after_it(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    taken: list[int] = []

    def batches():
        for n in range(6):
            taken.append(n)
            trt.faults.address = n == 3
            yield {"hu": hu(n, 4, 1, 16, 16 + 8 * n)}

    found = session.stream(batches())
    for n in range(3):
        np.testing.assert_array_equal(next(found)["air"], reference(hu(n, 4, 1, 16, 16 + 8 * n)))
    with pytest.raises(EngineError, match="refuses the address"):
        next(found)
    assert taken == [0, 1, 2, 3]
    trt.faults.address = False
    np.testing.assert_array_equal(session.run({"hu": hu(8, 2, 1, 16, 16)})["air"], reference(hu(8, 2, 1, 16, 16)))


def test_graph_is_captured_on_the_second_run_and_again_for_another_shape(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    for _ in range(2):  # one slot when batches come one by one
        session.run({"hu": hu(1, 4, 1, 16, 16)})
    assert (trt.cuda.calls["begin_capture"], trt.cuda.calls["launch"]) == (1, 1)
    session.run({"hu": hu(2, 4, 1, 16, 16)})
    assert (trt.cuda.calls["begin_capture"], trt.cuda.calls["launch"]) == (1, 2)
    for n in range(3):
        batch = hu(n, 2, 1, 32, 16)
        np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))
    assert (trt.cuda.calls["begin_capture"], trt.cuda.calls["launch"]) == (2, 4)
    assert len(trt.cuda.graphs) == 1  # that of the other shape was released


def test_what_cannot_be_captured_runs_without_a_graph(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    trt.faults.execute_in_capture = True
    session = engine.load(ONNX)
    for n in range(4):
        batch = hu(n, 2, 1, 16, 16)
        np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))
    assert trt.cuda.calls["begin_capture"] == 1 and not trt.cuda.graphs


@pytest.mark.parametrize(("fault", "code"), [("execute", "RUN_FAILED"), ("shape", "SHAPE"), ("address", "RUN_FAILED")])
def test_false_is_an_error_and_the_next_batch_is_right(tmp_path: Path, fault: str, code: str) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    session.run({"hu": hu(1, 2, 1, 16, 16)})
    setattr(trt.faults, fault, True)
    with pytest.raises(EngineError) as caught:
        session.run({"hu": hu(2, 4, 1, 16, 16)})
    assert caught.value.code == code
    setattr(trt.faults, fault, False)
    batch = hu(3, 4, 1, 16, 16)
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))


@pytest.mark.parametrize(
    ("fault", "value", "code", "words"),
    [
        ("parse", True, "BUILD_FAILED", "no importer for operator Strange"),
        ("build", "Could not find any implementation for node", "BUILD_FAILED", "Could not find any implementation"),
        ("build", "Requested amount of GPU memory could not be allocated: out of memory", "OOM", "out of memory"),
        ("profile", True, "BUILD_FAILED", "range of shapes"),
        ("deserialize", True, "BUILD_FAILED", "magic tag"),
        ("context", True, "BUILD_FAILED", "cannot be used"),
    ],
)
def test_none_and_false_while_building(tmp_path: Path, fault: str, value: object, code: str, words: str) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    setattr(trt.faults, fault, value)
    with pytest.raises(EngineError, match=words) as caught:
        engine.build(ONNX, "fp32")
    assert caught.value.code == code
    assert not list((tmp_path / "engines").glob("*.plan"))  # only what could be used once is kept


def test_a_shape_outside_the_profile_is_refused_by_us(tmp_path: Path) -> None:
    session = fake_tensorrt(tmp_path)[0].load(ONNX)
    with pytest.raises(EngineError, match="outside") as caught:
        session.run({"hu": hu(1, 2, 1, 16, 1032)})
    assert caught.value.code == "SHAPE"


def test_sticky_error_is_told_as_lost(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    trt.cuda.fail["synchronise"] = CudaError("synchronise stream", 700, "an illegal memory access was encountered")
    with pytest.raises(EngineError) as caught:
        session.run({"hu": hu(1, 2, 1, 16, 16)})
    assert caught.value.code == "DEVICE_LOST"
    session.close()  # must not raise: there is nothing left to release


def test_share_of_memory_is_kept(tmp_path: Path) -> None:
    small = Device("Tesla T4", (7, 5), 40, 4 << 20, "550")
    trt = FakeTrt(cuda=FakeCuda(small), device_memory=1 << 20)
    engine = TensorRt(
        tmp_path,
        Limits(max_batch=8, gpu_memory_share=0.5),
        open_tools=lambda: Toolkit(trt, trt.cuda),
        run_child=inline,
        missing=lambda: None,
    )
    session = engine.load(ONNX)  # 2 MiB are ours: one context takes half, the second would leave nothing
    batch = hu(1, 2, 1, 64, 64)
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))
    with pytest.raises(EngineError) as caught:
        session.run({"hu": hu(1, 8, 1, 512, 512)})
    assert caught.value.code == "OOM"
    trt.device_memory = 3 << 20
    with pytest.raises(EngineError) as caught:
        engine.load(ONNX)
    assert caught.value.code == "OOM"


def test_memory_that_was_not_had_is_not_counted_as_taken(tmp_path: Path) -> None:
    """Batches are halved after OOM: a budget that shrinks each time would leave none in the end."""
    engine, trt = fake_tensorrt(tmp_path)
    session = engine.load(ONNX)
    assert engine._budget is not None
    before, batch = engine._budget.left, hu(1, 8, 1, 256, 256)
    for call in ("allocate", "pinned"):
        trt.cuda.fail[call] = CudaError("allocate device memory", 2, "out of memory")
        for _ in range(3):
            with pytest.raises(EngineError) as caught:
                session.run({"hu": batch})
            assert caught.value.code == "OOM" and engine._budget.left == before
        del trt.cuda.fail[call]
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))
    used = before - engine._budget.left
    assert used >= batch.nbytes
    session.run({"hu": hu(1, 8, 1, 512, 512)})
    assert before - engine._budget.left == 4 * used, "buffers that grow take the difference"


def test_sessions_share_what_the_node_may_take_and_give_it_back(tmp_path: Path) -> None:
    small = Device("Tesla T4", (7, 5), 40, 8 << 20, "550")
    trt = FakeTrt(cuda=FakeCuda(small), device_memory=1 << 20)
    engine = TensorRt(
        tmp_path,
        Limits(max_batch=8, gpu_memory_share=0.5),
        open_tools=lambda: Toolkit(trt, trt.cuda),
        run_child=inline,
        missing=lambda: None,
    )
    for _ in range(5):  # what a closed one had can be had again
        session = engine.load(ONNX)
        session.run({"hu": hu(1, 2, 1, 64, 64)})
        session.close()
    both = [engine.load(ONNX), engine.load(ONNX)]
    with pytest.raises(EngineError, match="share of this node") as caught:
        engine.load(ONNX)
    assert caught.value.code == "OOM"
    for session in both:
        session.close()
    engine.load(ONNX).close()
    assert engine._budget is not None and engine._budget.left == 4 << 20


def test_only_api_that_each_version_has(tmp_path: Path) -> None:
    for version, flags, config in (("8.6.0", 1, [0, 12]), ("10.4.0", 2, []), ("11.3.0", 2, [])):
        engine, trt = fake_tensorrt(tmp_path / version, version)
        shares: list[float] = []
        engine.build(ONNX, "fp16", lambda what, share, shares=shares: shares.append(share))
        assert (trt.builds[0]["flags"], trt.builds[0]["config"]) == (flags, config), version
        assert shares == sorted(shares) and shares[-1] == 1.0
        assert trt.builds[0]["workspace"] == int(0.8 * (16 << 30)) // 2


def test_plan_and_timing_cache_are_used_again(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    assert not engine.built(ONNX, "fp32")
    before = cache_counts()
    engine.load(ONNX).close()
    assert engine.built(ONNX, "fp32") and not engine.built(ONNX, "fp16")
    again, other = fake_tensorrt(tmp_path)  # the next start
    again.load(ONNX).close()
    assert len(trt.builds) == 1 and not other.builds
    after = cache_counts()
    assert (after["miss"] - before["miss"], after["hit"] - before["hit"]) == (1, 2)
    engine.build(ONNX, "fp16")
    assert trt.builds[-1]["timings"] == b"timings"
    assert (tmp_path / "engines").stat().st_mode & 0o777 == 0o700


def _damage(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    data[-20] ^= 1
    plan.write_bytes(bytes(data))


def _forge(plan: Path) -> None:
    """Another plan with a hash that fits, for another key."""
    meta = plan.with_suffix(".json")
    content = json.loads(meta.read_text())
    content["key"]["gpu"] = "Tesla V100"
    meta.write_text(json.dumps(content))


def _open_to_all(plan: Path) -> None:
    plan.chmod(0o666)


def _link(plan: Path) -> None:
    target = plan.with_name("elsewhere")
    plan.rename(target)
    plan.symlink_to(target)


@pytest.mark.parametrize("attack", [_damage, _forge, _open_to_all, _link])
def test_a_plan_that_cannot_be_trusted_is_counted_and_built_again(tmp_path: Path, attack) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    engine.build(ONNX, "fp32")
    (plan,) = (tmp_path / "engines").glob("*.plan")
    attack(plan)
    before = cache_counts()
    with pytest.raises(EngineError, match="no plan that can be used") as caught:
        engine.load(ONNX, build=False)
    assert caught.value.code == "NOT_BUILT" and not engine.built(ONNX, "fp32")
    session = engine.load(ONNX)
    assert cache_counts()["rejected"] - before["rejected"] == 1
    assert len(trt.builds) == 2
    batch = hu(1, 2, 1, 16, 16)
    np.testing.assert_array_equal(session.run({"hu": batch})["air"], reference(batch))


def test_a_plan_that_tensorrt_refuses_is_counted_and_built_again(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    engine.build(ONNX, "fp32")
    key = engine._key(ONNX, "fp32")
    engine._store.store(key, b"a plan of another build of the same version")
    before = cache_counts()
    engine.load(ONNX).close()
    assert cache_counts()["rejected"] - before["rejected"] == 1 and len(trt.builds) == 2


def test_the_key_names_everything_that_a_plan_depends_on(tmp_path: Path) -> None:
    first = fake_tensorrt(tmp_path)[0]._key(ONNX, "fp32")
    others = [
        fake_tensorrt(tmp_path)[0]._key(ONNX, "fp16"),
        fake_tensorrt(tmp_path)[0]._key(ONNX + b"\x32\x01x", "fp32"),
        fake_tensorrt(tmp_path, "10.4.1")[0]._key(ONNX, "fp32"),
        *(
            fake_tensorrt(tmp_path, cuda=FakeCuda(device))[0]._key(ONNX, "fp32")
            for device in (
                Device("Tesla V100", (7, 5), 40, 16 << 30, "550.54 CUDA 12.4"),
                Device("Tesla T4", (8, 0), 40, 16 << 30, "550.54 CUDA 12.4"),
                Device("Tesla T4", (7, 5), 20, 16 << 30, "550.54 CUDA 12.4"),
                Device("Tesla T4", (7, 5), 40, 16 << 30, "560 CUDA 12.6"),
            )
        ),
    ]
    assert len({key.digest for key in (first, *others)}) == 1 + len(others)
    assert first.digest == fake_tensorrt(tmp_path)[0]._key(ONNX, "fp32").digest


def test_probe_in_a_child_and_a_crash_of_it() -> None:
    folder = Path("unused")
    good = TensorRt(folder, open_tools=open_fake, missing=lambda: None)
    assert good.probe() == Ok() and good.version == "10.4.0" and good.device == "Tesla T4"
    answer = TensorRt(folder, open_tools=open_segfault, missing=lambda: None).probe()
    assert isinstance(answer, Rejected)
    assert (answer.code, "SIGSEGV" in answer.text) == ("PROBE_CRASHED", True)


def test_a_build_that_crashes_is_build_failed_and_a_build_in_a_child_is_kept(tmp_path: Path) -> None:
    engine = TensorRt(tmp_path, open_tools=open_fake, missing=lambda: None)
    steps: list[str] = []
    engine.build(ONNX, "fp32", lambda what, share: steps.append(what))
    assert engine.built(ONNX, "fp32") and "Building Engine" in steps and steps[-1] == "built"
    engine._open_tools = open_segfault
    with pytest.raises(EngineError, match="SIGSEGV") as caught:
        engine.build(ONNX, "fp16")
    assert caught.value.code == "BUILD_FAILED" and not engine.built(ONNX, "fp16")
    assert os.getpid()  # still here


def test_a_build_that_takes_the_worker_with_it_is_not_begun_for_ever(tmp_path: Path) -> None:
    engine, trt = fake_tensorrt(tmp_path)
    for _ in range(MAX_TRIES):
        engine._store.begin(engine._key(ONNX, "fp32"))  # and the kernel ended the process
    with pytest.raises(EngineError, match="never came to an end") as caught:
        engine.build(ONNX, "fp32")
    assert caught.value.code == "BUILD_FAILED" and not trt.builds
    engine.build(ONNX, "fp16")
    trt.faults.build = "no implementation"
    for _ in range(MAX_TRIES + 1):
        with pytest.raises(EngineError, match="no implementation"):
            engine.build(FAILS, "fp32")  # a build that fails did come to an end


def test_old_cards_are_told_which_extra_serves_them(tmp_path: Path) -> None:
    v100 = FakeCuda(Device("Tesla V100", (7, 0), 80, 16 << 30, "535"))
    assert fake_tensorrt(tmp_path, "10.4.0", cuda=v100)[0].probe() == Ok()
    answer = fake_tensorrt(tmp_path, "10.16.1.11", cuda=v100)[0].probe()
    assert isinstance(answer, Rejected) and answer.code == "CC_UNSUPPORTED"
    assert least_capability("10.4.0") == (7, 0) and least_capability("10.5.0") == least_capability("11") == (7, 5)


def test_without_tensorrt_nothing_of_nvidia_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = missing_here()
    assert answer is not None and answer.code == "LIB_MISSING"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("dicomnode.infer.trt.driver_library", lambda: None)
    answer = missing_here()
    assert answer is not None and answer.code == "NO_DRIVER"


def test_inputs_and_ranges_of_the_shipped_model() -> None:
    assert onnx_inputs(ONNX) == {"hu": (-1, 1, -1, -1)}  # initializers are no inputs
    (hu_range,) = profile_ranges(onnx_inputs(ONNX), 16)
    assert (hu_range.least, hu_range.usual, hu_range.most) == ((1, 1, 8, 8), (16, 1, 512, 512), (16, 1, 1024, 1024))
    (patch,) = profile_ranges({"x": (-1, 1, -1, -1, -1)}, 2)
    assert patch.most == (2, 1, 256, 256, 256)
    assert profile_ranges({"x": (1, 1, 64, 64, 64)}, 4)[0].least == (1, 1, 64, 64, 64)
    assert hu_range.holds((3, 1, 512, 400)) and not hu_range.holds((17, 1, 512, 512)) and not hu_range.holds((3, 1))
