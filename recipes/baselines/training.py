"""What the trained baselines share: rows, draws, augmentation, loss, average and a budget of processor time.

All as in `recipes/nano/segmenter.py`, but for two things. A step sees rows, each with its own category's mask. And the
budget is what this process spends on a processor, user and system time together, so that runs on a busy machine stay
comparable: the learning rate falls along the share of it that is spent. Reading the pictures is not charged.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from segmenter import BATCH, EMA_DECAY, draw_weights, squared
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from coreseg.data.store import LesionSet
from coreseg.evaluate.trained import TrainedBaseline
from coreseg.train.augment import augment
from coreseg.train.collate import stretch_mask
from coreseg.train.losses import dice_ce
from coreseg.train.trainer import Clock

WARMUP_SHARE = 0.05
SAVE_EVERY = 100


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu-minutes", type=float, default=40.0, help="user and system time of the training steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def categories_of(sets: list[LesionSet]) -> list[str]:
    """What the training rows ask for, in alphabetical order."""
    return sorted({sample.category for lesions in sets for sample in lesions.split("train")})


def load_rows(
    sets: list[LesionSet], model: TrainedBaseline
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Every training row: pictures and masks stretched to the model's square, 8 bit, category numbers, sets."""
    rows = [(lesions, sample) for lesions in sets for sample in lesions.split("train")]
    side_px = model.size_px
    images = torch.empty(len(rows), 3, side_px, side_px, dtype=torch.uint8)
    masks = torch.empty(len(rows), 1, side_px, side_px, dtype=torch.bool)
    for number, (lesions, sample) in enumerate(tqdm(rows, desc="reading train")):
        images[number] = squared(lesions, sample, side_px)[0]
        masks[number, 0] = stretch_mask(lesions.mask(sample), side_px)
    numbers = torch.tensor([model.categories.index(sample.category) for _, sample in rows])
    return images, masks, numbers, [sample.source for _, sample in rows]


def average(averaged: list, current: list, count: torch.Tensor) -> None:
    """The moving average of the weights, over fewer steps in the beginning so that the untrained start is forgotten."""
    get_ema_multi_avg_fn(min(EMA_DECAY, (1 + float(count)) / (10 + float(count))))(averaged, current, count)


def train(model: TrainedBaseline, groups: list[dict], sets: list[LesionSet], options: argparse.Namespace) -> None:
    """Spend the budget on `groups` of parameters, each with its "lr", and leave the averaged model in `options.out`.

    Training goes on from the last checkpoint there, whose spent time counts.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    images, masks, numbers, sources = load_rows(sets, model)
    weights = draw_weights(sources)
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    averaged = AveragedModel(model, multi_avg_fn=average)
    parts = {"model": model, "average": averaged, "optimizer": optimizer}
    step, clock, checkpoint = 0, Clock(), options.out / "resume.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step, clock.minutes = state["step"], state["cpu_minutes"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model.train()
    bar = tqdm(desc=model.name, initial=step, unit="step")
    minutes = clock.minutes
    while minutes < options.cpu_minutes:
        share = minutes / options.cpu_minutes
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (share + 1e-3) / WARMUP_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
        # Seeded by the step, so that a resumed run draws what an uninterrupted one would have drawn.
        rng, generator = np.random.default_rng((options.seed, step)), torch.Generator().manual_seed(options.seed + step)
        rows = torch.from_numpy(rng.choice(len(images), BATCH, p=weights))
        batch_images, batch_masks = augment(images[rows].float() / 255, masks[rows].float(), generator)
        loss = dice_ce(model(batch_images, numbers[rows]), batch_masks[:, 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        step, minutes = step + 1, clock.minutes
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", cpu_minutes=f"{minutes:.1f}")
        if step % SAVE_EVERY == 0 or minutes >= options.cpu_minutes:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step, "cpu_minutes": minutes, **states}, checkpoint)
            with (options.out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "cpu_minutes": round(minutes, 2), "loss": loss.item()}) + "\n")
    asked = {name: value for name, value in vars(options).items() if name not in ("datasets", "out")}
    averaged.module.save(options.out, {"steps": step, "rows": len(images), **asked})
