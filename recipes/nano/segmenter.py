"""Stage (a) of nano: a class-agnostic segmenter, prompted by boxes, points and one "any lesion" prompt.

    python recipes/nano/segmenter.py DATASET… --out RUN [--steps N]

It never learns a category, so that what the question adds later can be measured: a picture's lesions of all categories
are one mask. Batches are drawn with weight 1 / sqrt(set size), phantoms at half of that. The exponential moving average
of the weights is what is saved. A run that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from build import IMAGE_SIZE_PX, build_segmenter
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import EdgeTamModel

from coreseg.data.store import LesionSet
from coreseg.masks import lesion_masks, tight_box
from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image
from coreseg.train.augment import augment
from coreseg.train.collate import stretch_mask
from coreseg.train.losses import dice_ce
from coreseg.types import Sample

BATCH = 8
PHANTOM_WEIGHT = 0.5
LEARNING_RATE = 1e-3
BACKBONE_LEARNING_RATE = 3e-4
WARMUP_STEPS = 100
EMA_DECAY = 0.995
SAVE_EVERY = 200


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


def load(sets: list[LesionSet], split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Every picture of a split with all of its lesions, stretched to the segmenter's square, as 8-bit tensors, and its
    set."""
    pictures: dict[tuple[Path, str], list[tuple[LesionSet, Sample]]] = {}
    for lesions in sets:
        for sample in lesions.split(split):
            pictures.setdefault((lesions.root, sample.file_name), []).append((lesions, sample))
    images, masks, sources = [], [], []
    for rows in tqdm(pictures.values(), desc=f"reading {split}"):
        lesions, first = rows[0]
        images.append(squared(lesions, first))
        together = np.any([lesions.mask(sample) for _, sample in rows], axis=0)
        masks.append(stretch_mask(together, IMAGE_SIZE_PX)[None, None])
        sources.append(first.source)
    return torch.cat(images), torch.cat(masks), sources


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


@torch.no_grad()
def validate(model: EdgeTamModel, images: torch.Tensor, masks: torch.Tensor, sources: list[str]) -> dict[str, float]:
    """Dice of the "any lesion" prompt at the segmenter's own size, over samples with a lesion."""
    dices = []
    for start in range(0, len(images), 32):
        pixels = (images[start : start + 32].float() / 255 - 0.5) / 0.5
        maps = encode_image(model, pixels.contiguous(memory_format=torch.channels_last))
        logits = decode_masks(model, maps, any_lesion_prompt(model, len(pixels)))
        predicted = functional.interpolate(logits, scale_factor=4, mode="bilinear")[:, 0] > 0
        reference = masks[start : start + 32, 0]
        overlap = (predicted & reference).sum((1, 2))
        dices.append(2 * overlap / (predicted.sum((1, 2)) + reference.sum((1, 2))).clamp(min=1))
    dice, names = torch.cat(dices).numpy(), np.array(sources)
    lesion = masks.flatten(1).any(1).numpy()
    sets = [dice[(names == name) & lesion].mean() for name in sorted(set(names[lesion]))]
    return {"pooled": 100 * float(dice[lesion].mean()), "macro": 100 * float(np.mean(sets))}


def freeze_statistics(model: torch.nn.Module) -> None:
    """Training mode with ImageNet's batch statistics kept: batches of 8 are too small to estimate them."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def train(sets: list[LesionSet], out: Path, steps: int, seed: int, validate_every: int) -> None:
    """Train, log to `out/log.jsonl`, and leave the averaged model in `out` for `EdgeTamModel.from_pretrained`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    images, masks, sources = load(sets, "train")
    validation = load(sets[:1], "val")
    weights = draw_weights(sources)
    model = build_segmenter().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    backbone = list(model.vision_encoder.backbone.parameters())
    others = [p for name, p in model.named_parameters() if ".backbone." not in name]
    optimizer = torch.optim.AdamW(
        [{"params": backbone, "lr": BACKBONE_LEARNING_RATE}, {"params": others, "lr": LEARNING_RATE}], weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))
    )
    done, checkpoint = 0, out / "resume.pt"
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    started = time.time()
    bar = tqdm(range(done, steps), initial=done, total=steps, desc="segmenter")
    for step in bar:
        # Seeded by the step, so that a resumed run draws what an uninterrupted one would have drawn.
        rng, generator = np.random.default_rng((seed, step)), torch.Generator().manual_seed(seed + step)
        rows = torch.from_numpy(rng.choice(len(images), BATCH, p=weights))
        batch_images, batch_masks = augment(images[rows].float() / 255, masks[rows].float(), generator)
        freeze_statistics(model)
        pixels = ((batch_images - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
        spatial, wanted = spatial_prompt(model, batch_masks, rng)
        prompts = torch.cat([any_lesion_prompt(model, BATCH), spatial], dim=1)
        logits = decode_masks(model, encode_image(model, pixels), prompts)
        loss = dice_ce(logits.flatten(0, 1), torch.cat([batch_masks, wanted], dim=1).flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint)
        if (step + 1) % validate_every == 0 or step + 1 == steps:
            figures = validate(average.module.eval(), *validation)
            line = {"step": step + 1, "seconds": round(time.time() - started), "loss": loss.item(), **figures}
            (out / "log.jsonl").open("a").write(json.dumps(line) + "\n")
            bar.write(json.dumps(line))
    average.module.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+", help="validated on the first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=500)
    options = parser.parse_args()
    sets = [LesionSet.open(path) for path in options.datasets]
    train(sets, options.out, options.steps, options.seed, options.validate_every)
