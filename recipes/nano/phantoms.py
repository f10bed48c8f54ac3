"""Phantoms that nano trains on beside the real images: two kinds in one picture teach it to listen to the question.

python recipes/nano/phantoms.py --out DIR             for training: 1,200 pictures
python recipes/nano/phantoms.py --out DIR --held-out  for the test: 100 pictures in looks that training never has, each
                                                      with one lesion of either kind, all of them in split val
"""

import argparse
from pathlib import Path

from coreseg.testing import HELD_OUT_LOOKS, write_phantom_set

SIZE_WH = (256, 224)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", action="store_true")
    options = parser.parse_args()
    if options.held_out:
        write_phantom_set(
            options.out, 100, seed=1, size_wh=SIZE_WH, looks=HELD_OUT_LOOKS, negatives=0.0, two_kinds=1.0,
            val_share=1.0, lesions=1,
        )  # fmt: skip
    else:
        write_phantom_set(options.out, 1200, seed=0, size_wh=SIZE_WH, two_kinds=0.8)
