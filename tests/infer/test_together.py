"""Studies of one image that were queued share the network's batches, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicomnode import metrics
from dicomnode.app_results import encoder
from dicomnode.durable import ObjectStore
from dicomnode.errors import EngineError, PeerAway
from dicomnode.index import sharing
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Runs
from dicomnode.infer.choice import EngineChoice, limits_of
from dicomnode.infer.decode import InlineDecoder
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.places import Local
from dicomnode.infer.placing import PlacedModels
from dicomnode.infer.worker import Worker
from tests.infer.life_case import worker_on
from tests.infer.sharing_case import Trap, network, poisoned, queue, settings_of, triage
from tests.infer.stages.bundle_case import measurement, segment


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    triage(folder)
    triage(folder, "2.0.0", onnx=network(seed=4))
    return folder


class Box:
    """A data folder with a worker on it."""

    def __init__(self, folder: Path, bundles: Path) -> None:
        self.folder = folder
        (folder / "models").symlink_to(bundles, target_is_directory=True)
        self.db = Database(folder / "data")
        ObjectStore(folder / "data").prepare()
        Models(self.db).activate("triage", "1.0.0")

    def worker(self, on: Any = None, **inference: Any) -> tuple[Worker, Trap]:
        settings = settings_of(self.folder, **inference)
        choice = EngineChoice("onnxruntime-cpu", [OnnxRuntimeCpu()], threads=1, limits=limits_of(settings))
        worker = worker_on(settings, self.db, choice)
        return worker, Trap(worker, on)

    def show(self, job_id: int) -> Row:
        found = Jobs(self.db).show(job_id)
        assert found is not None
        return found

    def column(self, name: str, ids: list[int]) -> list[Any]:
        return [self.show(n)[name] for n in ids]

    def found(self, job_id: int) -> tuple[Any, ...]:
        """What the model said, without figures and names."""
        summary = self.show(job_id)["summary"]
        return summary["findings"], summary["measurements"], summary["slices"]


@pytest.fixture
def box(tmp_path: Path, bundles: Path) -> Iterator[Box]:
    made = Box(tmp_path, bundles)
    yield made
    made.db.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, bundles: Path) -> dict[int, tuple[Any, ...]]:
    """What each study is found to have where each is done by itself, on the same engine."""
    box = Box(tmp_path_factory.mktemp("alone"), bundles)
    worker, trap = box.worker(batch_studies=1)
    ids = {number: queue(box.db, number) for number in range(1, 9)}
    while worker.run_once():
        pass
    assert trap.rows == [1] * 8
    found = {number: box.found(job_id) for number, job_id in ids.items()}
    box.db.close()
    return found


def assert_whole(box: Box, ids: list[int]) -> None:
    """Each with a SEG for each of its images and one SR."""
    for job_id in ids:
        job = box.show(job_id)
        kinds = [r["kind"] for r in job["results"]]
        assert (job["state"], kinds) == ("done", ["SEG"] * job["instances"] + ["SR"])
        assert len({r["SOPInstanceUID"] for r in job["results"]}) == len(kinds)


def sampled(name: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, {"engine": "onnxruntime-cpu"}) or 0.0


def test_a_burst_shares_one_batch_and_each_gets_what_it_gets_alone(box: Box, alone: dict[int, tuple[Any, ...]]) -> None:
    worker, trap = box.worker()
    ids = [queue(box.db, number) for number in range(1, 9)]
    before = sampled("dicomnode_inference_batch_studies_sum"), sampled("dicomnode_inference_batch_studies_count")
    assert worker.run_once()
    assert trap.rows == [8]
    assert_whole(box, ids)
    assert [box.found(n) for n in ids] == [alone[number] for number in range(1, 9)], "bit for bit"
    assert len({str(alone[number]) for number in alone}) == 8, "and no two are alike"
    assert box.column("batch_studies", ids) == [8] * 8 and box.column("attempts", ids) == [1] * 8
    assert not worker.run_once()
    after = sampled("dicomnode_inference_batch_studies_sum"), sampled("dicomnode_inference_batch_studies_count")
    assert (after[0] - before[0], after[1] - before[1]) == (8, 1)
    seconds = box.column("seconds", ids)
    assert all({"wait", "read", "inference", "postprocess", "companions", "encode"} <= s.keys() for s in seconds)
    assert len({str(r["identity"]) for r in map(box.show, ids)}) == 8


@pytest.mark.parametrize(
    ("inference", "rows"),
    [({"batch_studies": 1}, [1] * 6), ({"batch_studies": 4}, [4, 2]), ({"max_batch": 5}, [5, 1])],
)
def test_the_settings_bound_it(box: Box, inference: dict[str, int], rows: list[int]) -> None:
    worker, trap = box.worker(**inference)
    ids = [queue(box.db, number) for number in range(1, 7)]
    while worker.run_once():
        pass
    assert trap.rows == rows
    assert_whole(box, ids)


@pytest.mark.parametrize(("engine", "rows"), [("onnxruntime-cpu 1.0", [1, 1, 1]), ("tensorrt 10.0", [3])])
def test_left_to_the_node_only_what_has_a_price_for_each_call_is_shared(box: Box, engine: str, rows: list[int]) -> None:
    worker, trap = box.worker(batch_studies=0)
    trap.engine = engine
    ids = [queue(box.db, number) for number in range(1, 4)]
    while worker.run_once():
        pass
    assert trap.rows == rows
    assert_whole(box, ids)


def test_series_of_several_images_fill_the_batch_with_theirs(box: Box, alone: dict[int, tuple[Any, ...]]) -> None:
    """Shapes differ before the resize only; a series without room for another has a batch of its own."""
    worker, trap = box.worker(max_batch=6)
    ids = [queue(box.db, n, images=count) for n, count in ((1, 2), (2, 3), (3, 2), (4, 6), (5, 1))]
    while worker.run_once():
        pass
    assert trap.rows == [6, 2, 6], "2 + 3 + 1; then 2, then 6"
    assert_whole(box, ids)
    assert box.column("batch_studies", ids) == [3, 3, 0, 0, 3]
    assert box.found(ids[4]) == alone[5]


def test_a_series_that_is_too_large_for_a_batch_is_done_image_by_image(box: Box) -> None:
    worker, trap = box.worker(max_batch=4)
    job_id = queue(box.db, 1, images=5)
    assert worker.run_once() and trap.rows == [1] * 5
    assert_whole(box, [job_id])


def test_a_file_of_many_frames_is_a_series_of_its_own(box: Box) -> None:
    """All rows of those that share a batch are in memory at once: those of a volume would be gigabytes."""
    ids = [queue(box.db, number) for number in range(1, 5)]
    with box.db.transaction():
        for job_id in ids[1], ids[3]:
            uid = box.db.value("SELECT SOPInstanceUID FROM job_inputs WHERE job_id = ?", (job_id,))
            box.db.execute("UPDATE instances SET NumberOfFrames = '40' WHERE SOPInstanceUID = ?", (uid,))
    worker, trap = box.worker()
    while worker.run_once():
        pass
    assert trap.rows == [2, 1, 1]
    assert box.column("batch_studies", ids) == [2, 0, 2, 0]


def test_the_images_of_one_series_fail_in_their_batch_as_they_do_alone(box: Box) -> None:
    def on(inputs: Mapping[str, np.ndarray]) -> None:
        if len(inputs["x"]) > 1:
            raise EngineError("run model", "RUN_FAILED", "no batches today")

    worker, trap = box.worker(on)
    ids = [queue(box.db, 1, images=2), queue(box.db, 2, images=3, priority="batch")]
    while worker.run_once():
        pass
    assert trap.rows == [2, 1, 1, 1, 1, 1], "and no other batch is tried for a while"
    assert_whole(box, ids)
    lost: list[int] = []
    worker, trap = box.worker(poisoned("DEVICE_LOST"))
    worker._on_lost = lambda: lost.append(1)
    poison = queue(box.db, 3, images=2, poison=True)
    assert worker.run_once() and lost == [1]
    assert (box.show(poison)["state"], box.show(poison)["attempts"]) == ("pending", 1), "its own attempt"


def test_one_bad_study_is_refused_alone(box: Box, alone: dict[int, tuple[Any, ...]]) -> None:
    worker, trap = box.worker()
    ids = [
        queue(box.db, 1),
        queue(box.db, 2, PresentationIntentType="FOR PROCESSING"),
        queue(box.db, 3),
        queue(box.db, 4),
        queue(box.db, 5),
    ]
    file = box.db.value(
        "SELECT n.file FROM instances n JOIN job_inputs i USING (SOPInstanceUID) WHERE i.job_id = ?", (ids[3],)
    )
    ObjectStore(box.folder / "data").path(file).write_bytes(b"damaged")
    assert worker.run_once()
    assert trap.rows == [3]
    assert box.column("state", ids) == ["done", "refused", "done", "pending", "done"]
    assert "FOR_PROCESSING" in box.show(ids[1])["last_error"]
    assert "SHA-256 differs" in box.show(ids[3])["last_error"] and box.show(ids[3])["attempts"] == 1
    assert [box.found(ids[at]) for at in (0, 2, 4)] == [alone[1], alone[3], alone[5]]
    assert [box.show(ids[at])["batch_studies"] for at in (0, 2, 4)] == [3] * 3, "as many as there were"


def test_a_study_that_fails_the_network_fails_alone(box: Box, alone: dict[int, tuple[Any, ...]]) -> None:
    worker, trap = box.worker(poisoned("RUN_FAILED"), max_attempts=3)
    ids = [queue(box.db, 1), queue(box.db, 2, poison=True), queue(box.db, 3)]
    assert worker.run_once()
    assert trap.rows == [3, 1, 1, 1], "together, then each alone"
    assert box.column("state", ids) == ["done", "pending", "done"] and box.show(ids[1])["attempts"] == 1
    assert [box.found(ids[at]) for at in (0, 2)] == [alone[1], alone[3]]
    assert box.column("batch_studies", ids) == [0, 0, 0]
    more = [queue(box.db, 4), queue(box.db, 5)]
    with box.db.transaction():
        box.db.execute("UPDATE jobs SET next_at = 0")
    while worker.run_once():
        with box.db.transaction():
            box.db.execute("UPDATE jobs SET next_at = 0")
    assert trap.rows[4:] == [1, 1, 2], "it is not taken along again"
    assert box.show(ids[1])["state"] == "failed" and box.column("state", more) == ["done", "done"]


def test_a_network_that_fails_only_in_company_is_left_alone_for_a_while(box: Box) -> None:
    def on(inputs: Mapping[str, np.ndarray]) -> None:
        if len(inputs["x"]) > 1:
            raise EngineError("run model", "RUN_FAILED", "no batches today")

    worker, trap = box.worker(on)
    ids = [queue(box.db, number) for number in range(1, 5)]
    assert worker.run_once()
    ids += [queue(box.db, number) for number in range(5, 9)]
    while worker.run_once():
        pass
    assert trap.rows == [4, 1, 1, 1, 1, 1, 1, 1, 1]
    assert_whole(box, ids)


def test_too_little_memory_halves_the_batch_as_for_slices(box: Box, alone: dict[int, tuple[Any, ...]]) -> None:
    def on(inputs: Mapping[str, np.ndarray]) -> None:
        if len(inputs["x"]) > 2:
            raise EngineError("run model", "OOM", "full")

    worker, trap = box.worker(on)
    ids = [queue(box.db, number) for number in range(1, 9)]
    while worker.run_once():
        pass
    assert trap.rows == [8, 4, 2, 2, 2, 2]
    assert_whole(box, ids)
    assert [box.found(n) for n in ids] == [alone[number] for number in range(1, 9)]


def test_a_full_gpu_lets_each_wait_as_it_does_alone(box: Box) -> None:
    def on(inputs: Mapping[str, np.ndarray]) -> None:
        del inputs
        raise EngineError("run model", "OOM", "full")

    worker, trap = box.worker(on)
    ids = [queue(box.db, number) for number in range(1, 4)]
    assert worker.run_once()
    assert box.column("state", ids) == ["pending"] * 3 and box.column("attempts", ids) == [0] * 3
    assert box.column("waits", ids) == [1] * 3
    trap.on = None
    with box.db.transaction():
        box.db.execute("UPDATE jobs SET next_at = 0")
    while worker.run_once():
        pass
    assert_whole(box, ids)


def test_an_endpoint_that_goes_away_is_not_asked_once_for_each(box: Box) -> None:
    away = [True]

    def on(inputs: Mapping[str, np.ndarray]) -> None:
        del inputs
        if away[0]:
            raise PeerAway("ask inference endpoint", "it is away")

    worker, trap = box.worker(on)
    ids = [queue(box.db, number) for number in range(1, 5)]
    assert worker.run_once()
    assert trap.rows == [4, 1], "together, and once for the first of them"
    assert box.column("state", ids) == ["pending"] * 4 and box.column("attempts", ids) == [0] * 4
    assert box.column("waits", ids) == [1, 0, 0, 0]
    away[0] = False
    assert worker.run_once() and trap.rows == [4, 1, 3]
    assert_whole(box, ids[1:])


def test_a_device_lost_in_company_is_nobodys_attempt_until_each_is_alone(box: Box) -> None:
    lost: list[int] = []

    def start() -> tuple[Worker, Trap]:
        worker, trap = box.worker(poisoned("DEVICE_LOST"), max_attempts=2)
        worker._on_lost = lambda: lost.append(1)
        return worker, trap

    ids = [queue(box.db, 1), queue(box.db, 2, poison=True), queue(box.db, 3)]
    worker, trap = start()
    assert worker.run_once() and lost == [1] and trap.rows == [3]
    assert box.column("state", ids) == ["pending"] * 3 and box.column("attempts", ids) == [0] * 3
    runs = Runs(box.db).recent("triage", "1.0.0", 10)
    assert [r.state for r in runs] == ["stopped"] * 3, "it is not known whose doing it was"
    [event] = [e for e in Events(box.db).listing() if e["kind"] == "device-lost"]
    assert "3 jobs shared a batch" in event["text"]
    for _ in range(12):
        worker, trap = start()
        with box.db.transaction():
            box.db.execute("UPDATE jobs SET next_at = 0")
        while not (before := len(lost)) or worker.run_once():
            if len(lost) > before:
                break
        assert set(trap.rows) <= {1}
    assert box.column("state", ids) == ["done", "failed", "done"]
    assert box.column("attempts", ids) == [1, 2, 1] and len(lost) == 3


@pytest.mark.parametrize("how", ["device", "death"])
def test_one_that_was_lost_in_company_gets_no_new_company_when_it_is_the_first(box: Box, how: str) -> None:
    """Else it would take those down that arrive meanwhile, again and again, and no attempt would ever count."""
    ids = [queue(box.db, 1), queue(box.db, 2)]
    assert Jobs(box.db).lease("w", 60) is not None
    sharing.lease_beside(box.db, ids[0], ids[1:], "w", 60)
    if how == "device":
        sharing.part(box.db, ids, "w", "the device was lost")
    else:
        Jobs(box.db).expire(3, ("w",))
    fresh = [queue(box.db, number) for number in (3, 4)]
    worker, trap = box.worker()
    for _ in ids:
        assert worker.run_once()
    assert trap.rows == [1, 1], "each alone, whoever arrived since"
    assert box.column("state", ids) == ["done"] * 2 and box.column("batch_studies", ids) == [0, 0]
    assert worker.run_once() and trap.rows == [1, 1, 2], "those that nothing happened to share"
    assert box.column("state", fresh) == ["done"] * 2


def test_a_lease_that_is_lost_in_company_drops_that_result_only(box: Box) -> None:
    ids = [queue(box.db, number) for number in range(1, 4)]

    def taken(inputs: Mapping[str, np.ndarray]) -> None:
        del inputs
        with box.db.transaction():
            box.db.execute("UPDATE jobs SET lease_owner = 'another' WHERE id = ?", (ids[1],))

    worker, _ = box.worker(taken)
    assert worker.run_once()
    assert box.column("state", ids) == ["done", "running", "done"]
    assert box.column("results", ids)[1] == []
    assert box.db.value("SELECT count(*) FROM results") == 4


def test_a_stat_study_goes_first_after_the_batch_that_runs(box: Box) -> None:
    urgent: list[int] = []

    def arrives(inputs: Mapping[str, np.ndarray]) -> None:
        if len(inputs["x"]) == 4 and not urgent:
            urgent.extend(queue(box.db, number, priority="stat") for number in (5, 6))

    worker, trap = box.worker(arrives)
    ids = [queue(box.db, number) for number in range(1, 5)]
    assert worker.run_once()
    assert trap.rows == [4, 2], "and both of it share a batch of their own"
    assert_whole(box, [*ids, *urgent])
    ended = {n: box.db.value("SELECT finished_at FROM jobs WHERE id = ?", (n,)) for n in (*ids, *urgent)}
    assert max(ended[n] for n in urgent) < min(ended[n] for n in ids), "before any of the four"


def sized(folder: Path) -> None:
    """A network that sees images in their size: 1 and 6, 2 and 7, and so on are alike."""
    triage(
        folder,
        preprocess=[{"step": "scale_range", "low": 0, "high": 4095, "out_low": 0, "out_high": 1}],
        engine={
            "model": "model.onnx", "input": "x", "outputs": ["y"], "reach": {"kind": "slices", "axis": 0, "batch": 1},
        },
        outputs={"segments": [segment(1, "bright")], "measurements": [measurement("mean", kind="mean")]},
        onnx=network(scores=False),
    )  # fmt: skip


def test_images_of_other_sizes_have_batches_of_their_own_and_a_stat_study_goes_between(tmp_path: Path) -> None:
    """Of six, two each are alike."""
    sized(tmp_path / "sized")
    box = Box(tmp_path, tmp_path / "sized")
    ended: list[int] = []
    urgent: list[int] = []

    def arrives(inputs: Mapping[str, np.ndarray]) -> None:
        ended.append(box.db.value("SELECT count(*) FROM jobs WHERE state = 'done'"))
        if not urgent:
            urgent.append(queue(box.db, 9, priority="stat"))

    worker, trap = box.worker(arrives)
    ids = [queue(box.db, number) for number in (1, 6, 2, 7, 3, 8)]
    assert worker.run_once()
    assert trap.rows == [2, 1, 2, 2], "the second one is the urgent study's"
    assert ended == [0, 0, 1, 1], "and it is done before the next batch begins"
    assert_whole(box, [*ids, *urgent])
    assert box.column("batch_studies", ids) == [2] * 6, "as many as there were in its batch"
    box.db.close()


def test_where_no_two_images_are_alike_nothing_was_shared(tmp_path: Path) -> None:
    sized(tmp_path / "sized")
    box = Box(tmp_path, tmp_path / "sized")
    worker, trap = box.worker()
    ids = [queue(box.db, number) for number in (1, 2, 3)]
    before = sampled("dicomnode_inference_batch_studies_sum"), sampled("dicomnode_inference_batch_studies_count")
    assert worker.run_once() and trap.rows == [1, 1, 1]
    assert_whole(box, ids)
    assert box.column("batch_studies", ids) == [0, 0, 0]
    after = sampled("dicomnode_inference_batch_studies_sum"), sampled("dicomnode_inference_batch_studies_count")
    assert (after[0] - before[0], after[1] - before[1]) == (3, 3), "each is one by itself"
    assert [r.seconds > 0 for r in Runs(box.db).recent("triage", "1.0.0", 10)] == [True] * 3, "and has its own time"
    assert not any("companions" in seconds for seconds in box.column("seconds", ids))
    ids = [queue(box.db, number) for number in (4, 9)]
    assert worker.run_once() and trap.rows[3:] == [2], "that is no batch that failed: the next may share"
    assert box.column("batch_studies", ids) == [2, 2]
    box.db.close()


def test_priorities_do_not_mix(box: Box) -> None:
    worker, trap = box.worker()
    low = [queue(box.db, number, priority="batch") for number in (1, 2)]
    middle = [queue(box.db, number) for number in (3, 4, 5)]
    high = queue(box.db, 6, priority="stat")
    while worker.run_once():
        pass
    assert trap.rows == [1, 3, 2]
    ends = [box.db.value("SELECT finished_at FROM jobs WHERE id = ?", (n,)) for n in (high, *middle, *low)]
    assert ends == sorted(ends)


def test_a_canary_gets_batches_of_its_own(box: Box) -> None:
    worker, trap = box.worker()
    Life(box.db).canary("triage", "2.0.0", percent=50.0, who="tests")
    ids = [queue(box.db, number) for number in range(1, 17)]
    while worker.run_once():
        pass
    assert_whole(box, ids)
    versions = box.column("model_version", ids)
    active = versions.count("1.0.0")
    assert 2 <= active <= 14, "both have some"
    assert trap.rows == [active]
    for job_id, version in zip(ids, versions, strict=True):
        assert box.show(job_id)["batch_studies"] == versions.count(version)
        assert box.show(job_id)["summary"]["role"] == ("active" if version == "1.0.0" else "canary")


def test_a_version_that_takes_over_meanwhile_gets_its_jobs_alone(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decided anew for each when it is opened; what came to another session shares nothing with the first."""
    worker, trap = box.worker()
    ids = [queue(box.db, number) for number in (1, 2, 3)]
    lease = sharing.lease_beside

    def swapped(*arguments: Any) -> Any:
        leased = lease(*arguments)
        Models(box.db).activate("triage", "2.0.0")
        return leased

    monkeypatch.setattr(sharing, "lease_beside", swapped)
    assert worker.run_once()
    assert_whole(box, ids)
    assert box.column("model_version", ids) == ["1.0.0", "2.0.0", "2.0.0"] and trap.rows == [1]
    assert box.column("batch_studies", ids) == [0, 0, 0]


IDLE: Any = type("Idle", (), {"sample": lambda self: 0.0})()


class Distant(Local):
    """An endpoint: it rests once it was away."""

    name = "gpu1"
    away = 0

    def get(self, reference: str) -> ReadyModel:
        if self.away:
            raise PeerAway("ask inference endpoint", "it rests")
        return super().get(reference)

    def failed(self, reference: str, error: PeerAway | EngineError) -> None:
        self.away += 1


def placed_at(box: Box, *places: Local) -> Worker:
    settings = settings_of(box.folder)
    return Worker(
        settings,
        box.db,
        PlacedModels(settings, box.db, places),
        encoder(settings),
        owner="worker",
        decoder=InlineDecoder(),
        on_results=lambda: None,
    )


def test_each_job_is_placed_by_itself_and_they_meet_at_the_place(box: Box, alone: dict[int, tuple[Any, ...]]) -> None:
    worker, trap = box.worker()
    placed = placed_at(box, Local(worker._models, 0.0, IDLE))  # type: ignore[arg-type]
    ids = [queue(box.db, number) for number in (1, 2, 3)]
    assert placed.run_once() and trap.rows == [3]
    assert_whole(box, ids)
    assert [p["chosen"] for p in box.column("placement", ids)] == ["local"] * 3
    assert [box.found(n) for n in ids] == [alone[number] for number in (1, 2, 3)]


def unplugged(inputs: Mapping[str, np.ndarray]) -> None:
    del inputs
    raise PeerAway("ask inference endpoint", "the connection broke")


def test_a_place_that_goes_away_under_a_shared_batch_is_told_once_and_each_finds_another(box: Box) -> None:
    endpoint, asked = box.worker(unplugged)
    here, trap = box.worker()
    distant = Distant(endpoint._models, 0.0, IDLE)  # type: ignore[arg-type]
    placed = placed_at(box, distant, Local(here._models, 9.0, IDLE))  # type: ignore[arg-type]
    ids = [queue(box.db, number) for number in (1, 2, 3)]
    while placed.run_once():
        pass
    assert asked.rows == [3] and distant.away == 1, "it is not asked again by the first of them"
    assert trap.rows == [1, 2], "the others share there, too"
    assert_whole(box, ids)
    first, *others = box.column("placement", ids)
    assert first["chosen"] == "local" and "the connection broke" in str(first["tried"])
    assert [(p["chosen"], "tried" in p) for p in others] == [("local", False)] * 2
    assert box.column("attempts", ids) == [1] * 3


def test_where_there_is_no_other_place_each_waits_for_itself(box: Box) -> None:
    endpoint, asked = box.worker(unplugged)
    distant = Distant(endpoint._models, 0.0, IDLE)  # type: ignore[arg-type]
    placed = placed_at(box, distant)
    ids = [queue(box.db, number) for number in (1, 2, 3)]
    for count in (1, 2, 3):
        assert placed.run_once() and box.column("waits", ids) == [1] * count + [0] * (3 - count)
    assert asked.rows == [3] and distant.away == 1
    assert box.column("state", ids) == ["pending"] * 3 and box.column("attempts", ids) == [0] * 3
    distant.away = 0
    asked.on = None
    with box.db.transaction():
        box.db.execute("UPDATE jobs SET next_at = 0")
    assert placed.run_once() and asked.rows == [3, 3]
    assert_whole(box, ids)


def test_a_network_that_mixes_its_batch_is_never_shared(box: Box, tmp_path: Path) -> None:
    folder = tmp_path / "mixing"
    for name, onnx in (("mixes", network(mixes=True)), ("one_row", network(one_row=True))):
        triage(folder / name / "models", onnx=onnx)
        other = Database(folder / name / "data")
        worker = worker_on(settings_of(folder / name), other)
        trap = Trap(worker)
        for number in (1, 2, 3):
            queue(other, number)
        while worker.run_once():
            pass
        assert trap.rows == [1, 1, 1], name
        other.close()
