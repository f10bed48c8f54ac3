"""A U-Net on nano's own pretrained backbone, one output channel a category: what needs no language.

    PYTHONPATH=recipes/nano python recipes/baselines/unet.py DATASET… --out RUN [--minutes M] [--start RUN]

A row trains the channel of its own category alone, since nobody marked the others.
"""

from pathlib import Path

import torch
from build import IMAGE_SIZE_PX
from training import arguments, asked_for, train

from coreseg.data.store import LesionSet
from coreseg.evaluate.trained import open_baseline
from coreseg.train.baselines import build_unet

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE_PX, help="side of the square in px, a multiple of 32")
    parser.add_argument("--start", type=Path, help="an earlier run of the same categories to go on from, of any size")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    sets = [LesionSet.open(path) for path in options.datasets]
    model, groups = build_unet(asked_for(sets), options.size)
    if options.start:
        start = open_baseline(options.start)
        if start.categories != model.categories:
            parser.error(f"{options.start} knows {start.categories}; expected {model.categories}, those of the data")
        model.load_state_dict(start.state_dict())
        options.start = start.settings["weights"]
    train(model, groups, sets, options)
