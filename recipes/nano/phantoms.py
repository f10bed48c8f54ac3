"""Phantoms that nano trains on beside the real images: two kinds in one picture teach it to listen to the question.

python recipes/nano/phantoms.py --out DIR
"""

import argparse
from pathlib import Path

from coreseg.testing import write_phantom_set

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1200)
    options = parser.parse_args()
    write_phantom_set(options.out, options.count, seed=0, size_wh=(256, 224), two_kinds=0.8)
