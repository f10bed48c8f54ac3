"""Phantoms: seeded synthetic pictures with lesions whose masks are known, for tests, examples and benchmarks.

Two categories, the same in every look: a `nodule` is brighter than the tissue around it, a `cyst` is darker. So a
question about either means the same in a look that was never trained on (`HELD_OUT_LOOKS`). They resemble what their
looks are named after only as far as a test needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage

from coreseg.imaging import write_mask
from coreseg.masks import box_tuples, mask_to_boxes, smallest_lesion_px
from coreseg.questions import ask
from coreseg.types import Sample

CATEGORIES = ("nodule", "cyst")
"""What a phantom can show: `nodule` bright, `cyst` dark."""


@dataclass(frozen=True)
class Phantom:
    """One synthetic picture. `masks` has one entry per category drawn, in `CATEGORIES`' order; they never overlap.

    An entry is all false where the picture was asked to have no lesion.
    """

    image: UInt8[np.ndarray, "height width 3"]
    masks: Mapping[str, Bool[np.ndarray, "height width"]]
    modality: str
    anatomy: str
    look: str


@dataclass(frozen=True)
class _Look:
    """How one kind of picture is drawn.

    Lesions lie within `field_xy` (half axes, as shares of width and height, about the centre), an ellipse or, where
    `boxed`, a rectangle. `colours` are those that nodules and cysts are painted with, RGB in [0, 1].
    """

    modality: str
    anatomy: str
    paint: Callable[["_Canvas"], Float[np.ndarray, "height width 3"]]
    field_xy: tuple[float, float]
    boxed: bool
    colours: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class _Canvas:
    """Coordinates from -1 to 1 across the picture, and the randomness to paint it with."""

    x: Float[np.ndarray, "height width"]
    y: Float[np.ndarray, "height width"]
    rng: np.random.Generator

    def cloud(self, cells: int) -> Float[np.ndarray, "height width"]:
        """Smooth noise of unit deviation with about `cells` blobs along the picture."""
        coarse = self.rng.standard_normal((cells, cells)).astype(np.float32)
        size_wh = (self.x.shape[1], self.x.shape[0])
        return np.asarray(Image.fromarray(coarse).resize(size_wh, Image.Resampling.BICUBIC), dtype=np.float32)

    def grain(self) -> Float[np.ndarray, "height width"]:
        """Independent noise of unit deviation."""
        return self.rng.standard_normal(self.x.shape, dtype=np.float32)

    def disc(self, width: float, height: float) -> Float[np.ndarray, "height width"]:
        """1 inside an ellipse with these half axes, 0 outside, soft over a few pixels."""
        rho = np.hypot(self.x / width, self.y / height)
        disc: Float[np.ndarray, "height width"] = np.clip((1.0 - rho) * min(self.x.shape) / 4 + 0.5, 0.0, 1.0)
        return disc


def _grey(values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width 3"]:
    return np.repeat(values[..., None], 3, axis=2)


def _tinted(
    values: Float[np.ndarray, "height width"], colour: tuple[float, float, float]
) -> Float[np.ndarray, "height width 3"]:
    return values[..., None] * np.asarray(colour, dtype=np.float32)


def _ultrasound(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    layers = 0.05 * np.sin(9.0 * canvas.y + canvas.cloud(3))
    speckle = 1.0 + 0.25 * canvas.grain()
    return _grey((0.42 + layers + 0.03 * canvas.cloud(6)) * speckle)


def _ct(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    body = canvas.disc(0.92, 0.9)
    fat = body - canvas.disc(0.86, 0.82)
    return _grey(0.03 + body * (0.45 + 0.03 * canvas.cloud(5)) - 0.2 * fat + 0.02 * canvas.grain())


def _mri(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    head, skull, brain = canvas.disc(0.8, 0.94), canvas.disc(0.74, 0.87), canvas.disc(0.7, 0.83)
    return _grey(0.75 * (head - skull) + brain * (0.42 + 0.04 * canvas.cloud(9)) + 0.025 * canvas.grain())


def _photo(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    slope_x, slope_y = canvas.rng.uniform(-0.08, 0.08, 2)
    light = 0.7 + slope_x * canvas.x + slope_y * canvas.y + 0.02 * canvas.cloud(8) + 0.015 * canvas.grain()
    return _tinted(light, (1.0, 0.76, 0.64))


def _fundus(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    disc = canvas.disc(0.95, 0.95)
    light = 0.62 + 0.03 * canvas.cloud(4) + 0.015 * canvas.grain()
    for bend, start in canvas.rng.uniform(-0.5, 0.5, (4, 2)):
        vessel = np.abs(canvas.y - start - bend * np.sin(2.0 * canvas.x)) < 0.012
        light = light - 0.07 * vessel
    return _tinted(disc * light, (1.0, 0.55, 0.25))


def _dermoscopy(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    corners = np.clip(np.hypot(canvas.x, canvas.y) - 0.95, 0.0, None)
    light = 0.75 - 0.8 * corners + 0.02 * canvas.cloud(12) + 0.015 * canvas.grain()
    for bend, start in canvas.rng.uniform(-0.8, 0.8, (3, 2)):
        light = light - 0.12 * (np.abs(canvas.x - start - bend * canvas.y**2) < 0.008)
    return _tinted(light, (1.0, 0.83, 0.74))


def _endoscopy(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    centre_x, centre_y = canvas.rng.uniform(-0.3, 0.3, 2)
    depth = np.hypot(canvas.x - centre_x, canvas.y - centre_y)
    folds = 0.04 * np.sin(11.0 * depth + canvas.cloud(3))
    light = 0.58 + 0.08 * np.clip(depth, 0.0, 1.0) + folds + 0.015 * canvas.grain()
    return _tinted(light, (1.0, 0.52, 0.44))


def _xray(canvas: _Canvas) -> Float[np.ndarray, "height width 3"]:
    ribs = 0.05 * np.sin(14.0 * canvas.y + 2.5 * canvas.x**2)
    spine = 0.15 * np.exp(-((canvas.x / 0.12) ** 2))
    return _grey(0.45 + ribs + spine + 0.03 * canvas.cloud(4) + 0.02 * canvas.grain())


_WHITE, _BLACK = (0.95, 0.95, 0.95), (0.08, 0.08, 0.08)
_GREYS = {"nodule": _WHITE, "cyst": _BLACK}
_LOOKS: Mapping[str, _Look] = {
    "ultrasound": _Look("ultrasound", "neck", _ultrasound, (0.45, 0.45), True, _GREYS),
    "ct": _Look("ct", "abdomen", _ct, (0.39, 0.37), False, _GREYS),
    "mri": _Look("mri", "head", _mri, (0.33, 0.39), False, _GREYS),
    "photo": _Look(
        "visible-light photography",
        "foot",
        _photo,
        (0.46, 0.46),
        True,
        {"nodule": (1.0, 0.93, 0.85), "cyst": (0.45, 0.1, 0.1)},
    ),
    "fundus": _Look(
        "fundus photography",
        "eye",
        _fundus,
        (0.42, 0.42),
        False,
        {"nodule": (1.0, 0.95, 0.55), "cyst": (0.25, 0.06, 0.03)},
    ),
    "dermoscopy": _Look(
        "dermoscopy", "skin", _dermoscopy, (0.38, 0.38), False, {"nodule": (1.0, 0.95, 0.95), "cyst": (0.3, 0.17, 0.1)}
    ),
    "endoscopy": _Look(
        "endoscopy", "abdomen", _endoscopy, (0.44, 0.44), True, {"nodule": (1.0, 0.85, 0.75), "cyst": (0.2, 0.04, 0.06)}
    ),
    "xray": _Look("x-ray", "lung", _xray, (0.42, 0.42), True, _GREYS),
}

HELD_OUT_LOOKS = ("endoscopy", "xray")
"""Looks that no training set of phantoms has unless it asks for them by name."""

LOOKS = tuple(look for look in _LOOKS if look not in HELD_OUT_LOOKS)
"""Looks that phantoms are drawn in unless told otherwise."""


def phantom(
    seed: int,
    look: str | None = None,
    size_wh: tuple[int, int] = (128, 96),
    lesions: int | None = None,
    kinds: int = 1,
) -> Phantom:
    """One phantom, the same for the same arguments.

    look: one of `LOOKS` or `HELD_OUT_LOOKS`; by the seed from `LOOKS` if None. size_wh: 16 pixels or more each way.
    lesions: how many of each kind; one to four by the seed if None; 0 gives healthy tissue. kinds: 1 (either, by the
    seed) or 2. Lesions are of any shape and of any scale down to the smallest that the box convention counts, and do
    not touch; where all of them do not fit into a very small picture, fewer are drawn, one at least.

    Raises KeyError for an unknown look.
    """
    rng = np.random.default_rng(seed)
    name = look or LOOKS[int(rng.integers(len(LOOKS)))]
    style = _LOOKS[name]
    width, height = size_wh
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    picture = style.paint(_Canvas(x, y, rng)).astype(np.float32)
    drawn = CATEGORIES if kinds == 2 else (CATEGORIES[int(rng.integers(2))],)
    masks = {category: np.zeros((height, width), dtype=bool) for category in drawn}
    counts = [int(rng.integers(1, 5)) if lesions is None else lesions for _ in drawn]
    todo = [category for category, count in zip(drawn, counts, strict=True) for _ in range(count)]
    taken: list[tuple[float, float, float]] = []
    for category in rng.permutation(todo) if todo else ():
        spot = _place(style, size_wh, len(todo), taken, rng)
        if spot is not None:
            taken.append(spot)
            _draw(picture, masks[str(category)], spot, style.colours[str(category)], rng)
    image = (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Phantom(image, masks, style.modality, style.anatomy, name)


def _place(
    style: _Look,
    size_wh: tuple[int, int],
    count: int,
    taken: list[tuple[float, float, float]],
    rng: np.random.Generator,
) -> tuple[float, float, float] | None:
    """Centre and radius in pixels of a free circle inside the look's field; None where none is left.

    The radius is drawn evenly on a logarithmic scale, then shrunk until a place is found.
    """
    smallest_px = _smallest_radius_px(size_wh)
    largest_px = max(smallest_px, 0.3 * min(size_wh) / np.sqrt(count))
    radius_px = float(np.exp(rng.uniform(np.log(smallest_px), np.log(largest_px))))
    centre, half = np.asarray(size_wh) / 2, np.asarray(style.field_xy) * size_wh
    while True:
        offsets = rng.uniform(-1.0, 1.0, (64, 2))
        if not style.boxed:
            offsets = offsets[np.hypot(*offsets.T) <= 1.0]
        centres = centre + offsets * np.maximum(half - radius_px, 0.0)
        free = np.ones(len(centres), dtype=bool)
        for x, y, other_px in taken:
            free &= np.hypot(centres[:, 0] - x, centres[:, 1] - y) > radius_px + other_px + 2.5
        if free.any():
            x, y = centres[int(np.argmax(free))]
            return float(x), float(y), radius_px
        if radius_px == smallest_px:
            return None
        radius_px = max(smallest_px, 0.8 * radius_px)


def _smallest_radius_px(size_wh: tuple[int, int]) -> float:
    """Radius at which even the thinnest shape covers what the box convention counts as a lesion, with some to spare."""
    return float(np.sqrt(1.5 * smallest_lesion_px(size_wh[0] * size_wh[1]) / (np.pi * _THINNEST)))


_THINNEST = 0.35


def _draw(
    picture: Float[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
    spot: tuple[float, float, float],
    colour: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    """Paint one lesion into the picture and its mask: round, oval, elongated or lobed; sharp or soft; plain or mottled.

    It stays within the circle `spot` (its soft edge reaches a little further) and is one 8-connected component.
    """
    x, y, radius_px = spot
    ratio = rng.choice((1.0, 0.65, _THINNEST))
    lobes, depth = (int(rng.integers(3, 6)), 0.35) if ratio == 1.0 and rng.random() < 0.4 else (1, 0.0)
    turn, phase = rng.uniform(0.0, np.pi, 2)
    reach = int(np.ceil(1.3 * radius_px)) + 1
    rows = slice(max(0, int(y) - reach), int(y) + reach + 1)
    columns = slice(max(0, int(x) - reach), int(x) + reach + 1)
    height, width = mask[rows, columns].shape
    dy = np.arange(rows.start, rows.start + height)[:, None] + 0.5 - y
    dx = np.arange(columns.start, columns.start + width)[None, :] + 0.5 - x
    along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    border = radius_px * (1.0 - depth * (0.5 + 0.5 * np.sin(lobes * np.arctan2(across, along) + phase)))
    depth_px = border - np.hypot(along, across / ratio)
    inside = depth_px >= 0.0
    if inside.sum() < 4:
        inside = np.hypot(dx, dy) <= max(1.5, radius_px)
    labels, found = ndimage.label(inside, structure=np.ones((3, 3)))
    if found > 1:
        inside = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    mask[rows, columns] |= inside
    soft_px = rng.choice((1.0, max(1.0, 0.5 * radius_px)))
    opacity = np.where(inside, 1.0, 0.0) if soft_px == 1.0 else np.clip(depth_px / soft_px + 0.5, 0.0, 1.0)
    patches = Image.fromarray(rng.random((5, 5), dtype=np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    mottle = 1.0 - rng.choice((0.0, 0.8)) * np.asarray(patches)
    strength = (rng.uniform(0.65, 0.9) * opacity * mottle)[..., None]
    window = picture[rows, columns]
    window[...] = window * (1.0 - strength) + np.asarray(colour, dtype=np.float32) * strength


def write_phantom_set(
    root: Path,
    count: int,
    seed: int,
    size_wh: tuple[int, int] = (128, 96),
    looks: tuple[str, ...] = LOOKS,
    negatives: float = 0.15,
    two_kinds: float = 0.3,
    val_share: float = 0.25,
    lesions: int | None = None,
) -> Path:
    """A data set of `count` phantoms on disk, as `coreseg.data.store` opens it; returns its folder.

    One row per picture and category, so pictures with two kinds have two rows that only the question tells apart. A
    share `negatives` of the pictures is asked for a category they lack: half of these show the other one, half
    nothing. Each picture is its own case; `source` names the look. `lesions` of each kind, one to four if None.
    """
    # The data layer lies above this module, and is needed only here.
    from coreseg.data.store import write_set

    rng = np.random.default_rng(seed)
    in_val = set(rng.permutation(count)[: round(val_share * count)].tolist())
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    samples: list[Sample] = []
    for index in range(count):
        look = looks[int(rng.integers(len(looks)))]
        chance = float(rng.random())
        drawn = 0 if chance < negatives / 2 else lesions
        kinds = 2 if chance >= negatives and rng.random() < two_kinds else 1
        shown = phantom(int(rng.integers(2**32)), look, size_wh, drawn, kinds)
        masks = dict(shown.masks)
        if negatives / 2 <= chance < negatives:
            masks = {
                category: np.zeros_like(mask) for mask in masks.values() for category in set(CATEGORIES) - set(masks)
            }
        name = f"phantom-{index:05d}"
        Image.fromarray(shown.image).save(root / "images" / f"{name}.png")
        split = "val" if index in in_val else "train"
        samples += [_row(root, name, shown, category, mask, split, rng) for category, mask in masks.items()]
    write_set(root, samples)
    return root


def _row(
    root: Path,
    name: str,
    shown: Phantom,
    category: str,
    mask: Bool[np.ndarray, "height width"],
    split: str,
    rng: np.random.Generator,
) -> Sample:
    """Writes one mask and gives the row that asks for it."""
    from coreseg.data.build.describe import describe

    mask_file_name = f"masks/{name}-{category}.png"
    write_mask(root / mask_file_name, mask)
    return Sample(
        file_name=f"images/{name}.png",
        mask_file_name=mask_file_name,
        modality=shown.modality,
        anatomy=shown.anatomy,
        category=category,
        boxes=box_tuples(mask_to_boxes(mask)),
        query=ask(category, rng),
        reasoning=describe(shown.image, mask, shown.modality, shown.anatomy, category, int(rng.integers(2**32))),
        source=f"phantom_{shown.look}",
        licence="CC0-1.0",
        case=name,
        split=split,
    )
