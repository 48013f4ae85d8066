"""From the file of a single image to grey values: each transformation by numbers, each refusal by its reason."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from pydicom.dataset import Dataset

from dicomnode.critical import critical_hits
from dicomnode.errors import MalformedDataSet, NodeError, UnsuitableSeries
from dicomnode.infer.decode import decode_frame
from dicomnode.infer.golden import ReadyModel, open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.projection_header import pixel_size, projection_header_of, refusal
from dicomnode.infer.projections import read_projections
from dicomnode.infer.summary import measurement as measurement_summary
from dicomnode.orders import Condition
from dicomnode.records import SourceInstance
from tests.infer.radiograph_case import CLASSES, contract, image, numbered, saved
from tests.infer.stages.bundle_case import golden, manifest, measurement, npy, onnx_bytes, segment, write

PLANE = np.array([[0, 1000, 2000], [3000, 4000, 4095]], np.uint16)
SMALL = contract(min_side=2)


def read(tmp_path: Path, ds: Dataset, **changes: Any) -> Any:
    found = read_projections([saved(ds, tmp_path)], contract(**{"min_side": 2, **changes}))
    (volume,) = found.images
    return volume


def item(**values: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def lut(entries: list[int], first: int, bits: int) -> Dataset:
    ds = item(LUTDescriptor=[len(entries), first, bits])
    ds["LUTDescriptor"].VR = "US"
    ds.add_new("LUTData", "US", entries)
    return ds


def test_values_are_as_stored_where_nothing_transforms_them(tmp_path: Path) -> None:
    volume = read(tmp_path, image(PLANE))
    assert volume.values.shape == (1, 2, 3)
    assert volume.values.dtype == np.float32
    np.testing.assert_array_equal(volume.values[0], PLANE)
    assert volume.projection.white == 4095


def test_monochrome1_is_turned_about_the_whole_range_not_about_what_occurs(tmp_path: Path) -> None:
    volume = read(
        tmp_path, image(PLANE[:, :2], PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    )
    np.testing.assert_array_equal(volume.values[0], 4095.0 - PLANE[:, :2])


def test_rescale_is_applied_and_black_is_zero(tmp_path: Path) -> None:
    volume = read(tmp_path, image(PLANE, RescaleSlope=0.5, RescaleIntercept=-100))
    np.testing.assert_allclose(volume.values[0], PLANE * 0.5)
    assert volume.projection.white == pytest.approx(4095 * 0.5)
    inverse = read(tmp_path, image(PLANE, RescaleSlope=-1, RescaleIntercept=4095))
    np.testing.assert_array_equal(inverse.values[0], 4095.0 - PLANE)


@pytest.mark.parametrize("bits", [8, 10, 16])
def test_modality_lut_takes_the_place_of_rescale(tmp_path: Path, bits: int) -> None:
    table = [min(255, value // 16) for value in range(4096)]
    volume = read(
        tmp_path, image(PLANE, ModalityLUTSequence=[lut(table, 0, bits)], RescaleSlope=None, RescaleIntercept=None)
    )
    np.testing.assert_array_equal(volume.values[0], np.minimum(PLANE // 16, 255))
    assert volume.projection.white == 2**bits - 1


def test_a_window_is_applied_only_where_it_is_asked_for(tmp_path: Path) -> None:
    windowed = image(PLANE, WindowCenter=2048, WindowWidth=2001, VOILUTFunction="LINEAR")
    np.testing.assert_array_equal(read(tmp_path, windowed).values[0], PLANE)
    shown = read(tmp_path, windowed, values="displayed")
    wanted = np.clip((PLANE - 2047.5) / 2000 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(shown.values[0], wanted, atol=1e-6)
    assert shown.projection.white == 1
    windowed.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_allclose(read(tmp_path, windowed, values="displayed").values[0], 1 - wanted, atol=1e-6)


def test_a_voi_lut_goes_before_a_window(tmp_path: Path) -> None:
    table = [1023 - value // 4 for value in range(4096)]
    ds = image(PLANE, VOILUTSequence=[lut(table, 0, 10)], WindowCenter=10, WindowWidth=10)
    np.testing.assert_allclose(read(tmp_path, ds, values="displayed").values[0], (1023 - PLANE // 4) / 1023, atol=1e-6)


def test_padding_is_black_and_marked(tmp_path: Path) -> None:
    ds = image(PLANE, PixelPaddingValue=4095, PhotometricInterpretation="MONOCHROME2")
    volume = read(tmp_path, ds)
    assert volume.values[0, 1, 2] == 0
    assert volume.projection.valid.tolist() == [[True, True, True], [True, True, False]]
    assert read(tmp_path, image(PLANE)).projection.valid is None


def test_a_table_that_cannot_be_applied_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableSeries) as caught:
        read(tmp_path, image(PLANE, WindowCenter=0, WindowWidth=0), values="displayed")
    assert caught.value.code == "BAD_GREYSCALE"
    with pytest.raises(UnsuitableSeries, match="slope of the image is 0"):
        read(tmp_path, image(PLANE, RescaleSlope=0, RescaleIntercept=0))


@pytest.mark.parametrize(
    ("attributes", "mm", "in_patient", "words"),
    [
        ({}, None, False, ""),
        ({"ImagerPixelSpacing": [0.2, 0.3]}, (0.2, 0.3), False, "at the detector"),
        ({"PixelSpacing": [0.2, 0.3]}, (0.2, 0.3), False, "not calibrated"),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.2, 0.2]}, (0.2, 0.2), False, "at the detector"),
        ({"PixelSpacing": [0.18, 0.18], "ImagerPixelSpacing": [0.2, 0.2]}, (0.18, 0.18), True, "not said how"),
        (
            {"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "FIDUCIAL"},
            (0.2, 0.2), True, "known size",
        ),
        (
            {"PixelSpacing": [0.18, 0.18], "ImagerPixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "GEOMETRY"},
            (0.18, 0.18), True, "geometric magnification",
        ),
        (
            {"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 1.25},
            (0.16, 0.16), True, "magnification of 1.25",
        ),
        ({"ImagerPixelSpacing": [0, 0.2]}, None, False, ""),
    ],
)  # fmt: skip
def test_the_size_of_a_pixel_says_where_it_was_measured(
    attributes: dict[str, Any], mm: tuple[float, float] | None, in_patient: bool, words: str
) -> None:
    found = pixel_size(item(**attributes))
    if mm is None:
        assert found is None
        return
    assert found is not None
    assert (found.mm, found.in_patient) == (pytest.approx(mm), in_patient)
    assert words in found.source


@pytest.mark.parametrize(
    ("attributes", "changes", "code"),
    [
        ({"Modality": "MG"}, {}, "WRONG_MODALITY"),
        ({"PresentationIntentType": "FOR PROCESSING"}, {}, "FOR_PROCESSING"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1.1", "PresentationIntentType": None}, {}, "FOR_PROCESSING"),
        ({}, {"intents": ("FOR PROCESSING",)}, "FOR_PRESENTATION"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, {}, "WRONG_SOP_CLASS"),
        ({"NumberOfFrames": 2}, {}, "MULTI_FRAME"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, {}, "NOT_GREYSCALE"),
        ({"Rows": 0}, {}, "NO_PIXEL_DATA"),
        ({}, {"max_pixels": 5}, "TOO_LARGE"),
        ({}, {"min_side": 16}, "TOO_SMALL"),
        ({"PixelSpacing": None, "ImagerPixelSpacing": None}, {"needs_spacing": True}, "NO_SPACING"),
        ({}, {"needs_spacing": True, "pixel_spacing_mm": (0.3, 1.0)}, "SPACING_OUT_OF_RANGE"),
        ({"BodyPartExamined": "HAND"}, {"body_parts": ("CHEST",)}, "WRONG_BODY_PART"),
        ({"ViewPosition": "LL"}, {"views": ("PA", "AP")}, "WRONG_VIEW"),
        (
            {"ViewPosition": None, "ViewCodeSequence": [item(CodeValue="399173006")]},
            {"views": ("PA", "AP")}, "WRONG_VIEW",
        ),
    ],
)  # fmt: skip
def test_an_image_that_is_not_taken_says_why(attributes: dict[str, Any], changes: dict[str, Any], code: str) -> None:
    header = projection_header_of(image(PLANE, **attributes))
    why = refusal(header, contract(**{"min_side": 2, **changes}))
    assert why is not None
    assert why[0] == code
    assert len(why[1]) > 20


def test_what_the_header_does_not_state_is_taken_and_noted(tmp_path: Path) -> None:
    ds = image(PLANE, ViewPosition=None, BodyPartExamined=None, PatientOrientation=None)
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
    volume = read(tmp_path, ds, views=("PA",), body_parts=("CHEST",))
    text = " ".join(volume.notes)
    for words in ("Patient Orientation", "which part of the body", "its view", "Relationship LOG, sign -1"):
        assert words in text
    np.testing.assert_array_equal(volume.affine[:3, 2] / volume.spacing[2], [1, 0, 0])


def test_directions_are_those_of_patient_orientation(tmp_path: Path) -> None:
    volume = read(
        tmp_path, image(PLANE, PatientOrientation=["R", "F"], PixelSpacing=[0.1, 0.2], ImagerPixelSpacing=None)
    )
    np.testing.assert_allclose(volume.affine[:3, 2], [-0.2, 0, 0])
    np.testing.assert_allclose(volume.affine[:3, 1], [0, 0, -0.1])


def test_each_image_of_a_series_is_one_input_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    first = numbered(image(PLANE), 2)
    side = numbered(image(PLANE, ViewPosition="LL"), 3)
    second = numbered(image(np.ascontiguousarray(PLANE.T)), 1)
    paths = [saved(ds, tmp_path, f"{i}.dcm") for i, ds in enumerate((first, side, second))]
    found = read_projections(paths, contract(min_side=2, views=("PA",)))
    assert [v.source_uids[0] for v in found.images] == [second.SOPInstanceUID, first.SOPInstanceUID]
    assert [v.values.shape for v in found.images] == [(1, 3, 2), (1, 2, 3)]
    assert found.excluded == (side.SOPInstanceUID,)
    assert found.notes == ("Image 3 was left out: the view is not PA",)


def test_a_series_with_nothing_to_take_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    paths = [saved(numbered(image(PLANE, ViewPosition="LL"), n), tmp_path, f"{n}.dcm") for n in (1, 2)]
    with pytest.raises(UnsuitableSeries, match=r"the view is not PA \(and 1 more image") as caught:
        read_projections(paths, contract(min_side=2, views=("PA",)))
    assert caught.value.code == "WRONG_VIEW"


def test_of_both_presentation_intents_the_one_named_first_is_taken(tmp_path: Path) -> None:
    shown = numbered(image(PLANE), 1)
    raw = numbered(image(PLANE, PresentationIntentType="FOR PROCESSING"), 2)
    paths = [saved(ds, tmp_path, f"{i}.dcm") for i, ds in enumerate((raw, shown))]
    for intents, wanted in (
        (("FOR PRESENTATION", "FOR PROCESSING"), shown),
        (("FOR PROCESSING", "FOR PRESENTATION"), raw),
    ):
        found = read_projections(paths, contract(min_side=2, intents=intents))
        assert [v.source_uids[0] for v in found.images] == [wanted.SOPInstanceUID]
        assert len(found.excluded) == len(found.notes) == 1


def twice(first: Dataset) -> list[Dataset]:
    return [first, first]


def two_series(first: Dataset) -> list[Dataset]:
    second = numbered(image(PLANE), 2)
    second.SeriesInstanceUID = "1.2.3.4.5"
    return [first, second]


@pytest.mark.parametrize(
    ("make", "changes", "code"),
    [
        (twice, {}, "DUPLICATE_INSTANCE"),
        (two_series, {}, "MIXED_SERIES"),
        (lambda first: [first, numbered(image(PLANE), 2)], {"max_images": 1}, "TOO_MANY_IMAGES"),
    ],
)
def test_series_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, make: Callable[[Dataset], list[Dataset]], changes: dict[str, Any], code: str
) -> None:
    paths = [saved(ds, tmp_path, f"{i}.dcm") for i, ds in enumerate(make(numbered(image(PLANE), 1)))]
    with pytest.raises(UnsuitableSeries) as caught:
        read_projections(paths, contract(min_side=2, **changes))
    assert caught.value.code == code


def test_damaged_files_are_told(tmp_path: Path) -> None:
    ds = image(PLANE)
    ds.PixelData = ds.PixelData[:4]
    with pytest.raises(UnsuitableSeries) as caught:
        read_projections([saved(ds, tmp_path)], SMALL)
    assert caught.value.code == "DECODE_FAILED"
    (tmp_path / "no.dcm").write_bytes(b"nothing of the kind")
    with pytest.raises(MalformedDataSet):
        read_projections([tmp_path / "no.dcm"], SMALL)
    other = SourceInstance("1.2.3", "1.2", "1.2.840.10008.1.2.1", saved(image(PLANE), tmp_path), "0" * 64)
    with pytest.raises(MalformedDataSet, match="another SOP Instance UID"):
        read_projections([other], SMALL)


class Ahead:
    """A slice that was read ahead; ``values`` None: it has to be decoded anew."""

    def __init__(self, values: np.ndarray | None) -> None:
        self.header: Any = None
        self._values = values

    def values(self) -> np.ndarray | None:
        return self._values


class Counting:
    """A decoder that counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def frames(self, files: Any) -> Any:
        for part10, rows, columns in files:
            self.count += 1
            yield decode_frame(part10, rows, columns)

    def submit(self, *_: Any) -> Future[Any]:
        raise NotImplementedError


def test_what_was_read_ahead_is_not_decoded_again(tmp_path: Path) -> None:
    datasets = [numbered(image(PLANE), n) for n in (1, 2, 3)]
    paths = [saved(ds, tmp_path, f"{ds.InstanceNumber}.dcm") for ds in datasets]
    uids = [str(ds.SOPInstanceUID) for ds in datasets]
    ahead: dict[str, Any] = {uids[0]: Ahead(PLANE // 2), uids[1]: Ahead(None)}
    decoder = Counting()
    found = read_projections(paths, SMALL, decoder=decoder, ahead=ahead)
    np.testing.assert_array_equal(found.images[0].values[0], PLANE // 2)
    np.testing.assert_array_equal(found.images[1].values[0], PLANE)
    np.testing.assert_array_equal(found.images[2].values[0], PLANE)
    assert decoder.count == 2


def test_bits_beyond_those_stored_are_no_part_of_the_value(tmp_path: Path) -> None:
    """An overlay in the bits above, as old CR images have it."""
    ds = image(PLANE)
    ds.PixelData = (PLANE | 0x4000).astype("<u2").tobytes()
    np.testing.assert_array_equal(read(tmp_path, ds).values[0], PLANE)


def test_proportions_of_a_pixel_without_a_size_are_kept(tmp_path: Path) -> None:
    ds = image(PLANE, PixelSpacing=None, ImagerPixelSpacing=None, PixelAspectRatio=[2, 1])
    volume = read(tmp_path, ds)
    assert volume.spacing[1:] == (2.0, 1.0)
    assert not volume.projection.sized


def test_a_pipeline_sees_what_the_header_states(tmp_path: Path) -> None:
    about = read(tmp_path, image(PLANE, ViewPosition="AP", ImageLaterality="L", KVP="85")).projection
    assert (about.view, about.body_part, about.laterality, about.facts["KVP"]) == ("AP", "CHEST", "L", 85.0)


def classifier(folder: Path) -> ReadyModel:
    """Bright on the mean is positive; what is bright is a segment with an area."""
    code = {"value": "36118008", "scheme": "SCT", "meaning": "Pneumothorax"}
    values = np.arange(64, dtype=np.int16).reshape(1, 8, 8)
    area = {**measurement("area_mm2", kind="area_mm2"), "unit": {"value": "mm2", "scheme": "UCUM", "meaning": "mm2"}}
    nodes = [
        helper.make_node("Sub", ["x", "half"], ["y"]),
        helper.make_node("ReduceMean", ["x"], ["s"], axes=[2, 3], keepdims=0),
    ]
    model = onnx_bytes(nodes, ["y", "s"], 4, {"half": np.float32(0.5)})
    data = manifest(
        input={
            "kind": "projection", "modalities": ["DX"], "sop_classes": list(CLASSES), "values": "displayed",
            "needs_spacing": True, "min_side": 2,
        },
        preprocess=[],
        engine={
            "model": "model.onnx", "input": "x", "outputs": ["y"], "scores": ["s"],
            "reach": {"kind": "slices", "axis": 0, "batch": 1},
        },
        activations=[],
        decision={"step": "threshold", "output": "y", "threshold": 1e-6},
        postprocess=[],
        outputs={
            "segments": [segment(1, "bright")],
            "measurements": [area],
            "findings": [{"key": "pneumothorax", "name": code, "output": "s", "threshold": 0.5}],
        },
        golden=[
            golden(
                labels="golden/labels.npy", white=63.0, affine=np.eye(4).tolist(),
                findings={"pneumothorax": 0.5}, measurements={"bright.area_mm2": 32.0},
            )
        ],
    )  # fmt: skip
    labels = (values > 31.5).astype("u1")
    files = {"model.onnx": model, "golden/one.npy": npy(values), "golden/labels.npy": npy(labels)}
    return open_model(write(folder, data, files), OnnxRuntimeCpu(), threads=1)


def test_each_image_gets_its_own_answer_and_area(tmp_path: Path) -> None:
    """A network of the usual kind: it sees images as they are displayed, and answers for each."""
    model = classifier(tmp_path / "models")
    bright, dark = np.full((4, 6), 3000, np.uint16), np.full((6, 4), 1000, np.uint16)
    dark[0, :3] = 4095
    spaced = {"PixelSpacing": [0.5, 0.5], "ImagerPixelSpacing": [0.6, 0.6], "WindowCenter": 2048, "WindowWidth": 4096}
    datasets = [numbered(image(plane, **spaced), n) for n, plane in ((1, bright), (2, dark))]
    analysis = model.analyse([saved(ds, tmp_path, f"{ds.InstanceNumber}.dcm") for ds in datasets])
    assert [(f.image, f.value.meaning if f.value else "") for f in analysis.findings] == [(0, "Present"), (1, "Absent")]
    assert [f.probability for f in analysis.findings] == pytest.approx(
        [3000 / 4095, (3 * 4095 + 21 * 1000) / 24 / 4095], abs=1e-3
    )
    areas = [(m.segment, m.image, m.value) for m in analysis.measurements]
    assert areas == [(1, 0, pytest.approx(24 * 0.25)), (2, 1, pytest.approx(3 * 0.25))]
    assert analysis.notes[0].startswith("Image 1: Lengths are by Pixel Spacing, calibrated")
    hits = critical_hits(analysis, [Condition("area_mm2", minimum=1.0), Condition("pneumothorax", value="*")])
    assert [h.key for h in hits] == ["area_mm2", "pneumothorax"]
    assert [m["segment"] for m in (measurement_summary(m, analysis) for m in analysis.measurements)] == [
        "bright",
        "bright, image 2",
    ]


def test_whatever_a_header_says_ends_in_an_image_or_in_words(tmp_path: Path) -> None:
    """Bytes of a valid file, changed at random: nothing but errors of this program's own comes out."""
    tables = {"VOILUTSequence": [lut([v // 4 for v in range(4096)], 0, 10)],
              "ModalityLUTSequence": [lut(list(range(4096)), 0, 16)]}  # fmt: skip
    ds = image(PLANE, **tables, RescaleSlope=None, RescaleIntercept=None, CollimatorShape="RECTANGULAR")
    whole = saved(ds, tmp_path).read_bytes()
    random = np.random.default_rng(5)
    path, ends = tmp_path / "changed.dcm", {"image": 0, "refused": 0}
    for _ in range(300):
        changed = bytearray(whole)
        for place in random.integers(132, 1400, random.integers(1, 5)):
            changed[place] = random.choice([0, 255, changed[place] ^ 1, changed[place] ^ 128])
        path.write_bytes(changed)
        try:
            read_projections([path], contract(min_side=2, values="displayed"))
            ends["image"] += 1
        except NodeError:
            ends["refused"] += 1
    assert min(ends.values()) > 30, ends
