"""Stage (a), last part: the mask decoder learns to be told *what*, on phantoms that show two kinds of lesion.

    python recipes/nano/kinds.py SEGMENTER_RUN DATASET… --out RUN --minutes M

Boxes and points hardly ever decide on real pictures, whose lesions are mostly of one kind, so a segmenter trained with
them alone gives the same mask whatever it is prompted with. Here one learned prompt a kind of phantom asks for that
kind alone; every picture asks for every lesion and, by a box or a point, for one of several, as before: no category of
a real set enters. What stays is a decoder that listens; the learned prompts, in `prompts.safetensors` by kind, are what
`copying.py` teaches the adapter to say. The image encoder is frozen.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from build import IMAGE_SIZE_PX
from safetensors.torch import save_file
from segmenter import add_budget, load, spatial_prompt, squared
from transformers import EdgeTamModel

from coreseg.data.store import LesionSet
from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image
from coreseg.train.collate import stretch_mask
from coreseg.train.loop import Budget, spend
from coreseg.train.losses import dice_ce

PAIRS_A_STEP = 4
PICTURES_A_STEP = 12
LEARNING_RATE = 5e-4
PROMPT_DEVIATION = 0.5


def two_kind_pictures(sets: list[LesionSet]) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Each training picture with two categories: (3, side, side) 8 bit, and their masks by category, sorted by name."""
    for lesions in sets:
        pictures: dict[str, list] = {}
        for sample in lesions.split("train"):
            if sample.source.startswith("phantom_") and sample.boxes:
                pictures.setdefault(sample.file_name, []).append(sample)
        for rows in pictures.values():
            if len(rows) == 2:
                rows.sort(key=lambda sample: sample.category)
                masks = {sample.category: stretch_mask(lesions.mask(sample), IMAGE_SIZE_PX) for sample in rows}
                yield squared(lesions, rows[0])[0], masks


def train(segmenter: Path, sets: list[LesionSet], out: Path, budget: Budget, seed: int) -> None:
    """Train the mask decoder on pairs and whole pictures, and leave the model in `out`."""
    torch.manual_seed(seed)
    model = EdgeTamModel.from_pretrained(segmenter).eval()
    model.requires_grad_(False)
    model.mask_decoder.requires_grad_(True)
    pictures, shown = zip(*two_kind_pictures(sets), strict=True)
    names = list(shown[0])  # every phantom of two kinds shows these
    pairs, kinds = torch.stack(pictures), torch.stack([torch.stack([masks[n] for n in names]) for masks in shown])
    images, masks, sources = load(sets, "train")
    counts = {name: sources.count(name) for name in set(sources)}
    weights = np.array([counts[name] ** -0.5 for name in sources])
    start = any_lesion_prompt(model, 1)[0].detach()
    model.learned = torch.nn.Parameter(start.repeat(2, 1, 1) + PROMPT_DEVIATION * torch.randn(2, *start.shape[1:]))

    def loss_of(model: EdgeTamModel, step: int) -> torch.Tensor:
        model.eval()
        rng = np.random.default_rng((seed, step))
        two = torch.from_numpy(rng.choice(len(pairs), PAIRS_A_STEP, replace=False))
        all_of = torch.from_numpy(rng.choice(len(images), PICTURES_A_STEP, p=weights / weights.sum()))
        pixels = (torch.cat([pairs[two], images[all_of]]).float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            maps = encode_image(model, pixels.contiguous(memory_format=torch.channels_last))
        asked = decode_masks(
            model, [level[:PAIRS_A_STEP] for level in maps], model.learned.expand(PAIRS_A_STEP, -1, -1, -1)
        )
        together = torch.cat([kinds[two].any(1), masks[all_of, 0]])[:, None].float()
        spatial, wanted = spatial_prompt(model, together, rng)
        every = torch.cat([any_lesion_prompt(model, len(together)), spatial.detach()], dim=1)
        apart_loss = dice_ce(asked.flatten(0, 1), kinds[two].flatten(0, 1).float())
        together_loss = dice_ce(
            decode_masks(model, maps, every).flatten(0, 1), torch.cat([together, wanted], dim=1).flatten(0, 1)
        )
        return apart_loss + 2 * together_loss

    groups = [{"params": [model.learned, *model.mask_decoder.parameters()], "lr": LEARNING_RATE}]
    averaged, _ = spend(budget, model, groups, loss_of, out, description="kinds")
    save_file(
        {name: averaged.learned[number].detach() for number, name in enumerate(names)}, out / "prompts.safetensors"
    )
    del averaged.learned
    averaged.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("segmenter", type=Path)
    parser.add_argument("datasets", type=Path, nargs="+")
    add_budget(parser)
    options = parser.parse_args()
    sets = [LesionSet.open(path) for path in options.datasets]
    train(options.segmenter, sets, options.out, Budget(options.steps, options.minutes), options.seed)
