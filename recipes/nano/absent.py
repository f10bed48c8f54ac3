"""Questions about lesions that are not there, as a data set: `coreseg evaluate` scores them by its specificity.

python recipes/nano/absent.py DATASET --out DIR [--far] [--seed 0]

Near, the default: a validation picture is asked for another lesion of the same modality and anatomy that its set was
not made to show (`NEAR`), as good as known to be absent. Far: for a lesion of an anatomy drawn at random, not its own.
Lesion-free pictures are left out: they stand in DATASET itself.
"""

import argparse
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np

from coreseg.data.build.describe import describe
from coreseg.data.store import LesionSet, new_set, share_file, write_set
from coreseg.imaging import write_mask
from coreseg.questions import ask

QUESTIONS = tomllib.loads((Path(__file__).parent / "questions.toml").read_text(encoding="utf-8"))
"""How the stages of nano ask."""
NEAR: dict[str, str] = {one: other for one, (other,) in QUESTIONS["known_absent"].items()}
"""Not the two lesions of the eye: who has one often has the other, and most sets mark only one."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--far", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lesions, rng = LesionSet.open(options.dataset), np.random.default_rng(options.seed)
    rows = [sample for sample in lesions.split("val") if sample.boxes]
    anatomy_of = {(sample.anatomy, sample.category) for sample in lesions.samples}
    written = []
    with new_set(options.out) as root:
        (root / "masks").mkdir(exist_ok=True)
        for sample in {sample.file_name: sample for sample in rows}.values():
            elsewhere = sorted({name for anatomy, name in anatomy_of if anatomy != sample.anatomy})
            category = str(rng.choice(elsewhere)) if options.far else NEAR.get(sample.category)
            if category is None:
                continue
            image = lesions.image(sample)
            mask = np.zeros(image.shape[:2], dtype=bool)
            name = f"masks/{Path(sample.file_name).stem}_{category.replace(' ', '-')}.png"
            write_mask(root / name, mask)
            share_file(lesions.root / sample.file_name, root / sample.file_name)
            text = describe(image, mask, sample.modality, sample.anatomy, category, int(rng.integers(2**32)))
            absent = replace(sample, mask_file_name=name, category=category, boxes=(), query=ask(category, rng))
            written.append(replace(absent, reasoning=text))
        write_set(root, written)
    print(f"{options.out}: {len(written)} rows")
