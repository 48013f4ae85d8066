"""A key image for people: windowed, upright, in true proportions, with outlines and a mark. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dicomnode.encode.upright import Turn, letters_of, opposite

RGB = tuple[int, int, int]
MARK = "AI, not for diagnosis"
_SMALLEST, _LARGEST = 512, 1024
"""Pixels of the longer side of the image."""
_BANNER, _LINE = 44, 24
_AMBER: RGB = (255, 191, 0)
_WHITE: RGB = (235, 235, 235)
_FAINT: RGB = (160, 170, 180)
_RED: RGB = (255, 96, 80)


@dataclass(frozen=True, slots=True)
class Display:
    """How stored values become grey (PS3.3 C.11.1, C.11.2); ``window``: centre and width, or None."""

    slope: float = 1.0
    intercept: float = 0.0
    window: tuple[float, float] | None = None
    inverted: bool = False


@dataclass(frozen=True, slots=True)
class Caption:
    """Texts of a picture: ``lines`` in white, ``alarm`` in red, ``legend`` with its colours."""

    lines: Sequence[str]
    legend: Sequence[tuple[str, RGB]] = ()
    alarm: Sequence[str] = ()


def window_for(
    values: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_], proposed: tuple[float, float] | None
) -> tuple[float, float]:
    """The source's window, unless what was found would be black or white in it, or there is none.

    Then from the 1st to the 99th percentile of the slice.
    """
    if proposed is not None and proposed[1] > 0:
        low, high = proposed[0] - proposed[1] / 2, proposed[0] + proposed[1] / 2
        looked_at = values[inside] if inside.any() else values
        if float(np.mean((looked_at > low) & (looked_at < high))) > 0.2:
            return proposed
    low, high = (float(v) for v in np.percentile(values, (1, 99)))
    return ((low + high) / 2, max(high - low, 1.0))


def grey(values: npt.NDArray[np.float32], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """0..255 by PS3.3 C.11.2.1.2.1: linear, all below is 0 and all above is 255."""
    centre, width = window
    if width <= 1:
        return np.where(values > centre - 0.5, 255, 0).astype(np.uint8)
    share = (values - (centre - 0.5)) / (width - 1) + 0.5
    out: npt.NDArray[np.uint8] = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
    return out


def size_for(rows: int, columns: int, spacing: tuple[float, float]) -> tuple[int, int, float]:
    """Width and height in pixels with true proportions, and mm of one pixel of the picture.

    ``spacing``: mm between rows, between columns.
    """
    height_mm, width_mm = rows * spacing[0], columns * spacing[1]
    fine = max(height_mm, width_mm) / min(spacing)
    longer = min(max(fine, _SMALLEST), _LARGEST)
    mm = max(height_mm, width_mm) / longer
    return max(1, round(width_mm / mm)), max(1, round(height_mm / mm)), mm


def render(
    stored: npt.NDArray[Any],
    labels: npt.NDArray[np.uint8] | None,
    *,
    display: Display,
    spacing: tuple[float, float],
    turn: Turn,
    colours: Mapping[int, RGB],
    caption: Caption,
) -> tuple[npt.NDArray[np.uint8], float]:
    """RGB picture (rows, columns, 3), and mm of one of its pixels.

    ``stored`` and ``labels``: (rows, columns) of the source image; ``spacing``: mm between its rows,
    between its columns. Outlines are drawn at the size of the picture, two pixels wide.
    """
    values = stored.astype(np.float32) * np.float32(display.slope) + np.float32(display.intercept)
    inside = np.zeros(stored.shape, bool) if labels is None else labels > 0
    plane = grey(values, window_for(values, inside, display.window))
    if display.inverted:
        plane = 255 - plane
    plane = np.ascontiguousarray(turn.apply(plane))
    if turn.transpose:
        spacing = (spacing[1], spacing[0])
    width, height, mm = size_for(plane.shape[0], plane.shape[1], spacing)
    image = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.repeat(np.asarray(image)[:, :, np.newaxis], 3, axis=2).copy()
    if labels is not None:
        small = Image.fromarray(np.ascontiguousarray(turn.apply(labels)))
        large = np.asarray(small.resize((width, height), Image.Resampling.NEAREST))
        for number, colour in colours.items():
            pixels[_edge(large == number)] = colour
    return _with_text(pixels, turn, caption), mm


def _edge(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The two outermost pixels of a mask; all of it where it is thinner."""
    core = inside
    for _ in range(2):
        padded = np.pad(core, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & core
    out: npt.NDArray[np.bool_] = inside & ~core
    return out


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _with_text(pixels: npt.NDArray[np.uint8], turn: Turn, caption: Caption) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    canvas_width = max(width, _SMALLEST)
    foot = 12 + _LINE * (len(caption.lines) + len(caption.alarm) + len(caption.legend))
    canvas = Image.new("RGB", (canvas_width, _BANNER + height + foot))
    left = (canvas_width - width) // 2
    canvas.paste(Image.fromarray(pixels), (left, _BANNER))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, canvas_width - 1, _BANNER - 5), outline=_AMBER, width=2)
    draw.text((canvas_width // 2, (_BANNER - 5) // 2), MARK, fill=_AMBER, font=_font(26), anchor="mm")
    right, down = letters_of(turn.right), letters_of(turn.down)
    for text, place, anchor in (
        (opposite(right), (left + 6, _BANNER + height // 2), "lm"),
        (right, (left + width - 6, _BANNER + height // 2), "rm"),
        (opposite(down), (left + width // 2, _BANNER + 6), "mt"),
        (down, (left + width // 2, _BANNER + height - 6), "mb"),
    ):
        if text:
            draw.text(
                place, text[:1], fill=_WHITE, font=_font(22), anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0)
            )
    # Within the picture too, where cutting it off would cut the image.
    draw.text(
        (left + width - 8, _BANNER + height - 8), MARK, fill=_AMBER, font=_font(16), anchor="rb",
        stroke_width=2, stroke_fill=(0, 0, 0),
    )  # fmt: skip
    at = _BANNER + height + 8
    for text in caption.alarm:
        draw.text((10, at), text, fill=_RED, font=_font(18))
        at += _LINE
    for text, colour in caption.legend:
        draw.rectangle((10, at + 3, 26, at + 17), outline=colour, width=3)
        draw.text((36, at), text, fill=_WHITE, font=_font(17))
        at += _LINE
    for text in caption.lines:
        draw.text((10, at), text, fill=_FAINT, font=_font(16))
        at += _LINE
    return np.asarray(canvas).copy()
