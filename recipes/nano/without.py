"""A data set in two: one without some of its sources, and those sources alone, to see what carries over to them.

python recipes/nano/without.py DATASET SOURCE… --out DIR

DIR/lesions has every other row as it was; DIR/unseen has all rows of the sources, as `val`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from coreseg.data.store import LesionSet, copy_rows, new_set

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lesions = LesionSet.open(options.dataset)
    if unknown := set(options.sources) - {sample.source for sample in lesions.samples}:
        parser.error(f"{options.dataset} has no {', '.join(sorted(unknown))}")
    rows = {
        "lesions": [sample for sample in lesions.samples if sample.source not in options.sources],
        "unseen": [replace(sample, split="val") for sample in lesions.samples if sample.source in options.sources],
    }
    for name, samples in rows.items():
        options.out.mkdir(parents=True, exist_ok=True)
        with new_set(options.out / name) as root:
            copy_rows(lesions, samples, root)
        print(f"{options.out / name}: {len(samples)} rows")
