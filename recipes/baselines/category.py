"""A CORE-Seg's own segmenter with one learned prompt a category in place of reasoner and adapter: no language.

    PYTHONPATH=recipes/nano python recipes/baselines/category.py DATASET… --out RUN [--minutes M] [--model MODEL]

The image encoder is frozen, as it is in the whole model; with --no-train-decoder the mask decoder is too.
"""

import argparse

import torch
from kinds import PROMPT_DEVIATION
from segmenter import LEARNING_RATE
from training import arguments, asked_for, train

from coreseg.data.store import LesionSet
from coreseg.evaluate.predictors import model_digest
from coreseg.evaluate.trained import CategoryPrompt
from coreseg.model.assemble import EMBEDDED, load_parts

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--model", default=EMBEDDED, help="the CORE-Seg whose segmenter is prompted")
    parser.add_argument("--train-decoder", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    options.start = model_digest(options.model)
    torch.manual_seed(options.seed)
    sets = [LesionSet.open(path) for path in options.datasets]
    model = CategoryPrompt.of(load_parts(options.model)[0], asked_for(sets))
    # Three tokens that start alike would stay alike.
    model.prompts.data += PROMPT_DEVIATION * torch.randn_like(model.prompts)
    model.segmenter.requires_grad_(False)
    model.segmenter.mask_decoder.requires_grad_(options.train_decoder)
    model.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, [{"params": trained, "lr": LEARNING_RATE}], sets, options)
