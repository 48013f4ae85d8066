"""ct-lung on a real chest CT, checked against SimpleITK as an independent reader and counter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dicomnode.infer.decode import PoolDecoder
from dicomnode.infer.golden import open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.pipeline import run_bundle
from dicomnode.infer.volume import read_volume
from tests.infer.infer_case import DATA, MODEL

SERIES = DATA / "ct-chest-ricord"


@pytest.mark.slow
@pytest.mark.skipif(not SERIES.is_dir(), reason="shared/data/ct-chest-ricord is absent")
def test_real_chest_ct(tmp_path: Path) -> None:
    model = open_model(MODEL, OnnxRuntimeCpu(), threads=1)
    paths = sorted(SERIES.glob("*.dcm"))
    with PoolDecoder(2) as pool:
        volume = read_volume(paths, model.bundle.manifest.input, decoder=pool)
    analysis = run_bundle(model.bundle, model.session, volume)
    assert analysis.labels is not None

    names = [str(p) for p in paths]
    names.sort(key=lambda n: float(sitk.ReadImage(n).GetOrigin()[2]))
    image = sitk.ReadImage(names)
    truth = sitk.GetArrayFromImage(image)
    truth[truth == -3024] = -1024  # Pixel Padding Value -2000
    np.testing.assert_array_equal(volume.values, truth)
    image.SetSpacing((volume.spacing[2], volume.spacing[1], volume.spacing[0]))
    labels = sitk.GetImageFromArray(analysis.labels)
    labels.CopyInformation(image)
    shape, intensity = sitk.LabelShapeStatisticsImageFilter(), sitk.LabelStatisticsImageFilter()
    shape.Execute(labels)
    intensity.Execute(image, labels)
    for segment in analysis.segments:
        found = {m.key: m.value for m in analysis.measurements if m.segment == segment.number}
        assert found["volume_ml"] == pytest.approx(shape.GetPhysicalSize(segment.number) / 1000, rel=1e-3)
        assert found["mean_hu"] == pytest.approx(intensity.GetMean(segment.number), rel=1e-3)

    by_label = {s.label: s.number for s in analysis.segments}
    assert set(by_label) == {"Right lung", "Left lung"}
    # the patient's right lies at smaller LPS x
    assert shape.GetCentroid(by_label["Right lung"])[0] < shape.GetCentroid(by_label["Left lung"])[0]
    # looked at by eye once (see the model card); stomach gas and trachea must stay out
    assert shape.GetPhysicalSize(by_label["Right lung"]) / 1000 == pytest.approx(1257, rel=0.02)
    assert shape.GetPhysicalSize(by_label["Left lung"]) / 1000 == pytest.approx(1426, rel=0.02)
    assert not analysis.labels[:25].any(), "stomach and bowel gas is no lung"
