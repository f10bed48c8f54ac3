"""A U-Net on nano's own pretrained backbone, one output channel a category: what needs no language.

    PYTHONPATH=recipes/nano python recipes/baselines/unet.py DATASET… --out RUN [--minutes M]

A row trains the channel of its own category alone, since nobody marked the others.
"""

import torch
from build import IMAGE_SIZE_PX
from training import arguments, asked_for, train

from coreseg.data.store import LesionSet
from coreseg.train.baselines import build_unet

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE_PX, help="side of the square in px, a multiple of 32")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    sets = [LesionSet.open(path) for path in options.datasets]
    train(*build_unet(asked_for(sets), options.size), sets, options)
