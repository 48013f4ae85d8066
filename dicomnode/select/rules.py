"""Which models run on a series and who gets the results. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dicomnode.index.jobs import PRIORITIES, Request
from dicomnode.orders import Condition, Order, join, order_for
from dicomnode.settings import Range, Rule


def value_matches(value: str, condition: Any) -> bool:
    """One condition of a rule against an attribute's text (values joined by a backslash).

    A list means any of its entries; a text with ``*`` or ``?`` is a glob; a number compares
    as a number; a range is inclusive. Text compares without regard to case and surrounding
    spaces. A multi-valued attribute matches when one of its values does.
    """
    if isinstance(condition, list | tuple):
        return any(value_matches(value, one) for one in condition)
    values = [part.strip() for part in value.split("\\")]
    return any(_one_matches(part, condition) for part in values)


def _one_matches(value: str, condition: Any) -> bool:
    if isinstance(condition, Range):
        return _in_range(value, condition)
    if isinstance(condition, bool):
        return False
    if isinstance(condition, int | float):
        number = _number(value)
        return number is not None and number == float(condition)
    wanted = str(condition).strip()
    if "*" in wanted or "?" in wanted:
        pattern = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in wanted)
        return re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL) is not None
    return value.casefold() == wanted.casefold()


def _in_range(value: str, condition: Range) -> bool:
    bounds = [b for b in (condition.min, condition.max) if b is not None]
    if all(isinstance(b, int | float) for b in bounds):
        number = _number(value)
        if number is None:
            return False
        return not (
            (condition.min is not None and number < float(condition.min))
            or (condition.max is not None and number > float(condition.max))
        )
    if not value:
        return False
    return not (
        (condition.min is not None and value < str(condition.min))
        or (condition.max is not None and value > str(condition.max))
    )


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # NaN would lie within every range


def rule_matches(rule: Rule, attributes: Mapping[str, Any]) -> bool:
    """Whether every condition holds; an attribute that is missing matches only ``"*"`` and ``""``."""
    return all(value_matches(str(attributes.get(key) or ""), wanted) for key, wanted in rule.match.items())


def requests_for(rules: Sequence[Rule], attributes: Mapping[str, Any]) -> list[Request]:
    """One request for each model that a matching rule names, and for each step that has to wait.

    Steps that wait for nothing are like models that a rule names. One that waits comes behind
    those that it follows and has a job of its own, since it may be skipped for its rule alone.
    Rules that name the same model share one analysis: it has the highest of their
    priorities, goes to all their destinations, and all their peers are notified. Each
    destination gets the kinds of objects that its own rules ask for.
    """
    found: dict[str, Request] = {}
    later: list[Request] = []
    for rule in rules:
        if not rule_matches(rule, attributes):
            continue
        free = [_request(rule, model) for model in rule.models]
        for step in rule.ordered_steps:
            asked = _request(rule.of_step(step), step.model, names=(f"{rule.name}/{step.name}",))
            if not step.needs.any:
                free.append(asked)
                continue
            needs = replace(
                step.needs,
                after=tuple(f"{rule.name}/{name}" for name in step.needs.after),
                when=tuple(replace(w, step=f"{rule.name}/{w.step}") for w in step.needs.when),
            )
            later.append(replace(asked, step=asked.names[0], needs=needs))
        for asked in free:
            known = found.get(asked.model)
            found[asked.model] = asked if known is None else _joined(known, asked)
    return [*found.values(), *later]


def _request(rule: Rule, model: str, names: tuple[str, ...] = ()) -> Request:
    return Request(
        model,
        (rule.name,),
        tuple(dict.fromkeys(rule.send_to)),
        rule.priority,
        tuple(dict.fromkeys(rule.notify)),
        order_of(rule),
        names,
    )


def _joined(one: Request, other: Request) -> Request:
    return Request(
        one.model,
        tuple(dict.fromkeys((*one.rules, *other.rules))),
        tuple(dict.fromkeys((*one.destinations, *other.destinations))),
        min(one.priority, other.priority, key=lambda p: PRIORITIES[p]),
        tuple(dict.fromkeys((*one.notify, *other.notify))),
        join(one.order, other.order),
        (*one.names, *other.names),
    )


def order_of(rule: Rule) -> Order:
    """What the rule asks of its jobs."""
    return order_for(
        rule.send_to,
        rule.results,
        rule.seg,
        report_failures=rule.report_failures,
        critical=[_condition(key, wanted) for key, wanted in rule.critical.items()],
    )


def _condition(key: str, wanted: Range | bool | str) -> Condition:
    if isinstance(wanted, Range):
        low, high = (None if bound is None else float(bound) for bound in (wanted.min, wanted.max))
        return Condition(key, low, high)
    return Condition(key, value="*" if wanted is True else str(wanted))
