"""Checks of one node on one box, each with what is found and what to do about a fault.

Part of the composition root: it looks at every stage. It never raises and starts no work;
each check stands alone, so a broken one does not hide the others. No patient data: only
keys of the configuration, our own names, figures.
"""

from __future__ import annotations

import ctypes
import errno
import http.client
import os
import platform
import socket
import stat
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from dicomnode import durable
from dicomnode.doctor_cloud import examine_cloud
from dicomnode.errors import BundleError, NodeError
from dicomnode.findings import Finding, Level
from dicomnode.settings import EngineName, Peer, Settings
from dicomnode.tls import Transport
from dicomnode.tls_check import tls_findings

__all__ = ["Finding", "Level", "examine"]

MEBIBYTE = 1 << 20
SLOW_FSYNC_SECONDS = 0.020
FSYNC_WRITES = 15
CONNECT_SECONDS = 3.0
BUILT = 2026
"""The year of this version: a clock before it is wrong."""
_TIME_ERROR = 5
_STA_UNSYNC = 0x40


def examine(settings: Settings) -> list[Finding]:
    """All checks, in the order in which a person would go about it. Never raises."""
    checks: Sequence[tuple[str, Callable[[Settings], Iterable[Finding]]]] = (
        ("software", _software),
        ("data folder", _data_dir),
        ("disk", _disk),
        ("clock", _clock),
        ("DICOM port", _dicom_port),
        ("TLS port", _tls_port),
        ("TLS", tls_findings),
        ("HTTP port", _http_port),
        ("engine", _engine),
        ("endpoints", _endpoints),
        ("models", _models),
        ("rules", _rules),
        ("peers", _peers),
        ("cloud", examine_cloud),
    )
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check(settings)
        except NodeError as error:
            found.append(Finding(Level.fault, name, f"{error.operation}: {error.cause}", error.hint))
        except Exception as error:  # noqa: BLE001 one broken check must not hide the others
            text = f"this check could not be made: {type(error).__name__}"
            found.append(Finding(Level.warn, name, text, "Report it as a bug of the node"))
    return found


def _software(_: Settings) -> Iterable[Finding]:
    import apsw

    from dicomnode.index.database import SAFE_SQLITE

    python, sqlite = platform.python_version(), apsw.sqlitelibversion()
    if tuple(map(int, sqlite.split("."))) < SAFE_SQLITE:
        yield Finding(Level.fault, "software", f"SQLite {sqlite} can lose a commit", "Run scripts/setup: it pins apsw")
    else:
        yield Finding(Level.ok, "software", f"Python {python}, SQLite {sqlite}, {platform.machine()}")


def _data_dir(settings: Settings) -> Iterable[Finding]:
    folder, name = settings.node.data_dir, "data folder"
    if not folder.exists():
        parent = next(p for p in folder.parents if p.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding(Level.note, name, f"{folder} does not exist; the node makes it when it starts")
        else:
            hint = f"Make it and give it to the node's user, e.g. install -d -m 700 -o dicomnode {folder}"
            yield Finding(Level.fault, name, f"{folder} does not exist and may not be made", hint)
        return
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        hint = "Run as the node's user, or give the folder to it with chown"
        yield Finding(Level.fault, name, f"{folder} is not a folder that this user may write to", hint)
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        hint = f"Keep others out of patient data: chmod 700 {folder}"
        yield Finding(Level.warn, name, f"{folder} has mode {mode:o}: others on this box may get in", hint)
    else:
        yield Finding(Level.ok, name, f"{folder}, writable, closed to others")


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def _disk(settings: Settings) -> Iterable[Finding]:
    folder, reserve = _existing(settings.node.data_dir), settings.node.reserve_mb
    free = durable.free_bytes(folder) // MEBIBYTE
    text = f"{free:,} MiB free, {reserve:,} MiB in reserve (node.reserve_mb)"
    if free <= reserve:
        hint = "C-STORE answers 0xA700 until there is room: free space on the volume of data_dir"
        yield Finding(Level.fault, "disk", text, hint)
    elif free < 4 * reserve:
        yield Finding(Level.warn, "disk", text, "Plan for more space: a chest CT takes about 100 to 300 MiB")
    else:
        yield Finding(Level.ok, "disk", text)
    if not os.access(folder, os.W_OK):
        return
    seconds = fsync_seconds(folder)
    text = f"a durable write of 4 KiB takes {1000 * seconds:.1f} ms (median)"
    if seconds > SLOW_FSYNC_SECONDS:
        hint = "Each image waits for one: use a local SSD with power-loss protection, no network file system"
        yield Finding(Level.warn, "disk", text, hint)
    else:
        yield Finding(Level.ok, "disk", text)


def fsync_seconds(folder: Path) -> float:
    """Median time of write + fsync of 4 KiB on the volume of ``folder``."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(FSYNC_WRITES):
            begin = time.perf_counter()
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _clock(_: Settings) -> Iterable[Finding]:
    now = datetime.now().astimezone()
    if not BUILT <= now.year < BUILT + 30:
        hint = "Set it and switch time synchronisation on: timedatectl set-ntp true"
        yield Finding(Level.fault, "clock", f"the clock says {now:%Y-%m-%d %H:%M}", hint)
        return
    text = f"{now:%Y-%m-%d %H:%M %Z}"
    synchronised = clock_synchronised()
    if synchronised is None:
        yield Finding(Level.note, "clock", f"{text}; whether it is synchronised cannot be seen here")
    elif synchronised:
        yield Finding(Level.ok, "clock", f"{text}, synchronised")
    else:
        hint = "Results carry times: timedatectl set-ntp true, with the department's time server"
        yield Finding(Level.warn, "clock", f"{text}, not synchronised with a time server", hint)


def clock_synchronised() -> bool | None:
    """What the kernel says (adjtimex(2), read only); None where it cannot be asked."""
    buffer = ctypes.create_string_buffer(256)  # struct timex; modes = 0: nothing is changed
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    if state < 0 or sys.maxsize < 2**32:
        return None
    status = int.from_bytes(buffer.raw[40:44], sys.byteorder)  # modes, pad, offset, freq, maxerror, esterror
    return state != _TIME_ERROR and not status & _STA_UNSYNC


def _running(settings: Settings, prefix: str) -> str | None:
    """The process of this node whose lock is held, e.g. ``receiver``; None when none runs."""
    import fcntl

    for lock in sorted((settings.node.data_dir / "run").glob(f"{prefix}*.lock")):
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.stem
        except OSError:
            continue
    return None


def _port(name: str, host: str, port: int, owner: str | None, key: str) -> Finding:
    if port == 0:
        return Finding(Level.note, name, f"{key} is 0: the system chooses a port at each start")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except PermissionError:
            hint = f"Use a port from 1024 on, or CAP_NET_BIND_SERVICE as in systemd/ ({key})"
            return Finding(Level.fault, name, f"port {port} needs a privilege that this user lacks", hint)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and owner:
                return Finding(Level.ok, name, f"{host} port {port}, held by this node's {owner}")
            if error.errno == errno.EADDRINUSE:
                hint = f"Stop it or choose another {key}; 'ss -ltnp' names it"
                return Finding(Level.fault, name, f"{host} port {port} is held by another program", hint)
            hint = f"Check {key.split('.', maxsplit=1)[0]}.host: is it an address of this box? 'ip address' lists them"
            return Finding(Level.fault, name, f"{host} port {port} cannot be had: {error.strerror}", hint)
    if owner:
        hint = "Was the port changed in the configuration? Restart the node"
        return Finding(Level.warn, name, f"{host} port {port} is free although this node's {owner} runs", hint)
    return Finding(Level.ok, name, f"{host} port {port} is free; the node does not run")


def _dicom_port(settings: Settings) -> Iterable[Finding]:
    yield _port("DICOM port", settings.dimse.host, settings.dimse.port, _running(settings, "receiver"), "dimse.port")


def _tls_port(settings: Settings) -> Iterable[Finding]:
    tls = settings.tls
    if tls.port is not None:
        yield _port("TLS port", tls.host, tls.port, _running(settings, "receiver"), "tls.port")


def _http_port(settings: Settings) -> Iterable[Finding]:
    yield _port("HTTP port", settings.http.host, settings.http.port, _running(settings, "sidecar"), "http.port")
    owner = _running(settings, "sidecar")
    if not owner or not settings.http.port:
        return
    connection = http.client.HTTPConnection(settings.http.host, settings.http.port, timeout=CONNECT_SECONDS)
    try:
        connection.request("GET", "/ready")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    if status != http.client.OK:
        address = f"http://{settings.http.host}:{settings.http.port}/ready"
        yield Finding(Level.warn, "HTTP port", "the running node does not say that it is ready", f"Open {address}")


def _engine(settings: Settings) -> Iterable[Finding]:
    from dicomnode.infer.choice import engines_of
    from dicomnode.infer.engine import choose_engine

    if settings.inference.engine is EngineName.kserve:
        yield Finding(Level.ok, "engine", "kserve: models run on the endpoints, none on this box")
        return
    gpu_wanted = settings.inference.engine not in (EngineName.auto, EngineName.onnxruntime_cpu)
    both = [n for n in ("onnxruntime", "onnxruntime-gpu") if _distribution(n)]
    if len(both) == 2:
        hint = "They break each other. Start afresh: rm -r .venv && scripts/setup --extra cpu (or t4, v100)"
        yield Finding(Level.fault, "engine", "onnxruntime and onnxruntime-gpu share one environment", hint)
    engine, rejected = choose_engine(settings.inference.engine.value, engines_of(settings))
    yield Finding(Level.ok, "engine", f"{engine.name} {engine.version} serves".replace("  ", " "))
    driver = nvidia_driver()
    for rejection in rejected:
        if driver or gpu_wanted:
            yield Finding(Level.note, "engine", f"{rejection.engine} not used, {rejection.code}: {rejection.text}")
    if driver:
        yield Finding(Level.ok, "GPU", f"NVIDIA driver {driver}")
    else:
        yield Finding(Level.fault if gpu_wanted else Level.note, "GPU", "no NVIDIA driver here: models run on the CPU")


def _endpoints(settings: Settings) -> Iterable[Finding]:
    """The files of each endpoint, and whether its server says that it is ready."""
    from dicomnode.endpoint_settings import endpoint_findings
    from dicomnode.infer.engine import Ok
    from dicomnode.infer.kserve import KServe

    places = settings.inference.places
    yield from endpoint_findings(settings.inference.endpoints, used=bool(places))
    for endpoint in places:
        engine = KServe(endpoint)
        begin = time.perf_counter()
        try:
            answer = engine.probe()
        finally:
            engine.close()
        seconds = time.perf_counter() - begin
        if isinstance(answer, Ok):
            server = f" ({engine.version})" if engine.version else ""
            text = f"{endpoint.name} at {endpoint.url}{server} is ready ({seconds:.2f} s)"
            yield Finding(Level.ok, "endpoints", text)
            continue
        alone = settings.inference.engine is EngineName.kserve and len(places) == 1
        hint = f"Check inference.endpoints.url ({endpoint.url}), the firewall and the server; jobs wait meanwhile"
        yield Finding(Level.fault if alone else Level.warn, "endpoints", answer.text, hint)


def _distribution(name: str) -> bool:
    from importlib import metadata

    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def nvidia_driver() -> str:
    """Version of the loaded kernel driver, empty without one. Touches no device."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "(version unknown)" if Path("/proc/driver/nvidia/version").exists() else ""


def _models(settings: Settings) -> Iterable[Finding]:
    """Every bundle that a rule names is verified; the others are only listed."""
    from dicomnode.app import verify_model
    from dicomnode.infer.purpose import check_clinical_at
    from dicomnode.infer.serving import bundle_folders, resolve

    folders = bundle_folders(settings.inference.models_dir, settings.node.data_dir)
    if not folders:
        level = Level.fault if settings.rules else Level.note
        yield Finding(level, "models", f"no bundles in {settings.inference.models_dir}", "Check inference.models_dir")
        return
    active, held = _serving(settings)
    wanted = list(dict.fromkeys(m for rule in settings.rules for m in rule.every_model))
    for reference in wanted:
        try:
            folder = resolve(folders, reference, active, held)
        except BundleError as error:
            yield Finding(Level.fault, "models", error.cause, error.hint)
            continue
        name = f"{folder.name} {folder.version}"
        begin = time.perf_counter()
        try:
            check_clinical_at(folder.path)
            verify_model(settings, folder.path)
        except NodeError as error:
            hint = error.hint or "Install the bundle again, or 'dicomnode models rollback'"
            yield Finding(Level.fault, "models", f"{name}: {error.cause}", hint)
        else:
            seconds = time.perf_counter() - begin
            yield Finding(Level.ok, "models", f"{name}: digests and golden cases right ({seconds:.1f} s)")
    idle = [f"{f.name}@{f.version}" for f in folders if not any(f.name == m.partition("@")[0] for m in wanted)]
    if idle:
        yield Finding(Level.note, "models", f"present, but no rule names them: {', '.join(idle)}")


def _serving(settings: Settings) -> tuple[dict[str, str], dict[str, frozenset[str]]]:
    """Active versions, and those that must not serve only because they are the newest."""
    from dicomnode.index.database import Database
    from dicomnode.index.life import Life
    from dicomnode.index.operation import Models

    if not (settings.node.data_dir / "index.sqlite").exists():
        return {}, {}
    db = Database(settings.node.data_dir)
    try:
        return Models(db).active(), Life(db).held_back()
    finally:
        db.close()


def _rules(settings: Settings) -> Iterable[Finding]:
    if not settings.rules:
        hint = "Add [[rules]]; config/dicomnode.toml shows how"
        yield Finding(Level.warn, "rules", "none: what arrives is stored and indexed, nothing is analysed", hint)
    for rule in settings.rules:
        models = ", ".join(rule.every_model)
        if rule.destinations:
            yield Finding(Level.ok, "rules", f"{rule.name}: {models}, results to {', '.join(rule.destinations)}")
        else:
            hint = "Give send_to with the name of a peer, if the results are to go to a PACS"
            yield Finding(Level.warn, "rules", f"{rule.name}: {models}, results stay on this node", hint)


def _peers(settings: Settings) -> Iterable[Finding]:
    if not any("store" in peer.allow for peer in settings.peers):
        hint = 'Add [[peers]] with allow = ["echo", "store"] for each modality'
        yield Finding(Level.warn, "peers", "no peer may store: every study is refused", hint)
    reachable = [peer for peer in settings.peers if peer.reachable]
    if reachable:
        with ThreadPoolExecutor(min(8, len(reachable))) as pool:
            yield from pool.map(lambda peer: _echo(settings, peer), reachable)
    for peer in settings.peers:
        if peer.reachable:
            continue
        if "move" in peer.allow:
            hint = "C-MOVE to it needs host and port; leave move out if it only fetches with C-GET"
            yield Finding(Level.warn, "peers", f"{peer.name} ({peer.ae_title}) has no host and port", hint)
        else:
            yield Finding(Level.note, "peers", f"{peer.name} ({peer.ae_title}) only calls us: nothing to try")
        if not peer.host:
            hint = "Give its host: AE titles alone are no secret"
            yield Finding(Level.note, "peers", f"{peer.name} may call from any address", hint)


def _echo(settings: Settings, peer: Peer) -> Finding:
    from dicomnode.deliver.scu import echo

    wanted = any(peer.name in (*rule.destinations, *rule.prior_peers) for rule in settings.rules)
    limits = settings.delivery.model_copy(
        update={
            "connect_seconds": min(settings.delivery.connect_seconds, CONNECT_SECONDS),
            "response_seconds": min(settings.delivery.response_seconds, 2 * CONNECT_SECONDS),
        }
    )
    begin = time.perf_counter()
    try:
        echo(settings.node.ae_title, peer, limits, Transport(settings.tls))
    except NodeError as error:
        level = Level.fault if wanted else Level.warn
        hint = error.hint + ("; its results wait and are sent when it is back" if wanted else "")
        return Finding(level, "peers", error.cause, hint)
    seconds = time.perf_counter() - begin
    where = f"{peer.host}:{peer.port}"
    return Finding(Level.ok, "peers", f"{peer.name} ({peer.ae_title} at {where}) answered C-ECHO in {seconds:.2f} s")
