"""The measured description: reasoning written from the reference mask and the pixels, without a teacher model.

It captions the reference; it is not a clinician's thought. Every statement in it is measured (`coreseg.statements`),
so it is true by construction, and a model trained on it can be checked word by word.

Source: our choice. The paper has a large multimodal model describe the lesion first and reason from that description;
this function has the same place in the pipeline and needs nothing but the sample.
"""

import zlib
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, UInt8

from coreseg.data.build.stage import Fault, Outcome
from coreseg.data.store import LesionSet
from coreseg.errors import DataError, InputError
from coreseg.nouns import plural, with_article
from coreseg.questions import ask
from coreseg.sentences import listed, pick, word
from coreseg.statements import measure_all
from coreseg.types import Sample

_PICTURES: Mapping[str, str] = {
    "ct": "a CT scan",
    "dermoscopy": "a dermoscopy image",
    "endoscopy": "an endoscopy image",
    "fundus photography": "a fundus photograph",
    "mri": "an MRI scan",
    "ultrasound": "an ultrasound image",
    "visible-light photography": "a photograph",
    "x-ray": "an x-ray image",
}

_HEALTHY: Mapping[tuple[str, str], str] = {
    ("ct", "abdomen"): "Healthy organs here are smooth and grey",
    ("ct", "head"): "Healthy brain tissue here is grey and alike in both halves",
    ("ct", "lung"): "Healthy lung tissue here is black with fine vessels",
    ("dermoscopy", "skin"): "Healthy skin here is pale with a fine pattern",
    ("endoscopy", "abdomen"): "Healthy bowel wall here is pink, smooth and folded",
    ("fundus photography", "eye"): "Healthy retina here is orange with a pale disc and fine vessels",
    ("mri", "breast"): "Healthy breast tissue here takes up little contrast",
    ("mri", "head"): "Healthy brain tissue here is alike in both halves",
    ("mri", "heart"): "Healthy heart muscle here is a dark ring of one thickness",
    ("ultrasound", "breast"): "Healthy breast tissue here lies in grey layers",
    ("ultrasound", "neck"): "Healthy thyroid tissue here is fine grained and grey",
    ("visible-light photography", "foot"): "Healthy skin here is closed and of one colour",
    ("x-ray", "breast"): "Healthy breast tissue here is a net of fine grey strands",
    ("x-ray", "lung"): "Healthy lungs here are dark with fine branching vessels",
}


def describe(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
    modality: str,
    anatomy: str,
    category: str,
    seed: int,
) -> str:
    """The measured description of one category in one image: at most 70 words, the same for the same seed.

    Says what picture it is, how healthy tissue looks there, with "yes" or "no" whether there is something, what is seen
    (four kinds of statement or more) and what it fits. So one word decides, and a model that writes such text can be
    asked how sure it is. Sides are the picture's. For an empty mask it says that nothing stands out. No digits, no
    coordinates: only letters, spaces, commas, periods and hyphens, given that the names passed in have no others.
    """
    return in_words(measure_all(image, mask), modality, anatomy, category, np.random.default_rng(seed))


def in_words(values: Mapping[str, str], modality: str, anatomy: str, category: str, rng: np.random.Generator) -> str:
    """The description that states these values, one of each kind: "count", "side" and "place", and what else there is.

    The count "none" alone will do.
    """
    healthy = _HEALTHY.get(
        (modality.lower(), anatomy.lower()), f"Healthy tissue of the {anatomy} here looks alike all over"
    )
    opening = f"{_opening(modality, anatomy, rng)} {healthy}."
    if values["count"] == "none":
        return f"{opening} {_nothing(category, rng)}"
    name = with_article(category) if values["count"] == "one" else plural(category)
    return f"{opening} {_seen(values, rng)} {pick(('This fits', 'This is in keeping with'), rng)} {name}."


def describe_rows(pictures: LesionSet, samples: Iterable[Sample], seed: int = 0) -> Generator[Outcome]:
    """The stage that writes each row's measured description; the questions stay.

    `pictures` is the set that the rows' files lie in; its own rows are not read. With the seed that a set was imported
    with, it gives the import's own texts again.
    """
    for sample in samples:
        # As the importer draws: text hangs on the row's own name, and the question comes first.
        rng = np.random.default_rng([seed, zlib.crc32(sample.mask_file_name.encode())])
        ask(sample.category, rng)
        try:
            image, mask = pictures.image(sample), pictures.mask(sample)
        except (DataError, InputError) as error:
            yield Outcome(sample, (Fault("picture", str(error)),))
            continue
        text = describe(image, mask, sample.modality, sample.anatomy, sample.category, int(rng.integers(2**32)))
        yield Outcome(replace(sample, reasoning=text), attempts=1)


def _opening(modality: str, anatomy: str, rng: np.random.Generator) -> str:
    picture = _PICTURES.get(modality.lower(), with_article(f"{modality} image"))
    return pick(
        (
            f"This is {picture} of the {anatomy}.",
            f"The picture is {picture} of the {anatomy}.",
            f"I see {picture} of the {anatomy}.",
        ),
        rng,
    )


def _nothing(category: str, rng: np.random.Generator) -> str:
    clause = word("count", "none", rng)
    return pick(
        (
            f"No, the whole picture looks like that, and {clause}. No area fits {with_article(category)}.",
            f"No, here {clause}, all of it looks as it should. No area fits {with_article(category)}.",
        ),
        rng,
    )


def _seen(values: Mapping[str, str], rng: np.random.Generator) -> str:
    """Two sentences: how many and where; then how the lesion, or the largest of several, looks."""
    words = {kind: word(kind, value, rng) for kind, value in values.items()}
    several = values["count"] != "one"
    noun, verb = pick(("area", "region"), rng), pick(("lie", "stand out"), rng)
    adjectives = [words[kind] for kind in ("size", "shape") if kind in words]
    looks = [words["contrast"]] if "contrast" in words else []
    if several:
        what, subject = f"{words['count']} {noun}s", "The largest"
        looks = [*adjectives, *looks]
    else:
        what, subject = f"{words['count']} {' '.join(adjectives)} {noun}", "It"
        verb = f"{verb}s" if verb == "lie" else "stands out"
    where = f"{words['place']}, {words['side']}"
    first = f"{what} {verb} {where}" if rng.random() < 0.5 else f"{where}, {what} {verb}"
    features = [words[kind] for kind in rng.permutation(("edge", "texture")) if kind in words]
    second = [f"is {listed(looks)}"] if looks else []
    second += [f"has {listed(features)}"] if features else []
    return f"Yes, {first}." + (f" {subject} {' and '.join(second)}." if second else "")
