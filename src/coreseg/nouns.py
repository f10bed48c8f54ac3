"""Names of lesions in English sentences: their article and their plural. Source: our choice throughout."""

import re


def with_article(noun: str) -> str:
    """The noun with "a" or "an", by its first letter; a first word without vowels is spelled out ("an MRI")."""
    first = re.split(r"[\s-]", noun.lower(), maxsplit=1)[0]
    spelled = not set(first) & set("aeiouy")
    return f"{'an' if first[:1] in tuple('aeiou') or (spelled and first[:1] in tuple('fhlmnrsx')) else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a lesion's name: of its head, which stands before "in" or "of" or at the end.

    A head that looks like a plural ("exudates", "caries") stays.
    """
    head, link, tail = noun, "", ""
    for word in (" in ", " of "):
        if word in noun:
            head, link, tail = noun.partition(word)
            break
    if re.search(r"[^siu]s$", head):
        return noun
    if head.endswith(("s", "x", "ch", "sh")):
        head = f"{head[:-2]}es" if head.endswith("sis") else f"{head}es"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        head = f"{head[:-1]}ies"
    else:
        head = f"{head}s"
    return f"{head}{link}{tail}"
