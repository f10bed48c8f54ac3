"""Checkable statements: what a sentence about a lesion says that its mask and pixels can confirm or refute.

Eight kinds, each with a few values (`VALUES`). A value is *measured* from image and mask, *worded* as a phrase, and
*found* again in text, so that a description can be written from a reference and any description checked against one.

Side and place are those of the picture, not of the patient, and of all lesions together. Count follows the box
convention (`coreseg.masks.mask_to_boxes`). Size (share of the picture covered), shape, edge, contrast and texture are
those of the largest lesion.

Source: our choice throughout; the paper has its descriptions judged by a second model instead. The thresholds are
written beside each measure.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from string import ascii_lowercase, ascii_uppercase

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

from coreseg.masks import label_lesions, smallest_lesion_px

VALUES: Mapping[str, tuple[str, ...]] = {
    "side": ("left", "centre", "right", "both"),
    "place": ("upper", "middle", "lower", "spread"),
    "size": ("tiny", "small", "medium", "large", "very large"),
    "count": ("none", "one", "two", "three", "four", "several"),
    "shape": ("round", "oval", "elongated", "irregular"),
    "edge": ("sharp", "blurred"),
    "contrast": ("darker", "similar", "brighter"),
    "texture": ("homogeneous", "heterogeneous"),
}
"""Every kind of statement and the values it can take."""

KINDS = tuple(VALUES)

_PATCH_PX = 256
"""The largest lesion is looked at in a crop of at most this side."""


# --- measuring -------------------------------------------------------------------------------------------------------


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
    return {kind: next(iter(values)) for kind, values in _values(image, mask, slack=0.0).items() if values}


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
    return {kind: frozenset(values) for kind, values in _values(image, mask, slack=1.0).items() if values}


def _values(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"], slack: float
) -> dict[str, list[str]]:
    """Values per kind: one each with slack 0, those within the tolerance of a threshold with slack 1."""
    if not mask.any():
        return {"count": ["none"]}
    seen = features(image, mask)
    # A size within a quarter of a limit is near it: sizes are compared by ratio, so on a logarithmic scale.
    size_limits = tuple(float(np.log(share)) for share in (0.002, 0.015, 0.06, 0.2))
    return {
        "side": _along(seen.left, seen.right, seen.x, VALUES["side"], slack),
        "place": _along(seen.top, seen.bottom, seen.y, VALUES["place"], slack),
        "size": _bands(float(np.log(seen.size)), VALUES["size"], size_limits, 0.25 * slack),
        "count": [VALUES["count"][min(seen.count, 5)]],
        "shape": _shapes(seen.axis_ratio, seen.solidity, slack),
        "edge": _bands(seen.step, ("blurred", "sharp"), (0.4,), 0.08 * slack),
        "contrast": _bands(seen.contrast, VALUES["contrast"], (-0.04, 0.04), 0.015 * slack),
        "texture": _bands(seen.spread, VALUES["texture"], (0.08,), 0.015 * slack),
    }


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


# --- wording and finding ---------------------------------------------------------------------------------------------

# Said of these, a side, a place or a size is anatomy and no statement.
_ORGANS = "lobe|lung|breast|kidney|ventricle|atrium|hemisphere|eye|eyelid|lip|limb|arm|leg|jaw|pole|abdomen"
_BODY = rf"(?! (?:upper |middle |lower )?(?:{_ORGANS})s?\b)"
_THING = r"(?! (?:bowel|intestine|vessel|artery|arteries|vein|airway)s?\b)"
_PICTURE = r"of (?:the|this) (?:image|picture)"
_PART = rf"(?: hand)? (?:side|part|half|third|edge|border|corner|quadrant|area|region|{_PICTURE})"
_TOWARDS = r"(?:on|to|towards?|at) the (?:far |upper |lower )?"
_BORDER = r"(?:[\w-]+ ){0,2}(?:edge|border|margin|outline|contour|boundary|boundarie)s?"
_NO_COUNT = r"(?! (?:side|of|half|third|edge|end|part|another|is|that|which|can|would)\b)"


def _one_side(side: str) -> str:
    return rf"{side}{_PART}|{_TOWARDS}{side}{_BODY}|(?:upper|lower|top|bottom|middle|mid) {side}{_BODY}|{side}most"


# Per kind and value: its own wordings, and a pattern of all that is read as it. The order is that of reading: a span
# that one value took is not read again for the next, so "very large" stands before "large".
_LEXICON: Mapping[str, Mapping[str, tuple[tuple[str, ...], str]]] = {
    "side": {
        "both": (
            ("on both sides of the image", "in both halves of the image"),
            r"both (?:sides|halves)|either side|left and (?:the )?right|right and (?:the )?left|bilateral(?:ly)?",
        ),
        "left": (
            ("on the left side of the image", "in the left part of the image", "on the left of the image"),
            _one_side("left"),
        ),
        "right": (
            ("on the right side of the image", "in the right part of the image", "on the right of the image"),
            _one_side("right"),
        ),
        "centre": (
            ("in the central part of the image", "centrally in the image"),
            rf"central(?:ly)?|(?:centre|center|middle) {_PICTURE}|midline",
        ),
    },
    "place": {
        "spread": (
            ("from top to bottom", "over the whole height"),
            r"top to (?:the )?bottom|bottom to (?:the )?top|(?:whole|entire|full) height",
        ),
        "middle": (
            ("at mid height", "at middle height", "halfway up"),
            rf"(?:mid|middle|half) height|halfway (?:up|down)|(?:centre|center|middle) {_PICTURE}",
        ),
        "upper": (("in the upper part", "in the upper half", "towards the top"), rf"(?:upper(?:most)?|top){_BODY}"),
        "lower": (
            ("in the lower part", "in the lower half", "towards the bottom"),
            rf"lower(?:most)?{_BODY}(?! (?:signal|intensity|density|brightness|contrast|than)\b)|bottom",
        ),
    },
    "size": {
        "tiny": (("tiny", "very small"), r"tiny|very small|minuscule|punctate|pinpoint"),
        "small": (("small", "fairly small"), rf"small{_THING}"),
        "medium": (("medium-sized", "moderately sized"), r"(?:medium|mid|moderate|moderately) (?:sized?|in size)"),
        "very large": (("very large", "extensive"), rf"very (?:large|big){_THING}|extensive|huge|massive"),
        "large": (("large", "sizeable"), rf"(?:large|big){_THING}|size?able"),
    },
    "count": {
        "none": (
            ("nothing stands out", "nothing unusual is seen"),
            r"nothing (?:\w+ ){0,2}(?:stands out|is (?:seen|visible|found)|fits)|no (?:sign|trace|evidence) of|"
            r"no (?:\w+ ){1,4}(?:is|are) (?:visible|seen|present|found)",
        ),
        "three": (("three", "a group of three"), r"three(?! (?:quarter|dimension)s?)"),
        "four": (("four", "a group of four"), "four"),
        "two": (("two", "a pair of"), r"two(?! thirds)|pair of"),
        "several": (
            ("several", "many", "numerous"),
            r"several|many|numerous|multiple(?! sclerosis)|five|six|seven|eight|nine|ten|dozens?",
        ),
        "one": (("a single", "one"), rf"single|solitary|lone|one{_NO_COUNT}"),
    },
    "shape": {
        "irregular": (("irregular", "irregularly shaped"), rf"irregular(?:ly shaped)?(?! {_BORDER})|lobulated"),
        "oval": (("oval", "elliptical"), r"oval|ovoid|elliptical|egg shaped"),
        "elongated": (("elongated", "oblong"), r"elongated?|oblong|stretched|long and (?:thin|narrow)|band like"),
        "round": (("round", "circular"), r"round(?:ed|ish)?|circular"),
    },
    "edge": {
        "blurred": (
            ("a blurred edge", "an ill-defined border", "a soft outline"),
            rf"(?:blurr(?:ed|y)|fuzzy|soft|indistinct|unclear|vague) {_BORDER}|"
            r"(?:ill|poorly) (?:defined|circumscribed|demarcated)",
        ),
        "sharp": (
            ("a sharp edge", "a well-defined border", "a crisp outline"),
            rf"(?:sharp|crisp|clear|distinct) {_BORDER}|"
            r"(?:well|sharply|clearly) (?:defined|circumscribed|demarcated|bordered)",
        ),
    },
    "contrast": {
        "similar": (
            ("about as bright as its surroundings", "similar in brightness to its surroundings"),
            r"as (?:bright|dark) as|(?:similar|equal|same) (?:in )?(?:brightness|tone)|iso(?:intense|dense|echoic)",
        ),
        "darker": (
            ("darker than its surroundings", "darker than the tissue around it"),
            r"dark(?:er)?|hypo(?:intense|dense|echoic|attenuating)",
        ),
        "brighter": (
            ("brighter than its surroundings", "brighter than the tissue around it"),
            r"bright(?:er)?|lighter|hyper(?:intense|dense|echoic|attenuating)",
        ),
    },
    "texture": {
        "heterogeneous": (
            ("a heterogeneous interior", "a mixed texture"),
            r"(?:hetero|inhomo)gene?ous(?:ly)?|(?:mixed|uneven|mottled|patchy) (?:texture|interior)",
        ),
        "homogeneous": (
            ("a homogeneous interior", "an even texture"),
            r"homogene?ous(?:ly)?|(?:even|uniform|smooth) (?:texture|interior)",
        ),
    },
}
_PATTERNS = {
    kind: {value: re.compile(rf"\b(?:{pattern})\b") for value, (_, pattern) in values.items()}
    for kind, values in _LEXICON.items()
}
_NEGATION = re.compile(
    r"\b(?:not|no|without|neither|nor|never|rather than|instead of)(?: (?:a|an|the|any|very|clearly))*$"
)
_OF_HEALTH = re.compile(r"\W*(?:\w+ ){0,3}(?:healthy|normal|normally|usually|typically)\b")


def word(kind: str, value: str, rng: np.random.Generator) -> str:
    """One of the two or three wordings of a value.

    Side and place are adverbials ("in the upper third"); size, count, shape and contrast stand like adjectives
    ("a single", "brighter than its surroundings"); edge and texture are nouns ("a sharp edge"); the count "none" is a
    clause.
    """
    wordings, _ = _LEXICON[kind][value]
    return pick(wordings, rng)


def pick(wordings: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of several wordings, each as likely as the others."""
    return wordings[int(rng.integers(len(wordings)))]


def find(kind: str, text: str) -> set[str]:
    """The values of one kind that a text states.

    Sentences about healthy tissue, and values right behind a negation, are left out.
    """
    return {value for value, _, _ in _hits(kind, _single_spaced(text))}


# Of one length with the text, so that a place in one is a place in the other.
_PLAIN = str.maketrans(f"{ascii_uppercase}-", f"{ascii_lowercase} ")


def _single_spaced(text: str) -> str:
    return re.sub(r"[^\S\n]+", " ", text)


def _hits(kind: str, text: str) -> list[tuple[str, int, int]]:
    """What `find` reads in a single-spaced text: each value with its start and end."""
    found = []
    for sentence in re.finditer(r"[^.;:!?\n]+", text.translate(_PLAIN)):
        unread = sentence.group()
        if _OF_HEALTH.match(unread):
            continue
        for value, pattern in _PATTERNS[kind].items():
            for hit in pattern.finditer(unread):
                if not _NEGATION.search(unread[: hit.start()].rstrip()):
                    found.append((value, sentence.start() + hit.start(), sentence.start() + hit.end()))
                unread = f"{unread[: hit.start()]}{'#' * len(hit.group())}{unread[hit.end() :]}"
    return found


# Per kind: words that go with a hit, and per value what is written in its place, by what the hit is spelled like.
# Values whose neighbours count as true near a threshold turn into ones further away.
_OPPOSITES: Mapping[str, tuple[str, Mapping[str, Mapping[str, str]]]] = {
    "side": (
        "",
        {
            "left": {"left": "right"},
            "right": {"right": "left"},
            "both": {
                "both sides|either side": "the left side",
                "both halves": "the left half",
                "(?:left|right) and (?:the )?(?:left|right)": "left",
                "bilateral(?:ly)?": "on the left",
            },
            "centre": {
                "centrally": "on the left",
                "central|cent(?:re|er)|middle": "left",
                "midline": "left side",
            },
        },
    ),
    "place": (
        r"\b(?:at|in|from|over|along|across)(?: the)? ",
        {
            "upper": {"upper": "lower", "top": "bottom"},
            "lower": {"lower": "upper", "bottom": "top"},
            "middle": {".*": "in the upper part"},
            "spread": {".*": "in the upper part"},
        },
    ),
    "count": (
        r"\b(?:an? group of|an?) ",
        {
            "one": {".*": "four"},
            **{value: {".*": "one"} for value in ("two", "three", "four", "several")},
        },
    ),
}


def contradict(text: str) -> str | None:
    """The text with its statements of side, place and count contradicted; None where it makes none of them.

    Every other word stays, so the grammar of number is not mended ("four small area"). A kind is left as it is where
    the new words would not be read as other values only.
    """
    contradicted = _single_spaced(text)
    for kind in _OPPOSITES:
        other = _flipped(kind, contradicted)
        states = find(kind, other)
        if states and not states & find(kind, contradicted):
            contradicted = other
    return None if contradicted == _single_spaced(text) else contradicted


def _flipped(kind: str, text: str) -> str:
    leads, opposites = _OPPOSITES[kind]
    # From the back, so that the places before stay true.
    for value, start, end in sorted(_hits(kind, text), key=lambda hit: -hit[1]):
        for spelled, instead in opposites.get(value, {}).items():
            if hit := re.search(spelled, text[start:end].translate(_PLAIN)):
                # Only a whole hit takes the words before it along.
                lead = re.search(f"(?:{leads})?$", text[:start].translate(_PLAIN)) if spelled == ".*" else None
                first, last = lead.start() if lead else start + hit.start(), start + hit.end()
                instead = instead.capitalize() if text[first].isupper() else instead
                text = f"{text[:first]}{instead}{text[last:]}"
                break
    return text


def find_all(text: str) -> dict[str, set[str]]:
    """The values of every kind that a text states; kinds it says nothing about are left out."""
    return {kind: values for kind in KINDS if (values := find(kind, text))}


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
