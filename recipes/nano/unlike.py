"""Does a model know what it does not know? Its warnings on pictures and questions it should know, and on others.

python recipes/nano/unlike.py DATASET [PICTURE…] [--model nano] [--seed 0]

Asks about every validation row its own question, and one about a lesion of another anatomy; and "Where is the polyp?"
about each PICTURE, which should be of something else altogether. The answer is taken to be about what was asked, so
the language model does not run. Then the questions in people's own words: how many name no lesion that it knows.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from coreseg.data.store import LesionSet
from coreseg.imaging import read_image
from coreseg.questions import ask, names_any, read_own_words
from coreseg.sam2 import encode_image, texture
from coreseg.segmenter import Segmenter
from coreseg.types import Answer

OWN_WORDS = Path(__file__).parent / "own_words"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("pictures", type=Path, nargs="*")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    segmenter, lesions = Segmenter.from_pretrained(options.model), LesionSet.open(options.dataset)
    scope = segmenter.scope
    if scope is None:
        parser.error(f"{options.model} has no scope; write one with `coreseg merge --scope`")
    rng = np.random.default_rng(options.seed)

    @torch.no_grad()
    def seen(image: np.ndarray) -> torch.Tensor:
        pixels = segmenter.processor.segmenter_pixels(image).to(segmenter.model.device, segmenter.model.dtype)
        return texture(encode_image(segmenter.model.segmenter, pixels))[0].cpu()

    def told(look: torch.Tensor, question: str, category: str) -> tuple[str, ...]:
        return scope.warnings(look, question, Answer(category, (), "", found=False))

    categories = {name for kind in scope.kinds for name in kind.categories}
    own, other = Counter(), 0
    rows = lesions.split("val")
    for sample in tqdm(rows, desc="looking", unit="row"):
        look = seen(lesions.image(sample))
        own.update(
            [warning.split(",")[0].split("(")[0] for warning in told(look, sample.query, sample.category)] or [""]
        )
        here = {name for kind in scope.kinds if kind.anatomy == sample.anatomy for name in kind.categories}
        elsewhere = str(rng.choice(sorted(categories - here)))
        other += bool(told(look, ask(elsewhere, rng), elsewhere))
    print(f"its own question: {len(rows) - own.pop('')} of {len(rows)} rows warned of: {dict(own)}")
    print(f"a question about another anatomy: {other} of {len(rows)} rows warned of")
    if options.pictures:
        silent = [
            path.name for path in options.pictures if not told(seen(read_image(path)), "Where is the polyp?", "polyp")
        ]
        warned = len(options.pictures) - len(silent)
        print(
            f"other pictures: {warned} of {len(options.pictures)} warned of; not {', '.join(silent) or 'one without'}"
        )
    for half in ("shown", "held_back"):
        asked = [text for texts in read_own_words(OWN_WORDS / f"{half}.toml").values() for text in texts]
        unnamed = sum(not names_any(text, categories) for text in asked)
        print(f"own words, {half}: {unnamed} of {len(asked)} name no lesion that it knows")
