"""Checkable statements: what a sentence about a lesion says that its mask and pixels can confirm or refute.

Eight kinds, each with a few values (`VALUES`). A value is *measured* from image and mask, *worded* as a phrase, and
*found* again in text, so that a description can be written from a reference and any description checked against one.

Side and place are those of the picture, not of the patient, and of all lesions together. Count follows the box
convention (`coreseg.masks.mask_to_boxes`). Size (share of the picture covered), shape, edge, contrast and texture are
those of the largest lesion.

Source: our choice throughout; the paper has its descriptions judged by a second model instead. The thresholds are
written beside each measure.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

from coreseg.masks import label_lesions, smallest_lesion_px
from coreseg.sentences import KINDS, VALUES, find, find_all

_PATCH_PX = 256
"""The largest lesion is looked at in a crop of at most this side."""


@dataclass(frozen=True)
class Features:
    """What the thresholds are applied to; None where the lesion is too small to tell.

    left, right, top and bottom are the shares of the foreground in the outer thirds of the picture; x and y are its
    median position. The rest is of the largest lesion: size is the share of the picture it covers, axis ratio minor
    over major, solidity its area over that of the convex hull. Step is the share of the brightness difference
    that is bridged right at the border; contrast and spread are in units of the full brightness range.
    """

    left: float
    right: float
    top: float
    bottom: float
    x: float
    y: float
    size: float
    count: int
    axis_ratio: float | None
    solidity: float | None
    step: float | None
    contrast: float | None
    spread: float | None


def measure(
    kind: str, image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> str | None:
    """The value of one kind of statement; None where it cannot be measured (empty mask, lesion of a few pixels)."""
    return measure_all(image, mask).get(kind)


def measure_all(image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]) -> dict[str, str]:
    """The value of every kind that can be measured. An empty mask has only the count "none"."""
    return _measured(_look_at(image, mask))


def accepted(
    kind: str, image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> frozenset[str]:
    """The values that count as true: the measured one, and its neighbour where a threshold is near.

    Empty where nothing can be measured.
    """
    return accepted_all(image, mask).get(kind, frozenset())


def accepted_all(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> dict[str, frozenset[str]]:
    """`accepted` of every kind that can be measured, in one pass."""
    return _accepted(_look_at(image, mask))


def measured_and_accepted(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> tuple[dict[str, str], dict[str, frozenset[str]]]:
    """`measure_all` and `accepted_all` from one look at the pixels."""
    seen = _look_at(image, mask)
    return _measured(seen), _accepted(seen)


def _look_at(image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]) -> Features | None:
    return features(image, mask) if mask.any() else None


def _measured(seen: Features | None) -> dict[str, str]:
    return {kind: values[0] for kind, values in _values(seen, slack=0.0).items() if values}


def _accepted(seen: Features | None) -> dict[str, frozenset[str]]:
    return {kind: frozenset(values) for kind, values in _values(seen, slack=1.0).items() if values}


def _values(seen: Features | None, slack: float) -> dict[str, list[str]]:
    """Values per kind: one each with slack 0, those within the tolerance of a threshold with slack 1."""
    if seen is None:
        return {"count": ["none"]}
    # A size within a quarter of a limit is near it: sizes are compared by ratio, so on a logarithmic scale.
    size_limits = tuple(float(np.log(share)) for share in (0.002, 0.015, 0.06, 0.2))
    return {
        "side": _along(seen.left, seen.right, seen.x, VALUES["side"], slack),
        "place": _along(seen.top, seen.bottom, seen.y, VALUES["place"], slack),
        "size": _bands(float(np.log(seen.size)), VALUES["size"], size_limits, 0.25 * slack),
        "count": [count_value(seen.count)],
        "shape": _shapes(seen.axis_ratio, seen.solidity, slack),
        "edge": _bands(seen.step, ("blurred", "sharp"), (0.4,), 0.08 * slack),
        "contrast": _bands(seen.contrast, VALUES["contrast"], (-0.04, 0.04), 0.015 * slack),
        "texture": _bands(seen.spread, VALUES["texture"], (0.08,), 0.015 * slack),
    }


def count_value(lesions: int) -> str:
    """The value of the kind "count" for so many lesions, 0 or more."""
    return VALUES["count"][min(lesions, len(VALUES["count"]) - 1)]


def _bands(x: float | None, names: tuple[str, ...], limits: tuple[float, ...], slack: float) -> list[str]:
    """The names of the intervals that hold `x` once each is widened by `slack`; none for None."""
    if x is None:
        return []
    bounds = (-inf, *limits, inf)
    return [
        name for name, low, high in zip(names, bounds[:-1], bounds[1:], strict=True) if low - slack <= x < high + slack
    ]


def _along(low: float, high: float, middle: float, names: tuple[str, ...], slack: float) -> list[str]:
    """Where the foreground lies along one axis.

    The last name where a quarter or more lies in either outer third; else low, mid or high by the median position
    with limits at 0.44 and 0.56 of the picture.
    """
    spread = min(low, high)
    found = [names[3]] if spread >= 0.25 - 0.05 * slack else []
    if spread < 0.25 + 0.05 * slack:
        found += _bands(middle, names[:3], (0.44, 0.56), 0.04 * slack)
    return found


def _shapes(axis_ratio: float | None, solidity: float | None, slack: float) -> list[str]:
    """Irregular below a solidity of 0.8; else elongated, oval, round by axis ratio with limits at 0.5 and 0.8."""
    if axis_ratio is None or solidity is None:
        return []
    found = ["irregular"] if solidity < 0.8 + 0.04 * slack else []
    if solidity >= 0.8 - 0.04 * slack:
        found += _bands(axis_ratio, ("elongated", "oval", "round"), (0.5, 0.8), 0.07 * slack)
    return found


def features(image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]) -> Features:
    """Everything the kinds need, in one pass; `mask` is not empty."""
    labels, areas_px = label_lesions(mask)
    counted = areas_px >= smallest_lesion_px(mask.size)
    counted[areas_px.argmax()] = True
    lesions = counted[labels]
    left, right, x = _profile(lesions.sum(axis=0))
    top, bottom, y = _profile(lesions.sum(axis=1))
    grey, lesion, others = _patch(image, labels, int(areas_px.argmax()))
    axis_ratio, solidity = _outline(lesion)
    step, contrast, spread = _look(grey, lesion, others)
    return Features(
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x=x,
        y=y,
        size=float(areas_px.max()) / mask.size,
        count=int(counted.sum()),
        axis_ratio=axis_ratio,
        solidity=solidity,
        step=step,
        contrast=contrast,
        spread=spread,
    )


def _profile(counts: Int[np.ndarray, " length"]) -> tuple[float, float, float]:
    """Share of the foreground in the first and in the last third of an axis, and its median position in [0, 1]."""
    cumulative = np.concatenate(([0.0], np.cumsum(counts) / counts.sum()))
    edges = np.linspace(0.0, 1.0, len(cumulative))
    first, last = np.interp((1 / 3, 2 / 3), edges, cumulative)
    return float(first), float(1.0 - last), float(np.interp(0.5, cumulative, edges))


def _patch(
    image: UInt8[np.ndarray, "height width 3"], labels: Int[np.ndarray, "height width"], label: int
) -> tuple[Float[np.ndarray, "rows columns"], Bool[np.ndarray, "rows columns"], Bool[np.ndarray, "rows columns"]]:
    """A crop around one component: brightness in [0, 1], that component, and the others.

    Shrunk to `_PATCH_PX`, so that a photograph of any size takes the same short time.
    """
    window = ndimage.find_objects(labels, max_label=label)[label - 1]
    margin = 4 + max(axis.stop - axis.start for axis in window) // 3
    rows, columns = (slice(max(0, axis.start - margin), axis.stop + margin) for axis in window)
    crop, marks = Image.fromarray(image[rows, columns]).convert("L"), labels[rows, columns]
    scale = _PATCH_PX / max(crop.size)
    if scale >= 1.0:
        return np.asarray(crop, dtype=np.float64) / 255.0, marks == label, (marks > 0) & (marks != label)
    size_wh = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    grey = np.asarray(crop.resize(size_wh, Image.Resampling.BOX), dtype=np.float64) / 255.0
    # The nearest of three classes keeps the crop's own component apart from its neighbours.
    classes = Image.fromarray(np.where(marks == label, 1, np.where(marks > 0, 2, 0)).astype(np.uint8))
    small = np.asarray(classes.resize(size_wh, Image.Resampling.NEAREST))
    return grey, small == 1, small == 2


def _outline(lesion: Bool[np.ndarray, "rows columns"]) -> tuple[float | None, float | None]:
    """Axis ratio (from second moments) and solidity of one component; None below 24 pixels."""
    rows, columns = np.nonzero(lesion)
    if len(rows) < 24:
        return None, None
    # A pixel is a unit square: its own variance of 1/12 keeps a line one pixel wide from a ratio of zero.
    minor, major = np.linalg.eigvalsh(np.cov(np.stack((rows, columns)), bias=True) + np.eye(2) / 12)
    inner = ndimage.binary_erosion(lesion)
    border = np.argwhere(lesion & ~inner)
    corners = np.concatenate([border + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))])
    hull_px = float(ConvexHull(corners).volume)
    return float(np.sqrt(minor / major)), len(rows) / hull_px


def _look(
    grey: Float[np.ndarray, "rows columns"],
    lesion: Bool[np.ndarray, "rows columns"],
    others: Bool[np.ndarray, "rows columns"],
) -> tuple[float | None, float | None, float | None]:
    """Border step, contrast and spread of one component; None where there are too few pixels.

    Contrast: mean inside minus mean in a surrounding ring of half the lesion's radius. Step: the same difference
    within a tenth of the radius of the border (1.5 px at least), over that of the two zones beyond. Spread: standard
    deviation inside, after a light blur that takes out the grain.
    """
    inside = ndimage.distance_transform_edt(np.pad(lesion, 1, constant_values=True))[1:-1, 1:-1]
    outside = ndimage.distance_transform_edt(~lesion)
    radius_px = float(np.sqrt(lesion.sum() / np.pi))
    near_px = max(1.5, 0.1 * radius_px)
    ring = (outside > 0) & (outside <= max(3.0, 0.5 * radius_px)) & ~others
    # A ring is missing around a lesion that fills the picture, a lesion when it was a hair's breadth before shrinking.
    if not (ring.any() and lesion.any()):
        return None, None, None
    contrast = float(grey[lesion].mean() - grey[ring].mean())
    core = inside > near_px
    if core.sum() < 24:
        return None, contrast, None
    spread = float(ndimage.uniform_filter(grey, 3)[core].std())
    far = ring & (outside > near_px)
    close_in, close_out = lesion & ~core, ring & ~far
    if not far.any() or not close_in.any():
        return None, contrast, spread
    whole = float(grey[core].mean() - grey[far].mean())
    across = float(grey[close_in].mean() - grey[close_out].mean())
    # Without a brightness difference there is no edge to speak of.
    step = across / whole if abs(whole) >= 0.03 else None
    return step, contrast, spread


NEAR: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "size": {
        "tiny": ("small",),
        "small": ("tiny", "medium"),
        "medium": ("small", "large"),
        "large": ("medium", "very large"),
        "very large": ("large",),
    },
    "shape": {
        "round": ("oval",),
        "oval": ("round", "elongated", "irregular"),
        "elongated": ("oval", "irregular"),
        "irregular": ("oval", "elongated"),
    },
    "count": {"three": ("four", "several"), "four": ("three", "several"), "several": ("three", "four")},
}
"""Words that a reader would let pass for a measured value, beside those within a threshold's tolerance. Our choice."""


@dataclass(frozen=True)
class Contradiction:
    """A statement that a mask refutes: what the text states or denies of this kind, and what would have been true."""

    kind: str
    stated: frozenset[str]
    measured: frozenset[str]
    denied: bool = False

    @property
    def wrong(self) -> frozenset[str]:
        """The values at fault."""
        return self.stated & self.measured if self.denied else self.stated - self.measured


def contradictions(text: str, true: Mapping[str, Collection[str]]) -> tuple[Contradiction, ...]:
    """What a text by anybody says against `accepted_all` of a mask; more lenient than `holds`, made for our own texts.

    Sizes, shapes and counts may be a step off. Where there are several lesions, a text may tell of one here and one
    there: a side or place is refuted where none that it names is true, left with right meaning both and upper with
    lower spread; and "one" beside a true count of two or more is one of them. An empty mask refutes every statement. A
    denial is refuted where all that counts as true is denied; of side and place only where there is one lesion, and
    never of the count.
    """
    nothing_there = "none" in true.get("count", ())
    found = []
    for kind, stated in find_all(text).items():
        fits = set(true.get(kind, ()))
        fits |= {near for value in fits for near in NEAR.get(kind, {}).get(value, ())}
        if kind == "count" and stated & (fits - {"none", "one"}):
            stated -= {"one"}
        told = set(stated)
        if kind in ("side", "place"):
            low, _, high, both = VALUES[kind]
            told |= {both} if {low, high} <= stated else set()
        in_parts = kind in ("side", "place") and "one" not in true.get("count", ()) and bool(told & fits)
        if (kind in true or nothing_there) and stated - fits and not in_parts:
            found.append(Contradiction(kind, frozenset(stated), frozenset(true.get(kind, ()))))
    for kind in KINDS:
        denied, measured = find(kind, text, denied=True), frozenset(true.get(kind, ()))
        of_all = kind not in ("side", "place") or "one" in true.get("count", ())
        if measured and measured <= denied and of_all and kind != "count":
            found.append(Contradiction(kind, frozenset(denied), measured, denied=True))
    return tuple(found)


def holds(
    text: str, image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> float | None:
    """Share in [0, 1] of the statements in a text that hold; None where the text states nothing that can be judged.

    On an empty mask every statement about a lesion is wrong. What the mask is too small to tell is not judged.
    """
    true = accepted_all(image, mask)
    judged = [
        value in true.get(kind, ())
        for kind, values in find_all(text).items()
        if kind in true or not mask.any()
        for value in values
    ]
    return sum(judged) / len(judged) if judged else None
