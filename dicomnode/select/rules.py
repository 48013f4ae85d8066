"""Which models run on a series and who gets the results. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dicomnode.conditions import all_match
from dicomnode.index.jobs import PRIORITIES, Request
from dicomnode.orders import Condition, Order, join, order_for
from dicomnode.settings import Range, Rule


def rule_matches(rule: Rule, attributes: Mapping[str, Any]) -> bool:
    """Whether every condition holds; an attribute that is missing matches only ``"*"`` and ``""``."""
    return all_match(rule.match, attributes)


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
        free = [_request(rule, model) for model in rule.models if rule.prior is None]
        for step in rule.ordered_steps:
            asked = _request(rule.of_step(step), step.model, names=(f"{rule.name}/{step.name}",))
            if not step.needs.any:
                free.append(asked)
                continue
            needs = replace(
                step.needs,
                after=tuple(f"{rule.name}/{name}" for name in step.needs.after),
                masks={name: f"{rule.name}/{ref}" for name, ref in step.needs.masks.items()},
                when=tuple(replace(w, step=f"{rule.name}/{w.step}") if w.step else w for w in step.needs.when),
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
        identified=rule.cloud_identity == "kept",
    )


def _condition(key: str, wanted: Range | bool | str) -> Condition:
    if isinstance(wanted, Range):
        low, high = (None if bound is None else float(bound) for bound in (wanted.min, wanted.max))
        return Condition(key, low, high)
    return Condition(key, value="*" if wanted is True else str(wanted))
