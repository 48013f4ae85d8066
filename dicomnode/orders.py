"""What rules ask of a job: which objects for whom, reports of failure, what is critical. Pure.

An order is stored with its job, so that a job stays what it was when the settings change.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

KINDS = ("SEG", "SR", "GSPS", "SC", "KOS", "PM")
"""What a rule may ask for, in the order in which the objects are made and sent."""

DEFAULT_KINDS = ("SEG", "SR")
LABELMAP, LABELMAP_SR = "LABELMAP", "LABELMAP-SR"
ALTERNATIVE: Mapping[str, str] = {"SEG": LABELMAP, "SR": LABELMAP_SR}
"""Kind -> what a destination that takes label maps gets instead: an SR names the segmentation by UID."""


PROPOSED = "*"


@dataclass(frozen=True, slots=True)
class Condition:
    """When the finding or measurement ``key`` is critical.

    ``minimum`` and ``maximum`` are inclusive bounds of a measurement's value or a finding's
    probability. ``value`` is a finding's value as code or meaning, without regard to case;
    ``*`` stands for a finding that is present or reaches its threshold. The key ``PROPOSED`` stands
    for the conditions that the model's bundle proposes.
    """

    key: str
    minimum: float | None = None
    maximum: float | None = None
    value: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """``kinds`` and ``seg`` (``binary`` | ``labelmap``) go by destination, "" where a rule has none.

    ``report_to``: destinations that get an SR when the analysis fails or is impossible.
    """

    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seg: Mapping[str, str] = field(default_factory=dict)
    report_to: tuple[str, ...] = ()
    critical: tuple[Condition, ...] = ()
    identified: bool = False
    """Whether all its rules let what goes to the cloud keep the patient's identity."""

    def kinds_for(self, destination: str) -> tuple[str, ...]:
        return self.kinds.get(destination, DEFAULT_KINDS)

    @property
    def made(self) -> tuple[str, ...]:
        """Every kind that somebody wants."""
        return _in_order({k for kinds in self.kinds.values() for k in kinds} or DEFAULT_KINDS)

    @property
    def labelmap(self) -> bool:
        """Whether a label map has to be made beside the binary SEG, which is its fallback."""
        return any(
            form == "labelmap" and "SEG" in self.kinds_for(destination) for destination, form in self.seg.items()
        )

    def together(self, one: str, other: str) -> bool:
        """Whether all who get ``one`` get ``other`` too, so that one may refer to the other."""
        return all(other in kinds for kinds in self.kinds.values() if one in kinds) and other in self.made


def join(one: Order, other: Order) -> Order:
    """Both orders as one; a destination that one rule promises binary SEG gets that."""
    kinds = {
        destination: _in_order({*one.kinds.get(destination, ()), *other.kinds.get(destination, ())})
        for destination in (*one.kinds, *other.kinds)
    }
    seg = {d: min(o.seg[d] for o in (one, other) if d in o.seg) for d in (*one.seg, *other.seg)}  # binary < labelmap
    return Order(
        kinds,
        seg,
        tuple(dict.fromkeys((*one.report_to, *other.report_to))),
        tuple(dict.fromkeys((*one.critical, *other.critical))),
        one.identified and other.identified,
    )


def shares(made: Sequence[tuple[int, str]], order: Order, destination: str) -> list[tuple[int, int | None]]:
    """Results for one destination as (result, what goes there instead when it is not accepted).

    ``made``: (result id, kind) in the order of sending.
    """
    ids: dict[str, list[int]] = {}
    for result, kind in made:
        ids.setdefault(kind, []).append(result)
    labelmap = order.seg.get(destination) == "labelmap" and LABELMAP in ids
    wanted = order.kinds_for(destination)
    found: list[tuple[int, int | None]] = []
    for result, kind in made:
        if kind not in wanted:
            continue
        alternatives = ids.get(ALTERNATIVE.get(kind, ""), [])  # of several, as many as there are of the kind
        if labelmap and "SEG" in wanted and alternatives:
            found.append((alternatives[ids[kind].index(result)], result))
        else:
            found.append((result, None))
    return found


def with_proposed(order: Order, proposed: Iterable[Condition]) -> Order:
    """``order`` with what a bundle proposes, where a rule takes that up; its own conditions come first."""
    own = [c for c in order.critical if c.key != PROPOSED]
    if len(own) == len(order.critical):
        return order
    return replace(order, critical=tuple(dict.fromkeys((*own, *proposed))))


def dump(order: Order) -> str:
    return json.dumps(asdict(order), sort_keys=True)


def load(text: str | None) -> Order:
    """The stored order; the default one for jobs of a version that had none."""
    if not text:
        return Order()
    data = json.loads(text)
    return Order(
        kinds={d: tuple(k) for d, k in data["kinds"].items()},
        seg=dict(data["seg"]),
        report_to=tuple(data["report_to"]),
        critical=tuple(Condition(**c) for c in data["critical"]),
        identified=data.get("identified", False),
    )


def order_for(
    destinations: Iterable[str],
    kinds: Sequence[str] = DEFAULT_KINDS,
    seg: str = "binary",
    *,
    report_failures: bool = False,
    critical: Sequence[Condition] = (),
    identified: bool = False,
) -> Order:
    """The order of one rule; "" stands for this node where the rule sends to nobody."""
    places = tuple(dict.fromkeys(destinations)) or ("",)
    return Order(
        kinds=dict.fromkeys(places, _in_order(kinds)),
        seg=dict.fromkeys(places, seg) if "SEG" in kinds else {},
        report_to=places if report_failures else (),
        critical=tuple(critical),
        identified=identified,
    )


def _in_order(kinds: Collection[str]) -> tuple[str, ...]:
    return tuple(k for k in KINDS if k in kinds)
