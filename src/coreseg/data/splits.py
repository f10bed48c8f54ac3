"""Draw splits by patient, so that neither a patient nor a picture that is there twice crosses them."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int
from scipy import sparse
from scipy.sparse import csgraph

from coreseg.data.lookalikes import Fingerprint, find_matches
from coreseg.types import Sample


@dataclass(frozen=True)
class Drawn:
    """Rows with a split each. `alike`: how many pictures share a group with one that only looks like them."""

    samples: tuple[Sample, ...]
    alike: int


def with_splits(samples: Sequence[Sample], prints: Mapping[str, Fingerprint], val_share: float, seed: int) -> Drawn:
    """Every row with a split: the one it has, that of its group, or one drawn by group within each source.

    A group is all pictures of one case, all rows of one picture, and, of the pictures in `prints` (by file name), those
    that look like one another (`coreseg.data.lookalikes`); what joins two groups makes them one. A share val_share of
    each source's cases (lone pictures where the case is unknown) goes to val, in whole groups, at least one of several
    where the share is above 0, the same for the same seed.
    Splits that rows already have are kept, even where they part a group.

    Our choice.
    """
    names = list(dict.fromkeys(sample.file_name for sample in samples))
    number = {name: index for index, name in enumerate(names)}
    # The cases stand behind the pictures, as nodes that join theirs.
    cases = {case: len(names) + index for index, case in enumerate(dict.fromkeys(s.case for s in samples if s.case))}
    by_case = [(number[sample.file_name], cases[sample.case]) for sample in samples if sample.case]
    alike = _alike(samples, prints, number)
    group_of = _groups([*by_case, *alike], len(names) + len(cases))
    without_likeness = _groups(by_case, len(names) + len(cases))
    split_of = _split_groups(samples, [int(group_of[number[sample.file_name]]) for sample in samples], val_share, seed)
    return Drawn(
        samples=tuple(
            replace(sample, split=sample.split or split_of[int(group_of[number[sample.file_name]])])
            for sample in samples
        ),
        alike=len({node for pair in alike if len(set(without_likeness[list(pair)])) > 1 for node in pair}),
    )


def _alike(
    samples: Sequence[Sample], prints: Mapping[str, Fingerprint], number: Mapping[str, int]
) -> list[tuple[int, int]]:
    # Only a picture without a split can still be put beside its like.
    undecided = list(dict.fromkeys(s.file_name for s in samples if not s.split and s.file_name in prints))
    everyone = list(prints)
    matches = find_matches([prints[name] for name in undecided], [prints[name] for name in everyone])
    pairs = ((number[undecided[match.first]], number[everyone[match.second]]) for match in matches)
    return [(one, other) for one, other in pairs if one != other]


def _groups(edges: Sequence[tuple[int, int]], nodes: int) -> Int[np.ndarray, " nodes"]:
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2)
    graph = sparse.coo_array((np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])), shape=(nodes, nodes))
    return np.asarray(csgraph.connected_components(graph, directed=False)[1], dtype=np.int64)


def _split_groups(samples: Sequence[Sample], groups: Sequence[int], val_share: float, seed: int) -> dict[int, str]:
    split_of: dict[int, str] = {}
    for sample, group in zip(samples, groups, strict=True):
        if sample.split:
            split_of.setdefault(group, sample.split)
    # Of each source's groups, in order: the cases, or lone pictures, that they hold.
    undecided: dict[str, dict[int, set[str]]] = {}
    source_of: dict[int, str] = {}
    for sample, group in zip(samples, groups, strict=True):
        if group not in split_of:
            source = source_of.setdefault(group, sample.source)
            undecided.setdefault(source, {}).setdefault(group, set()).add(sample.case or sample.file_name)
    for source, held in undecided.items():
        rng = np.random.default_rng([seed, zlib.crc32(source.encode())])
        drawn = [list(held)[index] for index in rng.permutation(len(held))]
        val = _fitting(drawn, {group: len(cases) for group, cases in held.items()}, val_share)
        split_of.update({group: "val" if group in val else "train" for group in held})
    return split_of


def _fitting(drawn: Sequence[int], sizes: Mapping[int, int], share: float) -> set[int]:
    """The first groups that fit into a share of all cases, so that one large group does not fill val; at least one."""
    if share == 0 or len(drawn) == 1:
        return set()
    room = max(1, round(share * sum(sizes.values())))
    chosen: set[int] = set()
    for group in drawn:
        if sizes[group] <= room:
            chosen.add(group)
            room -= sizes[group]
    return chosen or {min(drawn, key=lambda group: sizes[group])}
