"""A fold of a data set's training rows to choose settings on: the validation part is not looked at.

python recipes/nano/fold.py DATASET --out DIR [--fold K] [--folds N] [--at-least ROWS] [--small]

Cases stay together; a row whose case is unknown stays with its image. The fold's rows become the new set's `val`;
sources of fewer training rows than --at-least have none there. With --small the new set's `val` is all training rows of
these sources, and nothing else is in it: a model trained on the fold has seen them.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from zlib import crc32

from coreseg.data.store import LesionSet, copy_rows, new_set
from coreseg.types import Sample

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--at-least", type=int, default=0, metavar="ROWS")
    parser.add_argument("--small", action="store_true", help="the sources that have no fold, in val")
    options = parser.parse_args()
    lesions = LesionSet.open(options.dataset)
    rows = lesions.split("train")
    counts = Counter(sample.source for sample in rows)
    if options.small:
        rows = [sample for sample in rows if counts[sample.source] < options.at_least]

    def moved(sample: Sample) -> Sample:
        group = crc32((sample.case or sample.file_name).encode()) % options.folds
        held_out = group == options.fold and counts[sample.source] >= options.at_least
        return replace(sample, split="val" if held_out or options.small else "train")

    with new_set(options.out) as root:
        copy_rows(lesions, [moved(sample) for sample in rows], root)
