"""MONAI's transforms by name as steps of manifest schema 2. Pure; what cannot be mapped is refused.

Names and defaults are those of MONAI 1.x (monai.transforms, monai.inferers). A dictionary
transform (``Spacingd``) and its array form (``Spacing``) mean the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dicomnode.infer.importing.config import Arguments, Expression, refuse

Step = dict[str, Any]

IGNORED_ARGUMENTS = frozenset(
    ["keys", "allow_missing_keys", "meta_keys", "meta_key_postfix", "dtype", "lazy", "track_meta", "source_key"]
)
NO_EFFECT = frozenset(
    [
        *("LoadImage", "EnsureChannelFirst", "AddChannel", "AsChannelFirst", "EnsureType", "ToTensor", "ToNumpy"),
        *(
            "CastToType",
            "ToDevice",
            "DeleteItems",
            "SelectItems",
            "CopyItems",
            "Identity",
            "SaveImage",
            "SimulateDelay",
        ),
    ]
)
"""They move data about: our reader, engines and encoders do that."""


@dataclass(slots=True)
class Mapped:
    """What the configuration amounts to. ``channels``: of the output, once known."""

    preprocess: list[Step] = field(default_factory=list)
    reach: Step = field(default_factory=lambda: {"kind": "whole"})
    activation: str | None = None
    decision: Step | None = None
    inverted_before_decision: bool | None = None
    nearest: bool = False
    postprocess: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def transforms_of(section: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(name without module and dictionary suffix, arguments) of a Compose or a list; disabled ones left out."""
    if isinstance(section, Mapping) and _short(section.get("_target_", "")) == "Compose":
        section = section.get("transforms")
    if isinstance(section, Mapping):
        section = [section]
    if not isinstance(section, list):
        raise refuse(f"{where} is no list of transforms", "See MONAI's bundle specification")
    found = []
    for item in section:
        if not isinstance(item, Mapping) or not isinstance(item.get("_target_"), str):
            text = item.text if isinstance(item, Expression) else ""
            raise refuse(f"{where} holds something that is no transform {text[:60]}".rstrip())
        if _disabled(item):
            continue
        if item.get("_mode_", "default") != "default":
            raise refuse(f"{_short(item['_target_'])}._mode_ = {item['_mode_']!r} cannot be mapped", "Leave it out")
        if _short(item["_target_"]) == "Compose":
            found += transforms_of(item, where)
        else:
            found.append((_short(item["_target_"]), item))
    return found


def _disabled(item: Mapping[str, Any]) -> bool:
    """As MONAI's ConfigComponent reads it: a text counts where it says true, in whatever case."""
    value = item.get("_disabled_", False)
    if isinstance(value, Expression):
        raise refuse(f"{_short(item['_target_'])}._disabled_ is a Python expression", "Replace it by true or false")
    return value.strip().casefold() == "true" if isinstance(value, str) else bool(value)


def _short(target: Any) -> str:
    return str(target).rsplit(".", 1)[-1]


def _known(name: str, table: Mapping[str, Any] | frozenset[str]) -> str | None:
    for suffix in ("", "Dict", "D", "d"):
        if name.endswith(suffix) and (stem := name[: len(name) - len(suffix)]) in table:
            return stem
    return None


def map_preprocessing(section: Any, mapped: Mapped) -> None:
    for name, values in transforms_of(section, "preprocessing"):
        if _known(name, NO_EFFECT):
            continue
        stem = _known(name, BEFORE)
        if stem is None:
            raise refuse(f"the transform {name} before the network is not known here", f"Known: {', '.join(BEFORE)}")
        arguments = Arguments(name, values, IGNORED_ARGUMENTS)
        mapped.preprocess += BEFORE[stem](arguments)
        arguments.done()


def map_postprocessing(section: Any, mapped: Mapped) -> None:
    for name, values in transforms_of(section, "postprocessing"):
        if _known(name, NO_EFFECT):
            continue
        stem = _known(name, AFTER)
        if stem is None:
            raise refuse(f"the transform {name} behind the network is not known here", f"Known: {', '.join(AFTER)}")
        arguments = Arguments(name, values, IGNORED_ARGUMENTS)
        AFTER[stem](arguments, mapped)
        arguments.done()
    if mapped.decision is not None:
        early = mapped.inverted_before_decision
        mapped.decision["on"] = "network" if early is False or mapped.nearest else "source"
        if early is None and mapped.preprocess:
            mapped.notes.append("The bundle has no Invertd; labels come back onto the source grid all the same")


def map_inferer(inferer: Any, mapped: Mapped) -> None:
    if not isinstance(inferer, Mapping):
        raise refuse("the configuration has no inferer", "Give SimpleInferer or SlidingWindowInferer in inference.json")
    name = _short(inferer.get("_target_", ""))
    ignored = frozenset(
        [
            *("device", "sw_device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps", "buffer_dim"),
        ]
    )
    arguments = Arguments(name, inferer, ignored)
    arguments.expect("with_coord", False)
    arguments.expect("extra_input_padding", None)
    if name == "SimpleInferer":
        mapped.reach = {"kind": "whole"}
    elif name in ("SlidingWindowInferer", "SlidingWindowInfererAdapt"):
        size = [int(v) for v in arguments.three("roi_size")]
        if min(size) < 1:
            raise refuse(f"{name}.roi_size must name a size for each axis of a volume")
        blend = arguments.take("mode", "constant")
        if blend not in ("constant", "gaussian"):
            raise refuse(f"{name}.mode = {blend!r} cannot be mapped", "Known: constant, gaussian")
        arguments.expect("padding_mode", "constant")
        mapped.reach = {
            "kind": "patches",
            "size": size,
            "overlap": arguments.number("overlap", 0.25),
            "blend": blend,
            "sigma_scale": arguments.number("sigma_scale", 0.125),
            "pad_value": arguments.number("cval", 0.0),
            "batch": int(arguments.number("sw_batch_size", 1)),
        }
    else:
        raise refuse(f"the inferer {name or '(none)'} is not known here", "Known: SimpleInferer, SlidingWindowInferer")
    arguments.done()


def _orientation(a: Arguments) -> list[Step]:
    a.take("labels")
    closest = a.take("as_closest_canonical", False)
    axes = "RAS" if closest else a.take("axcodes")
    if closest:
        a.take("axcodes")
    return [{"step": "orient", "axes": axes}]


def _spacing(a: Arguments) -> list[Step]:
    target = [None if v <= 0 else float(v) for v in a.three("pixdim")]
    a.expect("padding_mode", "border")
    for key in ("align_corners", "diagonal", "scale_extent", "recompute_affine"):
        a.expect(key, False, None)
    a.take("ensure_same_shape")  # speaks of label images
    a.expect("min_pixdim", None)
    a.expect("max_pixdim", None)
    return [
        {"step": "resample", "spacing_mm": target, "order": _mode(a, "bilinear", _SPACING_MODES), "align": "centres"}
    ]


_SPACING_MODES = {
    "bilinear": "linear", "trilinear": "linear", "linear": "linear", 1: "linear", "nearest": "nearest", 0: "nearest"
}  # fmt: skip
_RESIZE_MODES = {"trilinear": "linear", "linear": "linear", "bilinear": "linear", "nearest-exact": "nearest"}
"""torch's ``nearest`` takes the voxel before (floor(i s), half a voxel off), its ``nearest-exact`` the nearest one."""


def _mode(a: Arguments, default: str, known: Mapping[Any, str]) -> str:
    mode = a.take("mode", default)
    mode = mode[0] if isinstance(mode, list) and mode else mode
    if isinstance(mode, bool) or mode not in known:
        raise refuse(f"{a.name}.mode = {mode!r} cannot be mapped", f"Known: {', '.join(map(str, known))}")
    return known[mode]


def _scale_range(a: Arguments) -> list[Step]:
    low, high = a.number("a_min"), a.number("a_max")
    out = a.number("b_min"), a.number("b_max")
    clip = bool(a.take("clip", False))
    return [{"step": "scale_range", "low": low, "high": high, "out_low": out[0], "out_high": out[1], "clip": clip}]


def _scale(a: Arguments) -> list[Step]:
    a.expect("factor", None)
    a.expect("channel_wise", False, True)
    return [{"step": "min_max", "out_low": a.number("minv", 0.0), "out_high": a.number("maxv", 1.0)}]


def _percentiles(a: Arguments) -> list[Step]:
    a.expect("relative", False)
    a.expect("channel_wise", False, True)
    return [
        {
            "step": "percentiles",
            "lower": a.number("lower"),
            "upper": a.number("upper"),
            "out_low": a.number("b_min"),
            "out_high": a.number("b_max"),
            "clip": bool(a.take("clip", False)),
        }
    ]


def _normalize(a: Arguments) -> list[Step]:
    a.expect("channel_wise", False, True)
    nonzero = bool(a.take("nonzero", False))
    mean, std = (_single(a, key) for key in ("subtrahend", "divisor"))
    if mean is None and std is None:
        return [{"step": "zscore", "over": "nonzero" if nonzero else "whole"}]
    if mean is None or std is None or nonzero:
        raise refuse(f"{a.name} needs both subtrahend and divisor, without nonzero")
    return [{"step": "mean_std", "mean": mean, "std": std}]


def _single(a: Arguments, key: str) -> float | None:
    value = a.take(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise refuse(f"{a.name}.{key} must be one number")
    return None if value is None else float(value)


def _foreground(a: Arguments) -> list[Step]:
    select = a._left.pop("select_fn", None)
    above = 0.0
    if select is not None:
        text = select.text if isinstance(select, Expression) else str(select)
        match = re.fullmatch(r"\$\s*lambda\s+(\w+)\s*:\s*\1\s*>\s*(-?\d+(?:\.\d+)?)\s*", text)
        if match is None:
            raise refuse(f"{a.name}.select_fn cannot be mapped", "Known: $lambda x: x > NUMBER")
        above = float(match[2])
    margin = a.take("margin", 0)
    allow_smaller = a.take("allow_smaller", False)
    if not isinstance(margin, int) or margin < 0 or (margin and not allow_smaller):
        raise refuse(
            f"{a.name}.margin = {margin!r} cannot be mapped", "Known: 0, or a number with allow_smaller = true"
        )
    a.expect("k_divisible", 1)
    a.expect("channel_indices", None)
    a.take("mode")
    a.take("start_coord_key")
    a.take("end_coord_key")
    return [{"step": "crop_foreground", "above": above, "margin": margin}]


def _pad(a: Arguments) -> list[Step]:
    size = [max(1, int(v)) for v in a.three("spatial_size")]
    return [{"step": "pad", "size": size, **_padding(a)}]


def _divisible(a: Arguments) -> list[Step]:
    multiple = [max(1, int(v)) for v in a.three("k")]
    return [{"step": "pad", "multiple": multiple, **_padding(a)}]


def _padding(a: Arguments) -> Step:
    a.expect("method", "symmetric")
    mode = a.take("mode", "constant")
    if mode not in ("constant", "edge", "replicate"):
        raise refuse(f"{a.name}.mode = {mode!r} cannot be mapped", "Known: constant, edge")
    value = a.number("value", a.number("constant_values", 0.0))
    return {"mode": "constant" if mode == "constant" else "edge", "value": value}


def _resize(a: Arguments) -> list[Step]:
    size = [None if v <= 0 else v for v in a.three("spatial_size")]
    if any(v != int(v) for v in size if v is not None):
        raise refuse(f"{a.name}.spatial_size counts voxels")
    size = [None if v is None else int(v) for v in size]
    a.expect("size_mode", "all")
    a.expect("align_corners", None, False)
    a.expect("anti_aliasing", False)
    a.take("anti_aliasing_sigma")
    return [{"step": "resize", "size": size, "order": _mode(a, "area", _RESIZE_MODES)}]


BEFORE: dict[str, Callable[[Arguments], list[Step]]] = {
    "Orientation": _orientation,
    "Spacing": _spacing,
    "ScaleIntensityRange": _scale_range,
    "ScaleIntensity": _scale,
    "ScaleIntensityRangePercentiles": _percentiles,
    "NormalizeIntensity": _normalize,
    "CropForeground": _foreground,
    "SpatialPad": _pad,
    "DivisiblePad": _divisible,
    "Resize": _resize,
}


def _activations(a: Arguments, m: Mapped) -> None:
    chosen = [name for name in ("softmax", "sigmoid") if a.take(name, False)]
    a.expect("other", None)
    if len(chosen) != 1 or m.activation is not None:
        raise refuse(f"{a.name} must ask for one of softmax, sigmoid, once")
    m.activation = chosen[0]


def _discrete(a: Arguments, m: Mapped) -> None:
    argmax, threshold = bool(a.take("argmax", False)), a.take("threshold")
    a.expect("to_onehot", None, False)
    a.expect("rounding", None)
    a.take("n_classes")
    if m.decision is not None or argmax == (threshold is not None and threshold is not False):
        raise refuse(f"{a.name} must ask for one of argmax, threshold, once")
    if argmax:
        m.decision = {"step": "argmax"}
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise refuse(f"{a.name}.threshold must be a number")
    m.decision = {"step": "threshold", "threshold": float(threshold)}


def _invert(a: Arguments, m: Mapped) -> None:
    m.inverted_before_decision = m.decision is None
    m.nearest = bool(a.take("nearest_interp", True))
    for key in ("transform", "orig_keys", "orig_meta_keys", "to_tensor", "device", "post_func"):
        value = a._left.pop(key, None)
        if key == "post_func" and value is not None:
            raise refuse(f"{a.name}.post_func cannot be mapped")


def _needs_labels(a: Arguments, m: Mapped) -> None:
    if m.decision is None:
        raise refuse(f"{a.name} before AsDiscrete cannot be mapped", "Put AsDiscrete before it")


def _segments(a: Arguments) -> list[int] | None:
    value = a.take("applied_labels")
    return [value] if isinstance(value, int) else value


def _largest(a: Arguments, m: Mapped) -> None:
    _needs_labels(a, m)
    a.expect("is_onehot", None, False)
    segments = _segments(a)
    if a.take("independent", True) is False and (segments is None or len(segments) > 1):
        raise refuse(f"{a.name}.independent = False cannot be mapped")
    connectivity = a.take("connectivity") or 3
    m.postprocess.append(
        {
            "step": "largest_components",
            "keep": int(a.number("num_components", 1)),
            "connectivity": {1: 6, 2: 18, 3: 26}.get(connectivity, connectivity),
            "segments": segments,
        }
    )


def _small(a: Arguments, m: Mapped) -> None:
    _needs_labels(a, m)
    size, connectivity = a.number("min_size", 64), a.take("connectivity", 1) or 3
    a.expect("independent_channels", True)
    a.take("pixdim")
    if a.take("by_measure", False):
        millilitres = size / 1000
    else:
        spacing = next((s["spacing_mm"] for s in m.preprocess if s["step"] == "resample"), [None])
        if None in spacing:
            raise refuse(f"{a.name}.min_size counts voxels of no known size", "Use by_measure = true")
        millilitres = size * math.prod(spacing) / 1000
    m.postprocess.append(
        {
            "step": "largest_components",
            "keep": None,
            "min_ml": millilitres,
            "connectivity": {1: 6, 2: 18, 3: 26}.get(connectivity, connectivity),
        }
    )


def _holes(a: Arguments, m: Mapped) -> None:
    _needs_labels(a, m)
    a.expect("connectivity", None, 1)
    m.postprocess.append({"step": "fill_holes", "segments": _segments(a)})


AFTER: dict[str, Callable[[Arguments, Mapped], None]] = {
    "Activations": _activations,
    "AsDiscrete": _discrete,
    "Invert": _invert,
    "KeepLargestConnectedComponent": _largest,
    "RemoveSmallObjects": _small,
    "FillHoles": _holes,
}
