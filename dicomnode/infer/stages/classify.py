"""Scores of a network as calibrated probabilities and coded findings."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from dicomnode.infer.contract import Strict

Scores = npt.NDArray[np.float64]


class Temperature(Strict):
    """Logits are divided by ``temperature`` before the activation (Guo et al., ICML 2017)."""

    kind: Literal["temperature"]
    temperature: float = Field(gt=0)


class Platt(Strict):
    """p = 1 / (1 + exp(-(slope * score + offset))) of the raw score (Platt 1999); takes the
    place of the activation."""

    kind: Literal["platt"]
    slope: float = Field(gt=0)
    offset: float


class Isotonic(Strict):
    """A table of (activated score, probability), linear in between, constant outside.

    Both columns ascend (Zadrozny and Elkan, KDD 2002), so ranking is kept.
    """

    kind: Literal["isotonic"]
    scores: tuple[float, ...] = Field(min_length=2, max_length=4096)
    probabilities: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(min_length=2, max_length=4096)

    @model_validator(mode="after")
    def _ascending(self) -> Isotonic:
        if len(self.scores) != len(self.probabilities):
            raise ValueError("scores and probabilities must have the same length")
        if any(b <= a for a, b in zip(self.scores, self.scores[1:], strict=False)):
            raise ValueError("scores must ascend strictly")
        if any(b < a for a, b in zip(self.probabilities, self.probabilities[1:], strict=False)):
            raise ValueError("probabilities must not descend")
        return self


Calibration = Annotated[Temperature | Platt | Isotonic, Field(discriminator="kind")]
ActivationName = Literal["softmax", "sigmoid", "none"]


def probability(scores: Scores, index: int, activation: ActivationName, calibration: Calibration | None) -> float:
    """Probability of class ``index``; ``scores``: float64 (classes,), logits unless ``activation`` is none.

    Raises ValueError when the result is no number of 0..1.
    """
    if isinstance(calibration, Platt):
        return _sigmoid(calibration.slope * float(scores[index]) + calibration.offset)
    if isinstance(calibration, Temperature):
        scores = scores / calibration.temperature
    if activation == "softmax":
        powers = np.exp(scores - scores.max())
        value = float(powers[index] / powers.sum())
    else:
        value = _sigmoid(float(scores[index])) if activation == "sigmoid" else float(scores[index])
    if isinstance(calibration, Isotonic):
        value = float(np.interp(value, calibration.scores, calibration.probabilities))
    if not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError("it is no probability; the activation does not fit the network")
    return min(1.0, max(0.0, value))


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    power = math.exp(x)
    return power / (1.0 + power)
