"""Stacks of slices: order, spacing, and what keeps them from being a volume."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.geometry import SlicePlane, StackReport, analyse_stack, slice_normal

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@st.composite
def orientations(draw: st.DrawFn) -> tuple[float, ...]:
    """Two unit vectors at a right angle, in any direction (oblique)."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    axes, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    return tuple(np.round(np.concatenate([axes[:, 0], axes[:, 1]]), 6).tolist())


def stack(orientation: tuple[float, ...], places: list[float], origin: float = 0.0) -> list[SlicePlane]:
    normal = np.array(slice_normal(orientation))
    return [
        SlicePlane(f"1.2.{n:04d}", tuple((normal * place + origin).tolist()), orientation)  # type: ignore[arg-type]
        for n, place in enumerate(places)
    ]


SPACING = st.floats(0.3, 10)
COUNT = st.integers(3, 40)


@given(orientations(), SPACING, COUNT, st.floats(-500, 500), st.randoms())
def test_shuffled_stack_is_put_in_order(
    orientation: tuple[float, ...], spacing: float, count: int, origin: float, shuffler: random.Random
) -> None:
    planes = stack(orientation, [n * spacing for n in range(count)], origin)
    expected = tuple(p.uid for p in planes)
    shuffler.shuffle(planes)
    report = analyse_stack(planes)
    assert report.order == expected and report.contiguous and report.problems == {}
    assert report.spacing == pytest.approx(spacing, rel=1e-3)
    assert np.linalg.norm(report.normal) == pytest.approx(1.0)


@given(orientations(), SPACING, COUNT)
def test_flipped_columns_reverse_the_order(orientation: tuple[float, ...], spacing: float, count: int) -> None:
    planes = stack(orientation, [n * spacing for n in range(count)])
    flipped = (*orientation[:3], *(-v for v in orientation[3:]))
    turned = [SlicePlane(p.uid, p.position, flipped) for p in planes]  # type: ignore[arg-type]
    assert analyse_stack(turned).order == analyse_stack(planes).order[::-1]
    assert analyse_stack(turned).contiguous


@given(orientations(), SPACING, st.integers(5, 40), st.data())
def test_missing_slices_are_a_gap(
    orientation: tuple[float, ...], spacing: float, count: int, data: st.DataObject
) -> None:
    planes = stack(orientation, [n * spacing for n in range(count)])
    del planes[data.draw(st.integers(1, count - 2))]
    report = analyse_stack(planes)
    assert set(report.problems) == {"GAP"} and not report.contiguous
    assert "about 1 slice(s) missing" in report.problems["GAP"]


@given(orientations(), SPACING, COUNT, st.data())
def test_duplicate_position(orientation: tuple[float, ...], spacing: float, count: int, data: st.DataObject) -> None:
    planes = stack(orientation, [n * spacing for n in range(count)])
    twin = planes[data.draw(st.integers(0, count - 1))]
    report = analyse_stack([*planes, SlicePlane("9.9", twin.position, twin.orientation)])
    assert set(report.problems) == {"DUPLICATE_POSITION"}
    assert report.spacing == pytest.approx(spacing, rel=1e-3)


@given(orientations(), SPACING, COUNT)
def test_one_slice_turned(orientation: tuple[float, ...], spacing: float, count: int) -> None:
    planes = stack(orientation, [n * spacing for n in range(count)])
    turned = (*orientation[3:], *orientation[:3])
    planes[-1] = SlicePlane(planes[-1].uid, planes[-1].position, turned)  # type: ignore[arg-type]
    assert "MIXED_ORIENTATION" in analyse_stack(planes).problems


def test_uneven_steps() -> None:
    assert set(analyse_stack(stack(AXIAL, [0, 1, 2, 3.2, 4.2])).problems) == {"NON_UNIFORM"}
    assert analyse_stack(stack(AXIAL, [0, 1, 2.01, 3, 4])).contiguous, "rounded by the scanner"


def test_edges() -> None:
    assert analyse_stack([]) == StackReport((), (0.0, 0.0, 0.0), 0.0, {})
    single = analyse_stack(stack(AXIAL, [5.0]))
    assert single.order == ("1.2.0000",) and not single.contiguous and single.problems == {}
    assert set(analyse_stack(stack(AXIAL, [1.0, 1.0])).problems) == {"DUPLICATE_POSITION"}
    parallel = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    assert set(analyse_stack(stack(parallel, [0.0, 1.0])).problems) == {"MIXED_ORIENTATION"}
    assert slice_normal(AXIAL) == (0.0, 0.0, 1.0), "axial, head first, supine: to the head"


def test_mixed_orientation_counts_the_minority_wherever_it_stands() -> None:
    straight = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    tilted = (1.0, 0.0, 0.0, 0.0, 0.9397, -0.3420)
    planes = [
        SlicePlane(str(n), (0.0, 0.0, float(n)), tilted if n < 3 else straight)  # the odd ones come first
        for n in range(10)
    ]
    assert "3 of 10" in analyse_stack(planes).problems["MIXED_ORIENTATION"]
