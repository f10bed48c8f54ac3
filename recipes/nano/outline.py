"""Stage (e): the segmenter goes on, and what asks it now is also what the finished reasoner says.

    python recipes/nano/outline.py MODEL DATASET… --out DIR --minutes M
    torchrun --nproc-per-node 2 recipes/nano/outline.py …              (two processes: their minutes count together)

Stage (a) ends as soon as the reasoner has features to look at, before outlines are as good as they can be. Here image
encoder and mask decoder train on as there, on the same changed parts of pictures, at half of its learning rates. Beside
the "any lesion" prompt and a box or a point, each picture is asked for one of its categories by the model itself: the
adapter's prompt after the reference answer to a question in some wording, found once from the unchanged picture.
Reasoner and adapter are frozen, and the reasoner looks through a segmenter of its own, so what the model says stays,
word for word. Finding these prompts takes 4 to 10 minutes, which the budget does not count.

Its gain is not measured yet, so `recipes/nano/run` goes without.

Writes the whole model to DIR. A run that was stopped goes on from its last checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from segmenter import (
    BATCH,
    SOURCE_PX,
    add_budget,
    draw_weights,
    outline_loss,
    parameter_groups,
    seen_anew,
    spatial_prompt,
    squared,
)
from torch import distributed
from tqdm import tqdm
from transformers import EdgeTamModel

from coreseg.config import SftConfig, load
from coreseg.model.assemble import load_parts
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import CoreSegProcessor
from coreseg.sam2 import any_lesion_prompt
from coreseg.train.collate import Examples, stretch_mask
from coreseg.train.loop import Budget, join_group, spend

WORDINGS = 2
"""Questions a row, each with a prompt."""
LEARNING_SHARE = 0.5
QUESTIONS = Path(__file__).parent / "sft.toml"


def pictures_of(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's picture in a square, (rows, 3, side, side) 8 bit, and its masks, (rows, 2, side, side).

    The first mask is that of all lesions of the picture, the second that of the row's own category.
    """
    places = [(lesions.root, sample.file_name) for lesions, sample in examples.rows]
    own = [lesions.mask(sample) for lesions, sample in examples.rows]
    every: dict[tuple[Path, str], np.ndarray] = {}
    for place, mask in zip(places, own, strict=True):
        every[place] = every.get(place, False) | mask
    masks = [
        torch.stack([stretch_mask(shown, SOURCE_PX) for shown in (every[place], mask)])
        for place, mask in zip(places, own, strict=True)
    ]
    images = [squared(*row, SOURCE_PX) for row in tqdm(examples.rows, desc="reading train")]
    return torch.cat(images), torch.stack(masks)


@torch.no_grad()
def said_prompts(model: CoreSeg, processor: CoreSegProcessor, examples: Examples) -> torch.Tensor:
    """What the adapter says of every row, as (rows, wordings, tokens, channels); several processes share the rows.

    "Any lesion" where the answer is that there is none: whoever draws such a mask has not listened.
    """
    rows, tower = len(examples), model.reasoner.model.vision_tower
    shared = distributed.is_initialized()
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
    unsaid = any_lesion_prompt(model.segmenter, rows * WORDINGS)[:, 0]
    prompts = torch.zeros_like(unsaid)
    for start in tqdm(range(rank * BATCH, rows * WORDINGS, ranks * BATCH), desc="asking", disable=rank > 0):
        asked = [examples[divmod(each, WORDINGS)] for each in range(start, min(start + BATCH, len(prompts)))]
        batch = processor([e.image for e in asked], [e.question for e in asked], [e.answer for e in asked])
        once = tower.look(batch.reasoner_inputs["pixel_values"][::WORDINGS])
        seen = {"pixel_values": once.repeat_interleave(WORDINGS, 0)}
        states, present = model.probe_states(batch.input_ids, batch.attention_mask, seen)
        found, said = present.any(1), unsaid[start : start + len(asked)].clone()
        if found.any():
            said[found] = model.adapter(states[found], present[found])
        prompts[start : start + len(asked)] = said
    if shared:
        distributed.all_reduce(prompts)
    return prompts.unflatten(0, (rows, WORDINGS))


def train(name: str, data: Sequence[Path], out: Path, budget: Budget, seed: int) -> None:
    """Spend the budget, and leave the whole model in `out`."""
    rank = join_group()
    torch.manual_seed(seed)
    plain = {"remeasure": "false", "keep_maps": "false", "attribute_share": "0.0", "absent_share": "0.0", "seed": seed}
    plain["data"] = [str(path) for path in data]
    examples = Examples.open(load(SftConfig, QUESTIONS, [f"{key}={value}" for key, value in plain.items()]), "train")
    images, masks = pictures_of(examples)
    weights = draw_weights([sample.source for _, sample in examples.rows])
    model, processor = load_parts(name)
    said = said_prompts(model.eval(), processor, examples)
    segmenter: EdgeTamModel = model.segmenter.to(memory_format=torch.channels_last)
    segmenter.requires_grad_(True)

    def loss_of(segmenter: EdgeTamModel, step: int) -> torch.Tensor:
        rng = np.random.default_rng((seed, step, rank))
        rows = rng.choice(len(images), BATCH, p=weights)
        batch_images, batch_masks = seen_anew(images[rows], masks[rows], rng)
        spatial, wanted = spatial_prompt(segmenter, batch_masks[:, :1], rng)
        asked = said[torch.from_numpy(rows), torch.from_numpy(rng.integers(WORDINGS, size=BATCH))][:, None]
        prompts = torch.cat([any_lesion_prompt(segmenter, BATCH), asked, spatial], dim=1)
        return outline_loss(segmenter, batch_images, prompts, torch.cat([batch_masks, wanted], dim=1))

    averaged, _ = spend(
        budget, segmenter, parameter_groups(segmenter, LEARNING_SHARE), loss_of, out, description="outline"
    )
    if rank == 0:
        segmenter.load_state_dict(averaged.state_dict())
        model.save_pretrained(out)
        processor.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a CORE-Seg checkpoint")
    parser.add_argument("datasets", type=Path, nargs="+")
    add_budget(parser)
    options = parser.parse_args()
    train(options.model, options.datasets, options.out, Budget(options.steps, options.minutes), options.seed)
