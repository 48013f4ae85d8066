"""The files of a job: the instances that it reads, and the objects that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dicomnode import durable
from dicomnode.chains import load as load_needs
from dicomnode.durable import ObjectStore
from dicomnode.errors import NodeError, UnsuitableSeries
from dicomnode.header import Wanted, read_header
from dicomnode.index import companions
from dicomnode.index.catalogue import NewInstance
from dicomnode.index.database import Row
from dicomnode.index.jobs import Jobs, Result
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.infer.stages.inputs import SegMask
from dicomnode.records import EncodedObject, SourceInstance


class JobFiles:
    """Files of results are durable before a row names them, and go when none will."""

    def __init__(self, jobs: Jobs, data_dir: Path) -> None:
        self._jobs = jobs
        self._store = ObjectStore(data_dir)
        self._wanted = Wanted(HEADER_KEYS)

    def sources(self, job: Row) -> list[SourceInstance]:
        """The stored instances that the job was made for, as they are now."""
        return [self._source(r) for r in self._jobs.inputs(int(job["id"]))]

    def masks(self, job: Row) -> dict[str, SegMask]:
        """The masks of earlier steps that a step takes as inputs, by the model's names for them."""
        if not job["needs"]:
            return {}
        needs, jobs = load_needs(job["needs"])
        found = {}
        for name, ref in needs.masks.items():
            step, _, segment = ref.partition(":")
            file = self._jobs.result_file(jobs[step], "SEG")
            found[name] = SegMask(self._store.path(file) if file else None, segment)
        return found

    def companions(self, job: Row) -> dict[str, list[SourceInstance]]:
        """The further series that a step takes as inputs, by the model's names for them.

        Raises UnsuitableSeries where one lies in another frame of reference than the job's own
        series: they could not be laid upon each other. NodeError where an image was replaced.
        """
        db, job_id = self._jobs.db, int(job["id"])
        rows = companions.bound(db, job_id)
        if sum(map(len, rows.values())) != companions.count(db, job_id):
            raise NodeError(
                "read inputs",
                "an image of a further series was replaced after it was chosen",
                "'dicomnode jobs retry' chooses anew",
                retryable=True,
            )
        frame = str(db.value("SELECT FrameOfReferenceUID FROM series WHERE id = ?", (job["series_id"],)) or "")
        for name, found in rows.items():
            if not frame or found[0]["FrameOfReferenceUID"] != frame:
                raise UnsuitableSeries(
                    "read inputs",
                    "OTHER_FRAME_OF_REFERENCE",
                    f"the series for input '{name}' lies in another frame of reference than the first one",
                    "Only series that were acquired in one go fit upon each other without registration",
                )
        sources = {name: [self._source(r) for r in found] for name, found in rows.items()}
        for source in (s for found in sources.values() for s in found):
            if not intact(source):
                raise NodeError(
                    "read inputs",
                    "a stored image is damaged or gone: its SHA-256 differs",
                    "Send the series again",
                    retryable=True,
                )
        return sources

    def _source(self, r: Row) -> SourceInstance:
        return SourceInstance(
            r["SOPInstanceUID"], r["SOPClassUID"], r["TransferSyntaxUID"], self._store.path(r["file"]), r["sha256"]
        )

    def staged(self, objects: Sequence[EncodedObject]) -> list[Result]:
        """Write the objects under names of ours; :meth:`keep` makes the names durable."""
        return [self._stage(o) for o in objects]

    def keep(self, results: Sequence[Result], commit: Callable[[Sequence[Result]], object]) -> None:
        """Commit staged files; when that fails or is refused by returning False, they go."""
        paths = [self._store.path(r.instance.file) for r in results]
        try:
            for folder in {p.parent for p in paths}:
                durable.sync_directory(folder)
            kept = commit(results)
        except NodeError:
            for path in paths:
                durable.remove(path)
            raise
        if kept is False:
            for path in paths:
                durable.remove(path)

    def _stage(self, encoded: EncodedObject) -> Result:
        name = self._store.new_name(encoded.series_instance_uid)
        self._store.stage(name, [encoded.part10])
        data_set = data_set_of(encoded.part10)
        attributes = read_header(data_set, encoded.transfer_syntax_uid, self._wanted)
        return Result(
            encoded.kind,
            NewInstance(
                attributes=attributes,
                transfer_syntax_uid=encoded.transfer_syntax_uid,
                file=name,
                size=len(encoded.part10),
                sha256=durable.sha256(encoded.part10),
                dataset_sha256=durable.sha256(data_set),
                origin="result",
            ),
            encoded.shows,
        )


def data_set_of(part10: bytes) -> memoryview:
    """The data set of a Part 10 file: what follows group 2 (PS3.10 7.1)."""
    length = int.from_bytes(part10[140:144], "little")
    return memoryview(part10)[144 + length :]


def intact(source: SourceInstance) -> bool:
    """Whether the file holds what was acknowledged; False also where it is gone."""
    try:
        return durable.object_intact(source.path, source.sha256)
    except OSError:
        return False
