"""Sentences about a lesion: statements put into words, found again in text, and turned into their opposites.

Eight kinds of statement, each with a few values (`VALUES`); `coreseg.statements` measures them. What is read here is free
English as in reports: side and place are those of the picture, so that a side or a place of the body ("left breast",
"lower lobe") is no statement, nor is anything about healthy tissue or right behind a negation.

Source: our choice throughout.
"""

import re
from collections.abc import Mapping
from string import ascii_lowercase, ascii_uppercase

import numpy as np

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
