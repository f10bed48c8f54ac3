"""What `coreseg segment` leaves on disk for one result: mask, overlay and a JSON record."""

import json
from pathlib import Path
from typing import Any

from coreseg.imaging import write_mask
from coreseg.types import Result

SCHEMA_VERSION = 1
OUR_ENDINGS = (".mask", ".overlay")
"""How the names of our pictures end, before `.png`: a folder's pictures do not include them."""


def write_result(result: Result, folder: Path, name: str, *, image: str, question: str, model: str) -> dict[str, Any]:
    """Write `name`.mask.png (0/255, the image's size), `name`.overlay.png and `name`.json; give the record.

    Files of an earlier run under the same name are replaced. Boxes are half-open original pixels x1, y1, x2, y2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mask, overlay = folder / f"{name}.mask.png", folder / f"{name}.overlay.png"
    write_mask(mask, result.mask)
    result.overlay().save(overlay)
    height, width = result.mask.shape
    record = {
        "schema_version": SCHEMA_VERSION,
        "image": image,
        "width": width,
        "height": height,
        "question": question,
        "model": model,
        "found": result.found,
        "valid": result.valid,
        "boxes": result.boxes.tolist(),
        "reasoning": result.reasoning,
        "answer": result.answer,
        "text": result.text,
        "warnings": list(result.warnings),
        "confidence": None if result.confidence is None else round(result.confidence, 3),
        "mask": str(mask),
        "overlay": str(overlay),
        "mask_area_px": int(result.mask.sum()),
        "seconds": round(result.seconds, 3),
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
