"""Sentences about a lesion: statements put into words, found again in text, and turned into their opposites.

Eight kinds of statement, each with a few values (`VALUES`); `coreseg.statements` measures them. What is read here is
free English as in reports: side and place are those of the picture, so that a side or a place of the body ("left
breast", "lower lobe") is no statement, nor is anything about healthy tissue or right behind a negation.

Source: our choice throughout.
"""

import re
from collections.abc import Mapping, Sequence
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
_FRAME = r"(?:image|picture|frame|photograph|photo|slice|scan|film|field of view|field)"
_PICTURE = rf"of (?:the|this) {_FRAME}"
_PART = rf"(?: hand)? (?:side|part|half|third|edge|border|margin|corner|quadrant|area|region|{_PICTURE})"
_TOWARDS = r"(?:on|to|towards?|at) the (?:far |upper |lower )?"
_MIDDLE = r"(?:(?:the )?(?:centre|center|midline|middle))"
_MID_HEIGHT = "(?:(?:mid|middle|half) height|half ?way (?:up|down))"
_BORDER = r"(?:[\w-]+ ){0,2}(?:edge|border|margin|outline|contour|boundary|boundarie|rim)s?"
_LOOKS = rf"{_BORDER} (?:is|are|looks?|appears?|seems?|remains?) (?:(?!not |no |never )\w+ ){{0,2}}"
_INTERIOR = (
    r"(?:texture|interior|inside|architecture|content|echoe?|echotexture|signal|structure|floor|colour|pigment)s?"
)
# A part of a lesion that is darker or brighter than the rest of it: that is its texture.
_INNER = r"(?! (?:\w+ )?(?:rim|centre|center|core|pocket|speck|spot|dot|floor|component|strand|septa|cavity)s?\b)"
_LESION = (
    r"(?:lesion|mass|nodule|focus|region|area|spot|patch|ulcer|wound|polyp|opacity|tumou?r|cyst|bleed|haemorrhage|"
    r"infarct|scar|deposit|collection|shadow)"
)
_SOUGHT = (
    r"(?!(?:second|other|further|more|additional) )(?:\w+ ){0,3}?"
    r"(?:lesion|mass|nodule|ulcer|wound|polyp|opacity|opacitie|tumou?r|cyst|exudate|ha?emorrhage|infarct|infarction)s?"
)
_NOWHERE = rf"(?= ?(?:$|,|here\b|in (?:the|this) {_FRAME}))"


def _one_side(side: str) -> str:
    return (
        rf"{side}{_PART}|{_TOWARDS}{side}{_BODY}|(?:upper|lower|top|bottom|middle|mid) {side}{_BODY}|{side}most|"
        rf"{side} of (?:{_MIDDLE}|it)"
    )


def _one_end(word: str, end: str) -> str:
    zone = r"(?:part|half|third|quarter|area|region|zone|quadrant|corner|left|right)s?"
    return (
        rf"{word}(?:most)? (?:(?:left|right|central) )?(?:{zone}|(?:edge|margin) {_PICTURE}){_BODY}|"
        rf"(?:very )?{end}(?: (?:left|right|edge|{_PICTURE}))?"
    )


def _share(amounts: str) -> str:
    """A share of the picture; "the upper half of the picture" is none."""
    not_a_zone = "".join(rf"(?<!{word} )" for word in ("upper", "lower", "left", "right", "middle", "central", "outer"))
    return rf"{not_a_zone}(?:{amounts})(?: (?:%|per ?cent))? of (?:the|this) (?:whole |entire )?{_FRAME}"


_ONE = (
    r"(?<!other )(?<!er )(?<!est )(?<!left )(?<!right )one"
    r"(?! (?:side|sided|of|in|on|at|to|half|third|edge|end|part|another|is|that|which|can|would)\b)"
)
# Counted of these, a number says nothing of how many lesions there are.
_OF_ONE = r"(?! (?:\w+ )?(?:tone|shade|colour|lobe|centimetre|millimetre|centimeter|millimeter|cm|mm|time)s?\b)"

_UNEVEN = "mixed|uneven|mottled|patchy|speckled|variegated"
_SOFT = "blurr(?:ed|y)|fuzzy|soft|indistinct|unclear|vague|hazy|faded|fading"
_CRISP = "sharp|crisp|clear(?: cut)?|distinct|well defined"
_FADES = r"(?:blend|fade|merge|melt)(?:s|ing)? (?:\w+ ){0,2}into"
_SEEN = r"(?! (?:is |are )?(?:not|cannot|can not)\b)"

# Per kind and value: its own wordings, and a pattern of all that is read as it. The order is that of reading: a span
# that one value took is not read again for the next, so "very large" stands before "large".
_LEXICON: Mapping[str, Mapping[str, tuple[tuple[str, ...], str]]] = {
    "side": {
        "both": (
            ("on both sides of the image", "in both halves of the image"),
            r"both (?:sides|halves)|either side|each (?:side|half)|left and (?:the )?right|right and (?:the )?left|"
            r"bilateral(?:ly)?",
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
            rf"central(?:ly)?{_BODY}|(?:centre|center|middle) {_PICTURE}|"
            r"(?:in|at|on|along|near|around|close to) the midline",
        ),
    },
    "place": {
        "spread": (
            ("from top to bottom", "over the whole height"),
            r"(?<!third from )(?:top |upper (?:\w+ ){0,2})to (?:the )?(?:bottom|lower)"
            r"(?: (?:part|half|third|edge|end))?|bottom to (?:the )?top|(?:whole|entire|full) height",
        ),
        "middle": (
            ("at mid height", "at middle height", "halfway up"),
            rf"(?<!above )(?<!below ){_MID_HEIGHT}|(?:centre|center|middle) {_PICTURE}|"
            r"(?:mid ?way|half ?way) between (?:the )?top and (?:the )?bottom|neither high nor low|"
            "middle third from top to bottom",
        ),
        "upper": (
            ("in the upper part", "in the upper half", "towards the top"),
            rf"{_one_end('upper', 'top')}|above {_MID_HEIGHT}|high (?:up|in the {_FRAME})",
        ),
        "lower": (
            ("in the lower part", "in the lower half", "towards the bottom"),
            rf"{_one_end('lower', 'bottom')}|below {_MID_HEIGHT}|low (?:down|in the {_FRAME})",
        ),
    },
    "size": {
        "tiny": (("tiny", "very small"), r"tiny|very small|minuscule|minute|diminutive|punctate|pinpoint|pinhead"),
        "small": (("small", "fairly small"), rf"small(?:ish)?{_THING}|little(?: \w+)? {_LESION}|{_share('one|1')}"),
        "medium": (
            ("medium-sized", "moderately sized"),
            rf"(?:medium|mid|moderate|moderately) (?:sized?|in size)|{_share('few|[2-5]')}",
        ),
        "very large": (
            ("very large", "extensive"),
            rf"very (?:large|big){_THING}|extensive|huge|massive|enormous|gigantic|"
            rf"(?:dominat|fill)(?:es|s|ing) (?:\w+ ){{0,2}}{_FRAME}|"
            + _share("most|half|thirds?|quarters?|fifth|[2-9][0-9]"),
        ),
        "large": (
            ("large", "sizeable"),
            rf"(?:large|big){_THING}|size?able|bulky|{_share('sixth|eighth|tenth|[6-9]|1[0-9]')}",
        ),
    },
    "count": {
        "none": (
            ("nothing stands out", "nothing unusual is seen"),
            r"nothing (?:\w+ ){0,2}(?:stands out|is (?:seen|visible|found)|fits)|no (?:sign|trace|evidence) of|"
            r"no (?!second |other |further |more |additional )(?:\w+ ){1,4}(?:is|are) (?:visible|seen|present|found)|"
            rf"(?:an?|the|any) {_SOUGHT} (?:is|are) (?:absent|not (?:visible|seen|present|found)){_NOWHERE}|"
            rf"(?:there (?:is|are)|shows?|see|find|has|contains?) no {_SOUGHT}{_NOWHERE}|"
            rf"(?:cannot|can not|do not|could not) (?:find|see) (?:an?|any) {_SOUGHT}{_NOWHERE}|"
            rf"free of {_SOUGHT}{_NOWHERE}",
        ),
        "three": (("three", "a group of three"), rf"three(?! (?:quarter|dimension)s?){_OF_ONE}"),
        "four": (("four", "a group of four"), f"four{_OF_ONE}"),
        "two": (
            ("two", "a pair of"),
            rf"two(?! thirds){_OF_ONE}|pair of|couple of|both {_LESION}s|second {_LESION}{_SEEN}",
        ),
        "several": (
            ("several", "many", "numerous"),
            rf"(?:several|many|numerous)(?! as\b){_OF_ONE}|multiple(?! sclerosis)|scattered|at least (?:three|four)|"
            rf"(?:clusters?|handful) of(?! (?:two|three|four)\b)|(?:five|six|seven|eight|nine|ten){_OF_ONE}|dozens?",
        ),
        "one": (
            ("a single", "one"),
            rf"single|solitary|lone|{_ONE}{_OF_ONE}|"
            rf"(?:no|without a) (?:second|other|further|additional) {_LESION}s?|second {_LESION}",
        ),
    },
    "shape": {
        "irregular": (
            ("irregular", "irregularly shaped"),
            rf"(?:irregular(?:ly shaped)?|jagged)(?! {_BORDER})|lobulated|"
            r"(?:many|several) lobes|(?:star|pear) shaped|stellate",
        ),
        "oval": (("oval", "elliptical"), r"oval|ovoid|elliptical|egg shaped"),
        "elongated": (
            ("elongated", "oblong"),
            r"elongated?|oblong|stretched|long and (?:thin|narrow)|(?:band|ribbon|cigar|crescent) (?:like|shaped)|"
            r"crescentic|curvilinear|linear|thin curved",
        ),
        "round": (
            ("round", "circular"),
            rf"(?<!\ball )round(?:ed|ish)?(?! {_BORDER})|circular|spherical|(?:ball|disc) (?:shaped|like)",
        ),
    },
    "edge": {
        "blurred": (
            ("a blurred edge", "an ill-defined border", "a soft outline"),
            rf"(?:{_SOFT}) {_BORDER}|{_LOOKS}(?:{_SOFT})|{_BORDER} (?:that |which )?(?:\w+ )?{_FADES}|{_FADES}|"
            r"(?:ill|poorly) (?:defined|circumscribed|demarcated|delineated|marginated|bordered)",
        ),
        "sharp": (
            ("a sharp edge", "a well-defined border", "a crisp outline"),
            rf"(?:{_CRISP}) {_BORDER}|{_LOOKS}(?:{_CRISP})|"
            r"(?:well|sharply|clearly|crisply) (?:defined|circumscribed|demarcated|delineated|marginated|bordered)",
        ),
    },
    "contrast": {
        "similar": (
            ("about as bright as its surroundings", "similar in brightness to its surroundings"),
            r"as (?:bright|dark) as|equally (?:bright|dark)|"
            r"(?:similar|equal|same) (?:in )?(?:brightness|tone)|iso(?:intense|dense|echoic)",
        ),
        "darker": (
            ("darker than its surroundings", "darker than the tissue around it"),
            rf"dark(?:er)?{_INNER}|black(?:er)?|(?:low|lower|less|reduced) brightness|less bright|"
            r"hypo(?:intense|dense|echoic|attenuating)|anechoic|lucent|radiolucent|"
            r"(?:low|reduced) (?:signal|intensity|density|attenuation|echogenicity)|less dense",
        ),
        "brighter": (
            ("brighter than its surroundings", "brighter than the tissue around it"),
            rf"(?<!less )bright(?:er|ly)?{_INNER}|(?:lighter|paler|whiter){_INNER}|"
            rf"(?:high|higher|more|increased) brightness|hyper(?:intense|dense|echoic|attenuating)|denser|"
            rf"dense {_LESION}|dense (?:focus|foci)|"
            r"(?:high|increased) (?:signal|intensity|density|attenuation|echogenicity)",
        ),
    },
    "texture": {
        "heterogeneous": (
            ("a heterogeneous interior", "a mixed texture"),
            rf"(?:hetero|inhomo)gene?ous(?:ly)?|mottled|(?:{_UNEVEN}) (?:\w+ ){{0,3}}{_INTERIOR}|"
            rf"{_INTERIOR} (?:is|are|looks?|appears?) (?:\w+ )?(?:{_UNEVEN})|"
            r"(?:many|several|different|mixed) (?:tone|shade)s",
        ),
        "homogeneous": (
            ("a homogeneous interior", "an even texture"),
            rf"homogene?ous(?:ly)?|(?:even|uniform|smooth) (?:inner |internal )?{_INTERIOR}|"
            r"(?:one|a single) (?:tone|shade)|(?:completely|entirely|perfectly) uniform|"
            rf"{_INTERIOR} (?:is|are|looks?|appears?) (?:\w+ )?(?:even|uniform|smooth)",
        ),
    },
}
_PATTERNS = {
    kind: {value: re.compile(rf"\b(?:{pattern})\b") for value, (_, pattern) in values.items()}
    for kind, values in _LEXICON.items()
}
_FILLER = (
    "a|an|the|any|very|clearly|about|to|towards?|in|at|on|of|near|lie|lying|located|situated|seen|found|look|appear|seem|have|"
    "has|reach|extend"
)
_LIMIT = "confined|restricted|limited|only|just"
_NOT = "\\bnot|n't|\\b(?:non|neither|nor|never|rather than|instead of)"
_NEGATION = re.compile(rf"(?:{_NOT}|\b(?:no|without))(?: (?:{_FILLER}|{_LIMIT}))*$")
# Other than "not only" and "no": what stands behind these is denied of the lesion, not merely left unsaid.
_DENIAL = re.compile(rf"(?:{_NOT})(?: (?:{_FILLER}))*$")
_DENIAL_OF_NOUN = re.compile(rf"(?:{_NOT}|\b(?:no|without))(?: (?:{_FILLER}))*$")
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


def listed(words: Sequence[str]) -> str:
    """The words as a list in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def find(kind: str, text: str, *, denied: bool = False) -> set[str]:
    """The values of one kind that a text states, or those that it denies ("it is not round").

    Sentences about healthy tissue are left out. Values right behind a negation are not stated, and denied only where
    that says something of the lesion: not behind "not confined to", and behind "no" for edge and texture only.
    """
    return {value for value, _, _ in _hits(kind, _single_spaced(text), denied)}


# Of one length with the text, so that a place in one is a place in the other.
_PLAIN = str.maketrans(f"{ascii_uppercase}-", f"{ascii_lowercase} ")


def _single_spaced(text: str) -> str:
    return re.sub(r"[^\S\n]+", " ", text)


def _hits(kind: str, text: str, denied: bool = False) -> list[tuple[str, int, int]]:
    """What `find` reads in a single-spaced text: each value with its start and end."""
    denial = _DENIAL_OF_NOUN if kind in ("edge", "texture") else _DENIAL
    found = []
    for sentence in re.finditer(r"[^.;:!?\n]+", text.translate(_PLAIN)):
        unread = sentence.group()
        if _OF_HEALTH.match(unread):
            continue
        for value, pattern in _PATTERNS[kind].items():
            for hit in pattern.finditer(unread):
                before = unread[: hit.start()].rstrip()
                if denial.search(before) if denied else not _NEGATION.search(before):
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
