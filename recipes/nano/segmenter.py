"""Stage (a) of nano: a class-agnostic segmenter, prompted by boxes, points and one "any lesion" prompt.

    python recipes/nano/segmenter.py DATASET… --out RUN --minutes M
    torchrun --nproc-per-node 2 recipes/nano/segmenter.py …             (two processes: their minutes count together)

It never learns a category, so that what the question adds later can be measured: a picture's lesions of all categories
are one mask. Batches are drawn with weight 1 / sqrt(set size), phantoms at half of that. Some pictures are drawn as a
part around a lesion, enlarged, as a second look (`coreseg.model.looks`) sees them. The moving average of the
weights is what is saved. A run that was stopped goes on from its last checkpoint.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build import IMAGE_SIZE_PX, build_segmenter
from torch.nn import functional
from tqdm import tqdm
from transformers import EdgeTamModel

from coreseg.data.store import LesionSet
from coreseg.masks import lesion_masks, tight_box
from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image
from coreseg.train.augment import augment
from coreseg.train.collate import stretch_mask
from coreseg.train.loop import Budget, join_group, spend
from coreseg.train.losses import dice_ce
from coreseg.types import Sample

BATCH = 16  # of a process; on one thread a picture takes a fifth less than in batches of 8
SOURCE_PX = 384
"""Side of the squares that pictures are kept at: enlarged parts show more than the segmenter's square has."""
PHANTOM_WEIGHT = 0.5
ENLARGED_SHARE = 0.3
LEARNING_RATE = 1e-3
BACKBONE_LEARNING_RATE = 3e-4


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The options that the scripts of nano's own trainings share."""
    parser.add_argument("--out", type=Path, required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, default=math.inf, help="of processor time; nano's: recipes/nano/run")
    budget.add_argument("--steps", type=int, default=math.inf, help="in place of minutes")
    parser.add_argument("--seed", type=int, default=0)


def squared(lesions: LesionSet, sample: Sample, side_px: int = IMAGE_SIZE_PX) -> torch.Tensor:
    """A row's picture stretched to the segmenter's square, (1, 3, side, side), 8 bit."""
    image = torch.from_numpy(lesions.image(sample)).permute(2, 0, 1)[None].float()
    return functional.interpolate(image, (side_px, side_px), mode="bilinear", antialias=True).round().byte()


def draw_weights(sources: list[str]) -> np.ndarray:
    """How likely each picture is drawn, by the name of its set; they sum to 1."""
    counts = {name: sources.count(name) for name in set(sources)}
    weights = np.array(
        [counts[name] ** -0.5 * (PHANTOM_WEIGHT if name.startswith("phantom_") else 1.0) for name in sources]
    )
    return weights / weights.sum()


def load(
    sets: list[LesionSet], split: str, side_px: int = IMAGE_SIZE_PX
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Every picture of a split with all of its lesions, stretched to a square, as 8-bit tensors, and its set."""
    pictures: dict[tuple[Path, str], list[tuple[LesionSet, Sample]]] = {}
    for lesions in sets:
        for sample in lesions.split(split):
            pictures.setdefault((lesions.root, sample.file_name), []).append((lesions, sample))
    images, masks, sources = [], [], []
    for rows in tqdm(pictures.values(), desc=f"reading {split}"):
        lesions, first = rows[0]
        images.append(squared(lesions, first, side_px))
        together = np.any([lesions.mask(sample) for _, sample in rows], axis=0)
        masks.append(stretch_mask(together, side_px)[None, None])
        sources.append(first.source)
    return torch.cat(images), torch.cat(masks), sources


def window(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int]:
    """The part of a square picture that is drawn: left, top and side in px. The whole, or some part around a lesion."""
    side = len(mask)
    if rng.random() > ENLARGED_SHARE:
        return 0, 0, side
    lesions = lesion_masks(mask)
    if len(lesions) and rng.random() < 0.5:
        mask = lesions[int(rng.integers(len(lesions)))]
    box = np.array(tight_box(mask) if mask.any() else rng.integers(side, size=2).repeat(2)).reshape(2, 2)
    part = int(side * np.clip((box[1] - box[0]).max() / side * rng.uniform(1.2, 2.5), 0.2, 1.0))
    corner = np.clip(box.mean(0) - part * rng.uniform(0.3, 0.7, 2), 0, side - part).astype(int)
    return int(corner[0]), int(corner[1]), part


def spatial_prompt(
    model: EdgeTamModel, masks: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A jittered box or a point, as (batch, 1, 3, channels), and the mask it asks for, (batch, 1, side, side).

    A box means one of several lesions, seldom all of them; a point always means one. So the decoder learns to
    be told where. An empty mask gets the "any lesion" prompt again, since there is nothing to point at.
    """
    boxes = torch.zeros(len(masks), 1, 4)
    points = torch.zeros(len(masks), 1, 2, 2)
    labels = torch.full((len(masks), 1, 2), -1)
    use_box = np.zeros(len(masks), dtype=bool)
    wanted = masks.clone()
    for row, mask in enumerate(masks[:, 0].bool().numpy()):
        lesions = lesion_masks(mask)
        if not len(lesions):
            continue
        use_box[row] = rng.random() < 0.7
        if not use_box[row] or rng.random() < 0.7:
            mask = lesions[int(rng.integers(len(lesions)))]
            wanted[row, 0] = torch.from_numpy(mask)
        if use_box[row]:
            corners = torch.tensor(tight_box(mask)).float()
            size = (corners[2:] - corners[:2]).repeat(2)
            boxes[row, 0] = (corners + size * torch.from_numpy(rng.uniform(-0.1, 0.1, 4))).clamp(0, IMAGE_SIZE_PX)
        else:
            ys, xs = np.nonzero(mask)
            pick = int(rng.integers(len(xs)))
            points[row, 0, 0] = torch.tensor([xs[pick], ys[pick]]).float()
            labels[row, 0, 0] = 1
    encoder = model.prompt_encoder
    as_boxes, _ = encoder(input_points=None, input_labels=None, input_boxes=boxes, input_masks=None)
    as_points, _ = encoder(input_points=points, input_labels=labels, input_boxes=None, input_masks=None)
    return torch.where(torch.from_numpy(use_box)[:, None, None, None], as_boxes, as_points), wanted


def parameter_groups(model: EdgeTamModel) -> list[dict[str, Any]]:
    """What trains, with its learning rate: slower in the backbone."""
    backbone, others = [], []
    for name, parameter in model.named_parameters():
        (backbone if ".backbone." in name else others).append(parameter)
    return [{"params": backbone, "lr": BACKBONE_LEARNING_RATE}, {"params": others, "lr": LEARNING_RATE}]


def freeze_statistics(model: torch.nn.Module) -> None:
    """Training mode with ImageNet's batch statistics kept: batches of 8 are too small to estimate them."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def seen_anew(images: torch.Tensor, masks: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of each picture, (batch, 3, side, side) 8 bit, and of its (batch, masks, side, side), changed at random.

    Both come back at `IMAGE_SIZE_PX`, pictures in [0, 1]. The first mask is that of all lesions: parts lie around one.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    drawn_images, drawn_masks = [], []
    for image, shown in zip(images, masks, strict=True):
        x, y, side = window(shown[0].numpy(), rng)
        part, size = np.s_[:, :, y : y + side, x : x + side], (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
        drawn_images.append(functional.interpolate(image[None][part].float(), size, mode="bilinear", antialias=True))
        drawn_masks.append(functional.interpolate(shown[None][part].float(), size, mode="nearest-exact"))
    return augment(torch.cat(drawn_images) / 255, torch.cat(drawn_masks), generator)


def outline_loss(
    model: EdgeTamModel, images: torch.Tensor, prompts: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Mask loss of (batch, prompts, tokens, channels) on pictures in [0, 1]; `wanted`: (batch, prompts, side, side)."""
    freeze_statistics(model)
    pixels = ((images - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
    logits = decode_masks(model, encode_image(model, pixels), prompts)
    return dice_ce(logits.flatten(0, 1), wanted.flatten(0, 1))


def train(sets: list[LesionSet], out: Path, budget: Budget, seed: int) -> None:
    """Spend the budget, and leave the averaged model in `out` for `EdgeTamModel.from_pretrained`."""
    rank = join_group()
    torch.manual_seed(seed)
    images, masks, sources = load(sets, "train", SOURCE_PX)
    weights = draw_weights(sources)
    model = build_segmenter().to(memory_format=torch.channels_last)

    def loss_of(model: EdgeTamModel, step: int) -> torch.Tensor:
        rng = np.random.default_rng((seed, step, rank))
        rows = rng.choice(len(images), BATCH, p=weights)
        batch_images, batch_masks = seen_anew(images[rows], masks[rows], rng)
        spatial, wanted = spatial_prompt(model, batch_masks, rng)
        prompts = torch.cat([any_lesion_prompt(model, BATCH), spatial], dim=1)
        return outline_loss(model, batch_images, prompts, torch.cat([batch_masks, wanted], dim=1))

    averaged, _ = spend(budget, model, parameter_groups(model), loss_of, out, description="segmenter")
    if rank == 0:
        averaged.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    add_budget(parser)
    options = parser.parse_args()
    sets = [LesionSet.open(path) for path in options.datasets]
    train(sets, options.out, Budget(options.steps, options.minutes), options.seed)
