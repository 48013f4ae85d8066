"""Values against SimpleITK and numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dicomnode.infer.stages.intensity import (
    ClipValues,
    MeanStd,
    MinMax,
    Percentiles,
    ScaleRange,
    Window,
    ZScore,
    mean_and_std,
    percentiles,
)
from tests.infer.stages.stage_case import make_affine, make_frame, phantom, to_sitk

VALUES = phantom()
IMAGE = to_sitk(VALUES.astype(np.float32), make_affine())
BOTH = pytest.mark.parametrize("dtype", [np.int16, np.float32])


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.dtype in (np.float32, np.int16)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@BOTH
def test_clip_is_simpleitk_clamp(dtype: type) -> None:
    out = ClipValues(step="clip", low=-300, high=450).apply(make_frame(VALUES.astype(dtype)))
    close(out.values, sitk.GetArrayFromImage(sitk.Clamp(IMAGE, sitk.sitkFloat32, -300, 450)))
    half = ClipValues(step="clip", low=-300.5, high=450.25).apply(make_frame(VALUES.astype(dtype)))
    close(half.values, np.clip(VALUES.astype(float), -300.5, 450.25))


@BOTH
def test_window_is_simpleitk_intensity_windowing(dtype: type) -> None:
    out = Window(step="window", center=40, width=400, out_low=-1, out_high=1).apply(make_frame(VALUES.astype(dtype)))
    wanted = sitk.IntensityWindowing(IMAGE, windowMinimum=-160, windowMaximum=240, outputMinimum=-1, outputMaximum=1)
    close(out.values, sitk.GetArrayFromImage(wanted))


@BOTH
def test_scale_range_with_and_without_clip(dtype: type) -> None:
    frame = make_frame(VALUES.astype(dtype))
    out = ScaleRange(step="scale_range", low=-57, high=164, clip=False).apply(frame)
    wanted = (VALUES.astype(float) + 57) / 221
    close(out.values, wanted)
    close(ScaleRange(step="scale_range", low=-57, high=164).apply(frame).values, np.clip(wanted, 0, 1))


@BOTH
def test_whole_zscore_is_simpleitk_normalize(dtype: type) -> None:
    out = ZScore(step="zscore").apply(make_frame(VALUES.astype(dtype)))
    wanted = sitk.GetArrayFromImage(sitk.Normalize(IMAGE))  # divides by the sample deviation, n - 1
    np.testing.assert_allclose(out.values, wanted, rtol=1e-4, atol=1e-4)
    assert abs(float(out.values.mean(dtype=np.float64))) < 1e-5
    assert float(out.values.std(dtype=np.float64)) == pytest.approx(1, abs=1e-5)


def test_zscore_over_the_body_and_nonzero() -> None:
    _, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (20, 40, 40)), indexing="ij")
    inside = (y / 15) ** 2 + (x / 15) ** 2 <= 1
    hu = np.where(inside, phantom((20, 40, 40)) // 20, -1000).astype(np.int16)
    hu[:, 18:22, 18:22] = -900  # a cavity belongs to the body
    out = ZScore(step="zscore", over="body", above=-500).apply(make_frame(hu, make_affine(spacing=(2, 2, 2))))
    truth = (hu - hu[inside].mean()) / hu[inside].std()
    scale = float(out.values.astype(float).ravel() @ truth.ravel() / (truth.ravel() @ truth.ravel()))
    assert scale == pytest.approx(1, abs=0.02)
    assert float(out.values[inside].mean()) == pytest.approx(0, abs=0.02)
    sparse = np.where(inside, hu, 0).astype(np.int16)
    got = ZScore(step="zscore", over="nonzero").apply(make_frame(sparse)).values
    part = sparse[sparse != 0].astype(float)
    close(got, np.where(sparse != 0, (sparse - part.mean()) / part.std(), 0))
    constant = ZScore(step="zscore").apply(make_frame(np.full((2, 3, 4), 7, np.int16)))
    assert np.all(constant.values == 0)


@BOTH
def test_mean_std_min_max_percentiles(dtype: type) -> None:
    frame = make_frame(VALUES.astype(dtype))
    wide = VALUES.astype(float)
    close(MeanStd(step="mean_std", mean=77.1, std=141.3).apply(frame).values, (wide - 77.1) / 141.3)
    rescaled = sitk.GetArrayFromImage(sitk.RescaleIntensity(IMAGE, -1, 1))
    close(MinMax(step="min_max", out_low=-1).apply(frame).values, rescaled)
    low, high = np.percentile(wide, [0.5, 99.5])
    wanted = np.clip((wide - low) / (high - low), 0, 1)
    close(Percentiles(step="percentiles", lower=0.5, upper=99.5).apply(frame).values, wanted)
    assert np.all(MinMax(step="min_max", out_low=0.25).apply(make_frame(np.full((2, 2, 2), 5, dtype))).values == 0.25)


@given(
    st.lists(st.integers(-32768, 32767), min_size=1, max_size=60),
    st.floats(0, 100),
)
def test_percentile_by_histogram_is_numpys(numbers: list[int], share: float) -> None:
    values = np.array(numbers, np.int16).reshape(-1, 1, 1)
    got = percentiles(values, (share,))[0]
    wanted = float(np.percentile(values.astype(np.float64), share))
    assert got == pytest.approx(wanted, rel=1e-9, abs=0.02)  # numpy rounds its index in another order


@given(st.integers(-30000, 30000), st.integers(0, 40))
def test_mean_and_deviation_lose_no_digits(offset: int, spread: int) -> None:
    values = (np.random.default_rng(3).integers(-spread, spread + 1, (3, 5, 7)) + offset).astype(np.int32)
    mean, std = mean_and_std(values.transpose(1, 2, 0))
    assert mean == pytest.approx(values.mean(), abs=1e-9)
    assert std == pytest.approx(values.std(), abs=1e-9)


@pytest.mark.parametrize(
    "step",
    [
        ClipValues(step="clip", low=-10.5, high=3),
        Window(step="window", center=0, width=10),
        ScaleRange(step="scale_range", low=0, high=10),
        MeanStd(step="mean_std", mean=1, std=2),
        ZScore(step="zscore"),
        ZScore(step="zscore", over="nonzero"),
        MinMax(step="min_max"),
        Percentiles(step="percentiles", lower=1, upper=99),
    ],
    ids=lambda s: s.step,
)
@BOTH
def test_source_is_never_changed(step: object, dtype: type) -> None:
    values = VALUES.astype(dtype)
    values.flags.writeable = False
    step.apply(make_frame(values))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(values, VALUES)


def test_wrong_parameters_are_refused() -> None:
    for make in (
        lambda: ClipValues(step="clip", low=1, high=1),
        lambda: Window(step="window", center=0, width=0),
        lambda: ScaleRange(step="scale_range", low=2, high=1),
        lambda: Percentiles(step="percentiles", lower=50, upper=50),
        lambda: MeanStd(step="mean_std", mean=0, std=0),
    ):
        with pytest.raises(ValidationError):
            make()
