"""Articles and plurals of lesions' names."""

import pytest

from coreseg.nouns import plural, with_article


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("polyp", "polyps"),
        ("lung opacity", "lung opacities"),
        ("bleeding in the retina", "bleedings in the retina"),
        ("brain mass", "brain masses"),
        ("metastasis", "metastases"),
        ("x-ray", "x-rays"),
        ("villus", "villuses"),
        ("exudates of the retina", "exudates of the retina"),
    ],
)
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


def test_article() -> None:
    assert with_article("ulcer") == "an ulcer" and with_article("polyp") == "a polyp"
    assert with_article("MS lesion") == "an MS lesion" and with_article("x-ray image") == "an x-ray image"
    assert with_article("CT scan") == "a CT scan" and with_article("ischemic stroke") == "an ischemic stroke"
