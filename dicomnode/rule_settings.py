"""Which series get which models: the sections [[rules]] and [[rules.steps]]."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dicomnode.chains import Needs, When, circle, in_order
from dicomnode.orders import PROPOSED
from dicomnode.peer_settings import Section
from dicomnode.priors import INDEX, Wish

Priority = Literal["stat", "routine", "batch"]
MatchScalar = str | int | float
Kind = Literal["SEG", "SR", "GSPS", "SC", "KOS", "PM"]
Ended = Literal["done", "skipped", "refused", "failed", "not-run"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$"


def checked_keywords(value: dict[str, Any]) -> dict[str, Any]:
    """Conditions go by DICOM keyword."""
    from pydicom.datadict import tag_for_keyword

    for keyword in value:
        if tag_for_keyword(keyword) is None:
            raise ValueError(f"'{keyword}' is not a DICOM keyword (PS3.6), e.g. Modality or BodyPartExamined")
    return value


class Range(Section):
    """Inclusive range; numbers compare as numbers, text (dates) as text."""

    min: float | str | None = None
    max: float | str | None = None

    @model_validator(mode="after")
    def _one_given(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        return self


class PriorWish(Section):
    """An earlier study of the same patient, found by Patient ID and issuer or birth date."""

    match: dict[str, MatchScalar | tuple[MatchScalar, ...] | Range] = Field(
        default_factory=dict, description="as in the rule; none: the same Modality"
    )
    max_age_days: float | None = Field(None, gt=0, description="how much older it may be")
    sources: tuple[str, ...] = Field(
        (INDEX,), alias="from", min_length=1, description="'index' (what this node holds) and names of peers, in order"
    )
    wait_seconds: float = Field(300.0, gt=0, description="then the work goes on without it")
    compare: bool = Field(True, description="the model runs on it, too, and the SR says what has changed")

    _check = field_validator("match")(checked_keywords)

    @property
    def wish(self) -> Wish:
        match = self.model_dump(mode="json")["match"]
        return Wish(match, self.max_age_days, self.sources, self.wait_seconds, self.compare)


class StepCondition(Section):
    """What must be so of an earlier step, or of the earlier study; exactly one question."""

    step: str = Field("", description="name of the earlier step of the same rule")
    prior: bool | None = Field(None, description="without step: whether the earlier study was found")
    measurement: str = Field("", description="key of a measurement, with min, max or both")
    finding: str = Field("", description="key of a finding, with value, or min and max of its probability")
    segment: str = Field("", description="label of the segment that is measured; alone: that it was found")
    found: bool | None = Field(None, description="with segment alone: false asks that it was not found")
    value: bool | str = Field("", description="of a finding: true (positive), or a code or meaning")
    min: float | None = Field(None, description="least value, inclusive")
    max: float | None = Field(None, description="greatest value, inclusive")
    ended: tuple[Ended, ...] = Field((), description="how the step ended: done skipped refused failed not-run")

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        bounds = self.min is not None or self.max is not None
        if self.prior is not None:
            if self.model_fields_set != {"prior"}:
                raise ValueError("prior: it stands alone, without step and values")
            return self
        if not self.step:
            raise ValueError("give step, the name of an earlier step, or prior = true")
        asked = [bool(self.measurement), bool(self.finding), bool(self.ended)]
        if sum(asked) + (bool(self.segment) and not self.measurement) != 1:
            raise ValueError("ask one thing of the step: measurement, finding, segment or ended")
        if self.measurement and (not bounds or self.value):
            raise ValueError(f"measurement '{self.measurement}': give min, max or both")
        if self.finding and bounds == bool(self.value):
            raise ValueError(f"finding '{self.finding}': give value (true, a code or a meaning), or min and max")
        if self.segment and not self.measurement and (bounds or self.value):
            raise ValueError(f"segment '{self.segment}': min and max need a measurement; alone it may have found")
        if self.ended and (bounds or self.value):
            raise ValueError("ended: it has no value, min or max")
        if self.found is not None and (not self.segment or self.measurement):
            raise ValueError("found: it goes with segment alone")
        return self

    @property
    def when(self) -> When:
        return When(
            step=self.step,
            ended=self.ended,
            measurement=self.measurement,
            finding=self.finding,
            segment=self.segment,
            found=self.found is not False,
            value="*" if self.value is True else self.value or "",
            minimum=self.min,
            maximum=self.max,
            prior=self.prior,
        )


class RuleStep(Section):
    name: str = Field(pattern=NAME, description="shown with its job; other steps name it")
    model: str = Field(min_length=1, description="bundle name, or name@version")
    after: tuple[str, ...] = Field((), description="steps that have to end before it; none: side by side")
    when: tuple[StepCondition, ...] = Field((), description="conditions that must all hold, else it is skipped")
    prior: PriorWish | None = Field(None, description="an earlier study that it wants; none: that of the rule")
    inputs: dict[str, dict[str, MatchScalar | tuple[MatchScalar, ...] | Range]] = Field(
        default_factory=dict, description="further series of the study: the model's name for it -> conditions"
    )
    inputs_wait_seconds: float = Field(600.0, gt=0, description="for a complete series for each of inputs")
    masks: dict[str, str] = Field(
        default_factory=dict, description="masks as inputs: the model's name for it -> step, or step:segment label"
    )
    send_to: tuple[str, ...] | None = Field(None, description="as in the rule, which it replaces for this step")
    results: tuple[Kind, ...] | None = Field(
        None, min_length=1, description="as in the rule, which it replaces for this step"
    )

    @field_validator("inputs")
    @classmethod
    def _conditions(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, conditions in value.items():
            if not conditions:
                raise ValueError(f"'{name}': give conditions, or any series of the study is taken")
            checked_keywords(conditions)
        return value

    @property
    def needs(self) -> Needs:
        return Needs(
            self.after,
            tuple(c.when for c in self.when),
            self.prior.wish if self.prior else None,
            self.model_dump(mode="json", include={"inputs"}).get("inputs", {}),
            self.inputs_wait_seconds,
            self.masks,
        )


class Rule(Section):
    name: str = Field(pattern=NAME, description="shown with each job")
    match: dict[str, MatchScalar | tuple[MatchScalar, ...] | Range] = Field(
        default_factory=dict, description="DICOM keyword -> value, list of values, glob or {min, max}"
    )
    models: tuple[str, ...] = Field((), description="bundle names, or name@version, each by itself; else steps")
    steps: tuple[RuleStep, ...] = Field((), description="models one after another or side by side; else models")
    prior: PriorWish | None = Field(None, description="an earlier study that each model or step wants")
    priority: Priority = Field("routine", description="stat before routine before batch")
    send_to: tuple[str, ...] = Field((), description="peer names that get the results")
    notify: tuple[str, ...] = Field((), description="peer names that are told where the results are (IAN)")
    results: tuple[Kind, ...] = Field(
        ("SEG", "SR"), min_length=1, description="kinds of objects that are made and sent"
    )
    seg: Literal["binary", "labelmap"] = Field(
        "binary", description="labelmap: a peer that refuses Label Map Segmentation gets the binary SEG instead"
    )
    report_failures: bool = Field(False, description="an SR says why where an analysis failed or was impossible")
    critical: dict[str, Range | bool | str] = Field(
        default_factory=dict,
        description="key of a measurement or finding -> {min, max}, true, or a coded value; '*' -> true: the bundle's",
    )
    cloud_identity: Literal["removed", "kept"] = Field(
        "removed", description="whether results and records leave for the cloud with the patient's identity"
    )

    @property
    def every_model(self) -> tuple[str, ...]:
        """Every bundle that the rule may run, as it is named."""
        return tuple(dict.fromkeys((*self.models, *(s.model for s in self.steps))))

    @property
    def prior_peers(self) -> tuple[str, ...]:
        """Peers that are asked for earlier studies."""
        return tuple(dict.fromkeys(s for p in self.priors for s in p.sources if s != INDEX))

    @property
    def keywords(self) -> tuple[str, ...]:
        """DICOM keywords that its conditions look at."""
        matches = [self.match, *(p.match for p in self.priors), *(i for s in self.steps for i in s.inputs.values())]
        return tuple(dict.fromkeys(k for match in matches for k in match))

    @property
    def destinations(self) -> tuple[str, ...]:
        """Every peer that may get a result of the rule."""
        return tuple(dict.fromkeys((*self.send_to, *(d for s in self.steps for d in s.send_to or ()))))

    @property
    def ordered_steps(self) -> tuple[RuleStep, ...]:
        """Each behind those that it follows; a model that wants an earlier study is a step, too."""
        if self.models:
            return tuple(RuleStep.model_construct(name=m, model=m, prior=self.prior) for m in self.models if self.prior)
        by_name = {s.name: s.model_copy(update={"prior": s.prior or self.prior}) for s in self.steps}
        return tuple(by_name[name] for name in in_order({s.name: s.needs.steps for s in self.steps}))

    @property
    def priors(self) -> tuple[PriorWish, ...]:
        """Every wish for an earlier study."""
        return tuple(p for p in (self.prior, *(s.prior for s in self.steps)) if p is not None)

    def of_step(self, step: RuleStep) -> Rule:
        """The rule as it is for one of its steps."""
        own = {"send_to": step.send_to, "results": step.results}
        return self.model_copy(update={k: v for k, v in own.items() if v is not None})

    @field_validator("models")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one bundle, or leave it out and give [[rules.steps]]")
        return value

    @field_validator("steps")
    @classmethod
    def _chain(cls, value: tuple[RuleStep, ...]) -> tuple[RuleStep, ...]:
        names = [s.name for s in value]
        if len(set(names)) != len(names):
            raise ValueError("two steps have the same name; names within a rule must differ")
        for step in value:
            for other in step.needs.steps:
                if other == step.name:
                    raise ValueError(f"step '{step.name}' names itself under after or when")
                if other not in names:
                    raise ValueError(f"step '{step.name}' names step '{other}', which the rule lacks")
        found = circle({s.name: s.needs.steps for s in value})
        if found:
            raise ValueError(f"steps wait for one another: {' -> '.join(found)}; take one 'after' or 'when' out")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.models) == bool(self.steps):
            raise ValueError(f"rule '{self.name}': give models (each by itself) or [[rules.steps]], and not both")
        kinds = {s.name: s.results or self.results for s in self.steps}
        for step in self.steps:
            for ref in step.masks.values():
                if "SEG" not in kinds[ref.partition(":")[0]]:
                    raise ValueError(f"step '{step.name}' takes the mask of '{ref}', whose results lack SEG; add it")
            if any(c.prior is not None for c in step.when) and not (step.prior or self.prior):
                raise ValueError(f"step '{step.name}' has a condition on prior; give it prior = {{ ... }}, or the rule")
        return self

    @field_validator("critical")
    @classmethod
    def _conditions(cls, value: dict[str, Range | bool | str]) -> dict[str, Range | bool | str]:
        for key, condition in value.items():
            if key == PROPOSED:
                if condition is not True:
                    raise ValueError(f"'{PROPOSED}': true takes up what the model's bundle proposes; else leave it out")
            elif isinstance(condition, Range):
                if any(isinstance(bound, str) for bound in (condition.min, condition.max)):
                    raise ValueError(f"'{key}': min and max must be numbers")
            elif not condition or condition == "*":
                raise ValueError(f"'{key}': give {{ min, max }}, true, or a code or meaning")
        return value

    _check = field_validator("match")(checked_keywords)
