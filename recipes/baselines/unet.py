"""A U-Net on nano's own pretrained backbone, one output channel a category: what needs no language.

    PYTHONPATH=recipes/nano python recipes/baselines/unet.py DATASET… --out RUN [--cpu-minutes M]

A row trains the channel of its own category alone, since nobody marked the others.
"""

import torch
from build import ARCHITECTURE, IMAGE_SIZE_PX, load_imagenet
from segmenter import BACKBONE_LEARNING_RATE, LEARNING_RATE
from training import arguments, categories_of, train

from coreseg.data.store import LesionSet
from coreseg.evaluate.trained import UNetBaseline

if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    torch.manual_seed(options.seed)
    sets = [LesionSet.open(path) for path in options.datasets]
    half = [0.5, 0.5, 0.5]  # mean and deviation of the pixels that the backbone was trained on
    model = UNetBaseline(
        {
            "categories": categories_of(sets),
            "size_px": IMAGE_SIZE_PX,
            "mean": half,
            "std": half,
            "encoder": ARCHITECTURE,
        }
    )
    load_imagenet(model.unet.encoder.model)
    model.to(memory_format=torch.channels_last)
    fresh = [*model.unet.decoder.parameters(), *model.unet.segmentation_head.parameters()]
    groups = [
        {"params": list(model.unet.encoder.parameters()), "lr": BACKBONE_LEARNING_RATE},
        {"params": fresh, "lr": LEARNING_RATE},
    ]
    train(model, groups, sets, options)
