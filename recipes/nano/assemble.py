"""Stage (b), first half: tokenizer, reasoner and trained segmenter joined into nano, untrained in language.

    python recipes/nano/assemble.py SEGMENTER_RUN KINDS_RUN DATASET… --out DIR

The reasoner looks through the first segmenter; the second, whose decoder has learned kinds, makes the masks. The
tokenizer learns from the data sets' own reasoning, from every question template, and from questions in people's words.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from reasoner import build_processor, build_reasoner, train_tokenizer, trainable
from transformers import EdgeTamModel

from coreseg.answer import INSTRUCTION
from coreseg.data.store import LesionSet
from coreseg.model.assemble import join
from coreseg.questions import ATTRIBUTES, ask, ask_for_one, read_own_words

QUESTIONS_PER_CATEGORY = 400
QUESTIONS_PER_KIND = 20
OWN_WORDS = Path(__file__).parent / "own_words" / "shown.toml"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("segmenter", type=Path)
    parser.add_argument("kinds", type=Path)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    samples = [s for path in options.datasets for s in LesionSet.open(path).split("train")]
    categories = sorted({sample.category for sample in samples})
    questions = [ask(c, rng) for c in categories for _ in range(QUESTIONS_PER_CATEGORY)]
    questions += [
        ask_for_one(kind, c, rng) for c in categories for kind in ATTRIBUTES for _ in range(QUESTIONS_PER_KIND)
    ]
    questions += [text for texts in read_own_words(OWN_WORDS).values() for text in texts] * 20
    questions = [f"{question} {INSTRUCTION}" for question in questions]
    located = [f" {c} is located at [[ are located at [[ is visible. The mask is" for c in categories] * 10
    texts = [f" {sample.reasoning}" for sample in samples] + questions + located
    tokenizer = train_tokenizer(texts)
    reasoner = build_reasoner(EdgeTamModel.from_pretrained(options.segmenter), tokenizer)
    segmenter = EdgeTamModel.from_pretrained(options.kinds)
    model, processor = join(
        reasoner,
        build_processor(tokenizer, reasoner.config.vision_config),
        segmenter,
        segmenter_mean=(0.5, 0.5, 0.5),
        segmenter_std=(0.5, 0.5, 0.5),
        reasoning_budget=100,
        looks_px={"": [256, 320], "retinal exudate": [448, 512]},
        second_look=True,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"{trainable(model):,} parameters, {len(tokenizer):,} tokens")
