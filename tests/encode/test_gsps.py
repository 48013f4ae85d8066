"""Presentation states: outlines on their slice, and each slice shown as it shows itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicomnode.encode import encode_results
from dicomnode.encode.annotations import MOST_POINTS, shortened
from dicomnode.encode.contours import outlines
from dicomnode.encode.picture import Display
from dicomnode.encode.softcopy import transformation_of
from dicomnode.errors import UnsuitableSeries
from dicomnode.orders import order_for
from tests.encode.encode_case import Case, read
from tests.encode.source_case import SOURCES, case_of, ct, mr
from tests.encode.test_kinds import errors


def gsps(case: Case, tmp_path: Path) -> Dataset:
    order = order_for(["pacs"], ["GSPS"])
    (one,) = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station, order=order)
    path = tmp_path / "state.dcm"
    path.write_bytes(one.part10)
    assert errors(path) == []
    return read(one.part10)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["ct", "enhanced-mr"])
def test_outlines_lie_on_the_slice_that_they_were_found_on(name: str, tmp_path: Path) -> None:
    case = case_of(SOURCES[name](), tmp_path)
    state = gsps(case, tmp_path)
    analysis = case.analysis
    frames = analysis.source_frames or (None,) * len(analysis.source_uids)
    index = {place: i for i, place in enumerate(zip(analysis.source_uids, frames, strict=True))}
    layers = {layer.GraphicLayer: n for n, layer in enumerate(state.GraphicLayerSequence, start=1)}
    seen = set()
    for item in state.GraphicAnnotationSequence:
        (image,) = item.ReferencedImageSequence
        number = index[image.ReferencedSOPInstanceUID, image.get("ReferencedFrameNumber")]
        segment = layers[item.GraphicLayer]
        seen.add((number, segment))
        drawn = [np.array(o.GraphicData, np.float32).reshape(-1, 2) for o in item.GraphicObjectSequence]
        wanted = outlines(analysis.labels[number] == segment)
        assert len(drawn) == len(wanted)
        for polygon, other, graphic in zip(drawn, wanted, item.GraphicObjectSequence, strict=True):
            np.testing.assert_array_equal(polygon, other)
            assert graphic.NumberOfGraphicPoints == len(other)
            assert graphic.TrackingUID == case.identity.tracking_uids[segment]
    assert seen == {(n, int(s)) for n, plane in enumerate(analysis.labels) for s in np.unique(plane) if s}


def shown(stored: np.ndarray, slope: float, intercept: float, window: tuple[float, float] | None) -> np.ndarray:
    """Grey of 0..1 (PS3.3 C.11.2.1.2.1)."""
    values = stored * slope + intercept
    return values if window is None else np.clip((values - (window[0] - 0.5)) / (window[1] - 1) + 0.5, 0, 1)


def window_in(state: Dataset, uid: str) -> tuple[float, float] | None:
    for item in state.get("SoftcopyVOILUTSequence", []):
        images = item.get("ReferencedImageSequence")
        if images is None or uid in {i.ReferencedSOPInstanceUID for i in images}:
            return float(item.WindowCenter), float(item.WindowWidth)
    return None


@pytest.mark.peers
@pytest.mark.parametrize("rescale", [False, True], ids=["windows", "rescale"])
def test_each_slice_is_shown_as_it_shows_itself(rescale: bool, tmp_path: Path) -> None:
    datasets = mr() if rescale else ct()
    for number, ds in enumerate(datasets):
        ds.WindowCenter, ds.WindowWidth = 100 + 40 * (number // 2), 300 + number // 2
        if rescale:
            ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 0.5 + number, -3 * number, "US"
    del datasets[3].WindowCenter
    state = gsps(case_of(datasets, tmp_path), tmp_path)
    assert ("RescaleSlope" in state) is not rescale
    common = float(state.get("RescaleSlope", 1)), float(state.get("RescaleIntercept", 0))
    stored = np.arange(-50, 900, 7.0)
    named = {i.ReferencedSOPInstanceUID for i in state.ReferencedSeriesSequence[0].ReferencedImageSequence}
    for number, ds in enumerate(datasets):
        if ds.SOPInstanceUID not in named:
            continue
        window = window_in(state, ds.SOPInstanceUID)
        if number == 3:
            assert window is None
            continue
        own = shown(stored, float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0)),
                    (float(ds.WindowCenter), float(ds.WindowWidth)))  # fmt: skip
        np.testing.assert_allclose(shown(stored, *common, window), own, atol=1e-5)
    assert {
        i.ReferencedSOPInstanceUID for v in state.SoftcopyVOILUTSequence for i in v.ReferencedImageSequence
    } <= named


def test_one_window_for_all_is_said_once(tmp_path: Path) -> None:
    state = gsps(case_of(ct(), tmp_path), tmp_path)
    (item,) = state.SoftcopyVOILUTSequence
    assert "ReferencedImageSequence" not in item and (item.WindowCenter, item.WindowWidth) == (300, 800)


def test_a_window_that_is_no_number_costs_the_window_and_not_the_result(tmp_path: Path) -> None:
    datasets = ct()
    case = case_of(datasets, tmp_path)
    for source in case.sources:
        part10 = source.path.read_bytes()
        assert b"300.0\\40.0" in part10
        source.path.write_bytes(part10.replace(b"300.0\\40.0", b"NOTHING\\40"))
    assert "SoftcopyVOILUTSequence" not in gsps(case, tmp_path)


displays = st.builds(
    Display,
    slope=st.floats(0.01, 100),
    intercept=st.floats(-2000, 2000),
    window=st.none() | st.tuples(st.floats(-1000, 3000), st.floats(2, 4000)),
)


@given(st.lists(displays, min_size=1, max_size=5))
def test_windows_mean_the_same_in_stored_values(items: list[Display]) -> None:
    found = transformation_of(items)
    slope, intercept = found.rescale or (1.0, 0.0)
    for display, number in zip(items, found.of_image, strict=True):
        assert (number is None) == (display.window is None)
        if number is None or display.window is None:
            continue
        low, high = (display.window[0] - 0.5 + side * (display.window[1] - 1) / 2 for side in (-1, 1))
        stored = (np.array([low, high]) - display.intercept) / display.slope
        grey = shown(stored, slope, intercept, found.windows[number])
        np.testing.assert_allclose(grey, [0, 1], atol=1e-3)


def test_slopes_of_which_one_is_negative_are_refused() -> None:
    with pytest.raises(UnsuitableSeries, match="not all slopes are positive"):
        transformation_of([Display(window=(1, 2)), Display(slope=-1.0, window=(1, 2))])


@given(st.integers(5, 60_000))
def test_a_long_outline_fits_its_element_and_stays_closed(points: int) -> None:
    polygon = np.stack([np.arange(points), np.arange(points)], axis=1).astype(np.float32)
    polygon[-1] = polygon[0]
    short = shortened(polygon)
    assert len(short) <= MOST_POINTS + 1 and np.array_equal(short[0], short[-1])
    assert len(short) * 8 <= 65534 and (points > MOST_POINTS or short is polygon)
