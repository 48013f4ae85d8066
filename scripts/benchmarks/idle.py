"""200 associations that say nothing: what they cost the receiver."""

from __future__ import annotations

import time

from benchmarks import peers, upper_layer
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import Bench, BenchError, Skipped, remove, say

ASSOCIATIONS = 200
SHARE = 5.0
KINDS = (peers.DICOMNODE, peers.STORESCP_FORK, peers.ORTHANC, peers.PYNETDICOM)


def run(bench: Bench) -> Section:
    section = Section()
    seconds = float(bench.amount(10, 4))
    rows: list[Row] = []
    for kind in KINDS:
        say.print(f"idle: {kind.name} …")
        folder = bench.folder("idle")
        try:
            with kind.start(folder) as acceptor:
                resting = _share(acceptor, seconds)
                held = upper_layer.several(ASSOCIATIONS, acceptor.port, acceptor.called)
                time.sleep(2.0)  # what the acceptor does after an association came about is not idleness
                share = _share(acceptor, seconds)
                for association in held:  # an acceptor that dropped them costs nothing and is no result
                    association.echo()
                memory = sum(p.memory_full_info().pss for p in acceptor.processes())
                for association in held:
                    association.close()
        except Skipped as reason:
            bench.skip(str(reason))
            continue
        except BenchError as error:
            bench.skip(f"idle associations at {kind.name}: {error}")
            continue
        finally:
            remove(folder)
        rows.append(
            {
                "receiver": kind.name,
                "associations held": len(held),
                "CPU % of one core": f"{share:.1f}",
                "with none": f"{resting:.1f}",
                "PSS MB of all": f"{memory / 1e6:.0f}",
            }
        )
        section.samples[kind.name] = {"held": len(held), "cpu_percent": share, "resting_percent": resting}
        if kind is peers.DICOMNODE:
            met = share < SHARE and len(held) == ASSOCIATIONS
            text = f"{share:.1f} % with {len(held)}"
            section.goals.append(Goal(f"{ASSOCIATIONS} idle associations", f"< {SHARE:.0f} % of one core", text, met))
    note = (
        f"CPU over {seconds:.0f} s; afterwards each association answered a C-ECHO. Held: as many as the peer accepts."
    )
    section.tables.append(Figures(f"{ASSOCIATIONS} idle associations", rows, note))
    return section


def _share(acceptor: peers.Acceptor, seconds: float) -> float:
    """CPU time of the receiver's processes over so many seconds, percent of one core."""
    begin, spent = time.monotonic(), acceptor.cpu()
    time.sleep(seconds)
    return 100.0 * (acceptor.cpu() - spent) / (time.monotonic() - begin)
