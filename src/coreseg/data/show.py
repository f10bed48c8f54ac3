"""A contact sheet: many rows of a data set on one picture, to see at a glance what one is about to train on."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coreseg.data.store import LesionSet
from coreseg.errors import DataError
from coreseg.imaging import overlay
from coreseg.masks import map_boxes, resize_mask
from coreseg.types import Sample

CELL_PX = 224

_GAP_PX = 8
_CAPTION_PX = 32
_FONT_PX = 12
_PAPER_RGB = (24, 24, 27)
_CATEGORY_RGB = (240, 240, 240)
_SOURCE_RGB = (160, 160, 170)


def contact_sheet(lesion_set: LesionSet, samples: Sequence[Sample], columns: int = 5) -> Image.Image:
    """The samples with masks and boxes drawn on them, in rows of `columns`, each with its category, source and split.

    Cells are 224 px; pictures are scaled to fit. The boxes are the stored ones, so a wrong one shows.

    Raises DataError where there is nothing to show, or no column to show it in, or a file is missing; InputError where
    a file cannot be read.
    """
    if not samples or columns < 1:
        raise DataError(
            f"A contact sheet of {len(samples)} rows in {columns} columns cannot be drawn: expected at least one of "
            "each. Choose another split or source."
        )
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    pitch_x, pitch_y = CELL_PX + _GAP_PX, CELL_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * pitch_x + _GAP_PX, rows * pitch_y + _GAP_PX), _PAPER_RGB)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PX)
    for index, sample in enumerate(samples):
        left = _GAP_PX + index % columns * pitch_x
        top = _GAP_PX + index // columns * pitch_y
        cell = _cell(lesion_set, sample)
        sheet.paste(cell, (left + (CELL_PX - cell.width) // 2, top + (CELL_PX - cell.height) // 2))
        shown = sample.category if sample.boxes else f"no {sample.category}"
        caption = ((shown, _CATEGORY_RGB), (f"{sample.source}, {sample.split}", _SOURCE_RGB))
        for line, (text, colour) in enumerate(caption):
            position = (left, top + CELL_PX + 2 + line * (_FONT_PX + 2))
            pen.text(position, _fitted(text, pen, font), fill=colour, font=font)
    return sheet


def _cell(lesion_set: LesionSet, sample: Sample) -> Image.Image:
    image, mask = lesion_set.image(sample), lesion_set.mask(sample)
    height, width = mask.shape
    scale = CELL_PX / max(height, width)
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Scaled before it is drawn on, so that lines are as fine on every picture.
    small = np.array(Image.fromarray(image).resize(size_wh, Image.Resampling.LANCZOS))
    boxes = map_boxes(np.array(sample.boxes, dtype=np.int64).reshape(-1, 4), (width, height), size_wh)
    return overlay(small, resize_mask(mask, size_wh[::-1]), boxes)


def _fitted(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if pen.textlength(text, font=font) <= CELL_PX:
        return text
    kept = text
    while kept and pen.textlength(f"{kept}…", font=font) > CELL_PX:
        kept = kept[:-1]
    return f"{kept}…"
