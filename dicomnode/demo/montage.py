"""A picture of what a model found: axial tiles, a coronal and a sagittal view, and a legend.

Shown as radiologists look at it: the patient's right at the left of the picture, head up.
The volume has the axes of ``Analysis.labels`` for an axial head-first supine stack: slices
run to the head, rows to the back, columns to the patient's left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
LUNG_WINDOW = (-600.0, 1500.0)
SOFT_TISSUE_WINDOW = (40.0, 400.0)
BANNER = "AI result, reference method, not for diagnosis"

_TILE = (296, 222)
_VIEW = (400, 331)
_GAP = 8
_MARGIN_MM = 22.0
_OPACITY = 0.30
_BACKGROUND: RGB = (13, 17, 23)
_TEXT: RGB = (230, 236, 242)
_FAINT: RGB = (150, 162, 176)
_WARNING: RGB = (250, 190, 70)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _grey(plane: npt.NDArray[np.int16], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """HU (rows, columns) to 0..255 for a window (centre, width), PS3.3 C.11.2.1.2.1 in short."""
    centre, width = window
    share = (plane.astype(np.float32) - (centre - width / 2)) / width
    grey: npt.NDArray[np.uint8] = (np.clip(share, 0, 1) * 255).astype(np.uint8)
    return grey


def _bounds(labels: npt.NDArray[np.uint8], axis: int, margin: float) -> tuple[int, int]:
    """First and one past the last labelled index of an axis, widened by ``margin`` samples.

    The whole axis when nothing is labelled.
    """
    length = labels.shape[axis]
    where = np.flatnonzero(np.count_nonzero(labels, axis=tuple(i for i in range(3) if i != axis)))
    if not where.size:
        return 0, length
    extra = round(margin)
    return max(int(where[0]) - extra, 0), min(int(where[-1]) + 1 + extra, length)


def _outline(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels of a mask that touch something outside of it."""
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    result: npt.NDArray[np.bool_] = inside & ~core
    return result


def _view(
    plane: npt.NDArray[np.int16],
    labels: npt.NDArray[np.uint8],
    spacing: tuple[float, float],
    size: tuple[int, int],
    *,
    colours: Mapping[int, RGB],
    window: tuple[float, float],
) -> Image.Image:
    """One plane (rows, columns) with its labels, scaled to fit ``size`` with true proportions.

    ``spacing`` is mm between rows and between columns. Outlines are drawn at the size of
    the picture, so they stay one or two pixels wide whatever the matrix.
    """
    height, width = plane.shape[0] * spacing[0], plane.shape[1] * spacing[1]
    scale = min(size[0] / width, size[1] / height)
    target = max(round(width * scale), 1), max(round(height * scale), 1)
    grey = Image.fromarray(_grey(plane, window)).resize(target, Image.Resampling.BICUBIC)
    picture = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2).astype(np.float32)
    for number, colour in colours.items():
        mask = Image.fromarray((labels == number).astype(np.uint8) * np.uint8(255))
        inside = np.asarray(mask.resize(target, Image.Resampling.BILINEAR)) >= 128
        picture[inside] += _OPACITY * (np.asarray(colour, np.float32) - picture[inside])
        picture[_outline(inside)] = colour
    tile = Image.new("RGB", size)
    drawn = Image.fromarray(picture.round().astype(np.uint8))
    tile.paste(drawn, ((size[0] - target[0]) // 2, (size[1] - target[1]) // 2))
    return tile


def _caption(tile: Image.Image, text: str, sides: tuple[str, str]) -> Image.Image:
    """Write the caption below left and the letters of the sides at the middle of both edges."""
    draw = ImageDraw.Draw(tile)
    width, height = tile.size
    draw.rectangle((0, height - 21, width, height), (0, 0, 0))  # white text on bright tissue is unreadable
    for place, anchor, words, colour, size in (
        ((7, height - 6), "ls", text, _TEXT, 13),
        ((6, height // 2), "lm", sides[0], _WARNING, 16),
        ((width - 6, height // 2), "rm", sides[1], _WARNING, 16),
    ):
        draw.text(place, words, colour, _font(size), anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0))
    return tile


def _cut(labels: npt.NDArray[np.uint8], axis: int, middle: int) -> int:
    """Index along the axis where most is labelled; ``middle`` when nothing is."""
    others = tuple(i for i in range(3) if i != axis)
    counts = np.count_nonzero(labels, axis=others)
    return int(np.argmax(counts)) if counts.any() else middle


def _axial_indices(labels: npt.NDArray[np.uint8], count: int) -> list[int]:
    """Slices spread over the labelled range, from head to feet, without the very ends."""
    first, last = _bounds(labels, 0, 0)
    steps = (np.arange(count) + 0.5) / count
    return [min(int(first + (last - first) * share), last - 1) for share in steps[::-1]]


def overlay_montage(
    hu: npt.NDArray[np.int16],
    labels: npt.NDArray[np.uint8],
    spacing: tuple[float, float, float],
    *,
    colours: Mapping[int, RGB],
    columns: int = 4,
    rows: int = 3,
    title_lines: Sequence[str] = (),
    legend: Mapping[int, str] | None = None,
    first_z: float | None = None,
    window: tuple[float, float] = LUNG_WINDOW,
    banner: str = BANNER,
) -> Image.Image:
    """Draw the labels over the images; an RGB picture of size ``montage_size``.

    ``hu`` and ``labels``: (slices, rows, columns), axes as in the module docstring; label 0
    and labels without a colour are not drawn. ``spacing``: mm between slices, rows, columns.
    ``colours``: RGB by label. ``legend``: text by label, values included (default: the
    number). ``title_lines``: the first one large. ``first_z``: z of slice 0 in mm, so that
    captions give patient coordinates; without it they give mm above slice 0.
    ``window``: centre and width in HU. Raises ``ValueError`` when shapes differ, a spacing is
    not positive or there is no tile to draw.
    """
    if hu.shape != labels.shape or hu.ndim != 3 or 0 in hu.shape:
        raise ValueError("hu and labels have to be volumes of the same shape")
    if min(spacing) <= 0 or columns < 1 or rows < 1:
        raise ValueError("spacing, columns and rows have to be positive")
    shown = np.where(np.isin(labels, [n for n in colours if n]), labels, 0).astype(np.uint8)
    between, down, across = spacing
    y0, y1 = _bounds(shown, 1, _MARGIN_MM / down)
    x0, x1 = _bounds(shown, 2, _MARGIN_MM / across)
    z0, z1 = _bounds(shown, 0, _MARGIN_MM / between)
    width, height = montage_size(columns, rows, len(title_lines), len(legend or colours))
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    top = _draw_header(sheet, title_lines, banner)

    for place, index in enumerate(_axial_indices(shown, columns * rows)):
        cut = (index, slice(y0, y1), slice(x0, x1))
        tile = _view(hu[cut], shown[cut], (down, across), _TILE, colours=colours, window=window)
        z = index * between + (first_z or 0.0)
        _caption(tile, f"slice {index + 1}/{len(hu)}   z {z:.1f} mm", ("R", "L"))
        row, column = divmod(place, columns)
        sheet.paste(tile, (_GAP + column * (_TILE[0] + _GAP), top + row * (_TILE[1] + _GAP)))

    left = _GAP + columns * (_TILE[0] + _GAP)
    y, x = _cut(shown, 1, hu.shape[1] // 2), _cut(shown, 2, hu.shape[2] // 2)
    coronal = (hu[z0:z1, y, x0:x1], shown[z0:z1, y, x0:x1], across, f"coronal   row {y + 1}", ("R", "L"))
    y0, y1 = _bounds(shown, 1, 2.5 * _MARGIN_MM / down)  # the sagittal view has room for spine and couch
    sagittal = (hu[z0:z1, y0:y1, x], shown[z0:z1, y0:y1, x], down, f"sagittal   column {x + 1}", ("A", "P"))
    for place, (image, mask, step, text, sides) in enumerate((coronal, sagittal)):
        tile = _view(image[::-1], mask[::-1], (between, step), _VIEW, colours=colours, window=window)
        sheet.paste(_caption(tile, text, sides), (left, top + place * (_VIEW[1] + _GAP)))
    _draw_legend(sheet, colours, legend or {n: f"segment {n}" for n in colours})
    return sheet


def montage_size(columns: int, rows: int, titles: int, segments: int) -> tuple[int, int]:
    """Width and height in pixels of a montage."""
    width = 3 * _GAP + columns * (_TILE[0] + _GAP) - _GAP + _VIEW[0]
    body = max(rows * (_TILE[1] + _GAP), 2 * (_VIEW[1] + _GAP))
    return width, _header_height(titles) + body + 14 + 26 * max(segments, 1)


def _header_height(titles: int) -> int:
    return 52 + 20 * max(titles - 1, 0)


def _draw_header(sheet: Image.Image, title_lines: Sequence[str], banner: str) -> int:
    """Title at the left, banner at the right; returns where the pictures begin."""
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title_lines):
        if number == 0:
            draw.text((_GAP + 4, 26), line, _TEXT, _font(22), anchor="lm")
        else:
            draw.text((_GAP + 4, 34 + 20 * number), line, _FAINT, _font(14), anchor="lm")
    font = _font(15)
    x0, _, x1, _ = draw.textbbox((0, 0), banner, font)
    left = sheet.width - _GAP - (x1 - x0) - 28
    draw.rounded_rectangle((left, 11, sheet.width - _GAP, 41), 8, (48, 36, 8), _WARNING, 1)
    draw.text((left + 14, 26), banner, _WARNING, font, anchor="lm")
    return _header_height(len(title_lines))


def _draw_legend(sheet: Image.Image, colours: Mapping[int, RGB], legend: Mapping[int, str]) -> None:
    """A line with colour and text for each label, at the foot of the sheet."""
    draw = ImageDraw.Draw(sheet)
    for place, number in enumerate(sorted(legend)):
        y = sheet.height - 26 * (len(legend) - place) + 6
        if number in colours:
            draw.rounded_rectangle((_GAP + 4, y - 8, _GAP + 24, y + 8), 4, colours[number])
        draw.text((_GAP + 34, y), legend[number], _TEXT, _font(16), anchor="lm")


def save_png(image: Image.Image, path: Path) -> Path:
    """Write the picture as PNG (the folder has to exist); returns the path."""
    image.save(path, "PNG")
    return path
