"""Verify a bundle in a process of its own, with a limit to its memory and its time.

A model can be small and grow without bounds: a constant that is tiled, a shape that is computed.
What can be seen in the file is refused before a session is made (:mod:`dicomnode.infer.expansion`);
the rest shows when the golden cases run, and must not take the sidecar or the box with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import BundleError, EngineError, NodeError, OperatorError, PeerAway
from dicomnode.infer.engine import Limits
from dicomnode.lifeline import SUPERVISED, die_with_parent, limit_data
from dicomnode.settings import EngineName

MEBIBYTE = 1 << 20
MOST_ANSWER = 1 << 16


BUILD_SECONDS = 3600.0
"""Where an engine is built first, which takes minutes on a GPU."""


def verify_apart(
    path: Path,
    engine: str,
    *,
    data_dir: Path,
    limits: Limits,
    build: bool = False,
    threads: int,
    memory_mb: int,
    seconds: float,
    endpoints: Sequence[Endpoint] = (),
) -> str:
    """Digests, model file and golden cases of the bundle at ``path``; returns the engine with its version.

    With the engine ``kserve`` they run through ``endpoints``, of which one has to pass; where none
    does and the first is away, PeerAway is raised, OperatorError for its files.

    ``data_dir`` keeps the engines that were built; with ``build``, and where one was asked for by
    name, the best is built first. Raises what :meth:`dicomnode.infer.choice.EngineChoice.open`
    raises, and BundleError when the verification needs more than ``memory_mb`` or ``seconds``, or
    ends without a word.
    """
    task = json.dumps(
        {
            "path": str(path),
            "engine": engine,
            "data_dir": str(data_dir),
            "max_batch": limits.max_batch,
            "gpu_memory_share": limits.gpu_memory_share,
            "build": build,
            "threads": threads,
            "memory_mb": memory_mb,
            "endpoints": [endpoint.model_dump(mode="json") for endpoint in endpoints],
        }
    )
    seconds = max(seconds, BUILD_SECONDS) if build else seconds
    operation = f"verify bundle {path.parent.name}/{path.name}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dicomnode.infer.verification"],
            input=task.encode(),
            capture_output=True,
            check=False,
            timeout=seconds,
            env={**os.environ, SUPERVISED: str(os.getpid())},
        )
    except subprocess.TimeoutExpired:
        raise BundleError(
            operation, f"it takes more than {seconds:g} s", "A bundle whose golden cases are small is done in seconds"
        ) from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout[-MOST_ANSWER:])
    except ValueError:
        raise BundleError(
            operation,
            f"the process that verifies it ended with code {done.returncode}",
            f"The model crashes the engine or needs more than {memory_mb} MiB (inference.verify_memory_mb)",
        ) from None
    if answer["kind"] == "ok":
        return str(answer["engine"])
    if answer["kind"] == "engine":
        code = answer["code"]
        raise EngineError(answer["operation"], code, answer["cause"].removeprefix(f"{code}: "), answer["hint"])
    if answer["kind"] == "away":
        raise PeerAway(answer["operation"], answer["cause"], answer["hint"])
    if answer["kind"] == "operator":
        raise OperatorError(answer["operation"], answer["cause"], answer["hint"])
    if answer["kind"] == "memory":
        raise BundleError(
            operation,
            f"it needs more than {memory_mb} MiB of memory",
            "Do not use it, or raise inference.verify_memory_mb if it is meant to be that large",
        )
    raise BundleError(answer["operation"], answer["cause"], answer["hint"])


def _verify(task: dict[str, Any]) -> dict[str, Any]:
    try:
        name = _at_endpoints(task) if task["engine"] == EngineName.kserve else _here(task)
    except MemoryError:
        return {"kind": "memory"}
    except EngineError as error:
        return {"kind": "engine", "code": error.code, **_facts(error)}
    except PeerAway as error:
        return {"kind": "away", **_facts(error)}
    except BundleError as error:
        return {"kind": "bundle", **_facts(error)}
    except OperatorError as error:
        return {"kind": "operator", **_facts(error)}
    return {"kind": "ok", "engine": name}


def _facts(error: NodeError) -> dict[str, str]:
    return {"operation": error.operation, "cause": error.cause, "hint": error.hint}


def _here(task: dict[str, Any]) -> str:
    """On this box's engine. Raises what :func:`verify_apart` says of it, MemoryError beyond the limit."""
    from dicomnode.infer.choice import GPU_ENGINES, EngineChoice
    from dicomnode.infer.engine import default_engines

    limits = Limits(int(task["max_batch"]), float(task["gpu_memory_share"]))
    engines = default_engines(Path(task["data_dir"]), limits)
    choice = EngineChoice(task["engine"], engines, threads=int(task["threads"]), limits=limits)
    limited = not any(engine.name in GPU_ENGINES for engine in choice.engines)  # CUDA maps more than it uses
    if limited:
        limit_data(int(task["memory_mb"]) * MEBIBYTE)
    try:
        ready = choice.open(Path(task["path"]), build=bool(task["build"]) or not choice.automatic).model
    except EngineError as error:
        if limited and (error.code == "OOM" or "alloc" in error.cause.lower()):
            raise MemoryError from error  # a GPU that others fill says nothing of the bundle; our own limit does
        raise
    ready.close()
    return ready.report.engine


def _at_endpoints(task: dict[str, Any]) -> str:
    """Through the endpoints; what is before and behind the network is computed here."""
    from dicomnode.infer.placing import verify_at_endpoints

    limit_data(int(task["memory_mb"]) * MEBIBYTE)
    return verify_at_endpoints([Endpoint(**endpoint) for endpoint in task["endpoints"]], Path(task["path"]))


def main() -> None:
    die_with_parent()
    answer_to = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of the answer
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(OSError):  # when the box runs out of memory, this goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    answer = _verify(json.loads(sys.stdin.buffer.read()))
    with os.fdopen(answer_to, "w") as out:
        out.write(json.dumps(answer))


if __name__ == "__main__":
    main()
