"""Baselines that were trained: each knows which category is asked for, and no other word of the question.

A folder holds one: `config.json` and `model.safetensors`. The recipes in `recipes/baselines` make them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForMaskGeneration

from coreseg.errors import MissingExtraError, ModelError
from coreseg.evaluate.predictors import answers_from_masks, weights_digest
from coreseg.evaluate.run import Images
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import stretch_image
from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image
from coreseg.types import Result, Sample


class TrainedBaseline(nn.Module):
    """A model from picture and category to a mask, and the `Predictor` around it.

    `config` is plain JSON: `categories`, `size_px` of the square it sees, `mean` and `std` of its pixels (three each),
    and what the kind of baseline adds. A question about some of the lesions gets them all.
    """

    name: ClassVar[str]
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = {"baseline": self.name, **config}
        self.settings: Mapping[str, Any] = {}
        self.categories: list[str] = config["categories"]
        self.size_px: int = config["size_px"]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Float[torch.Tensor, "batch 3 side side"], numbers: Int[torch.Tensor, " batch"]
    ) -> Float[torch.Tensor, "batch height width"]:
        """Mask logits of pictures in [0, 1], each asked for one of `categories` by its number, or -1 for another."""
        return self.mask_logits((images - self.mean) / self.std, numbers)

    def mask_logits(
        self, pixels: Float[torch.Tensor, "batch 3 side side"], numbers: Int[torch.Tensor, " batch"]
    ) -> Float[torch.Tensor, "batch height width"]:
        """`forward` on normalised pixels: what each kind of baseline has of its own."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """See `coreseg.evaluate.Predictor`; of the samples only the category is used, the questions not at all."""
        started = time.perf_counter()
        known = {category: number for number, category in enumerate(self.categories)}
        numbers = torch.tensor([known.get(sample.category, -1) for sample in samples], device=self.mean.device)
        squares = torch.cat([stretch_image(image, self.size_px) for image in images])
        return answers_from_masks(samples, images, self(squares.to(self.mean.device), numbers), started)

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        """Write the folder that `open_baseline` reads; `training`, plain JSON, says how long it trained and on what."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        text = json.dumps({**self.config, "training": training}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


class UNetBaseline(TrainedBaseline):
    """A U-Net with one output channel a category; one that training lacked gets the maximum over all channels.

    `config["encoder"]` is timm's name of its backbone, or None for MONAI's U-Net, which has none that is pretrained.
    Source: U-Net (arXiv 1505.04597) as in `segmentation_models_pytorch`, on a pretrained backbone whose batch
    statistics are kept, or as in MONAI with residual units. Our choice: the rest. Raises MissingExtraError where the
    package is not installed.
    """

    name = "unet"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        channels = len(self.categories)
        self.unet = _backbone_unet(config["encoder"], channels) if config["encoder"] else _monai_unet(channels)

    def train(self, mode: bool = True) -> "UNetBaseline":
        """As always, but the batch statistics of a pretrained encoder stay those of its pretraining."""
        super().train(mode)
        if self.config["encoder"]:
            self.unet.encoder.eval()
        return self

    def mask_logits(
        self, pixels: Float[torch.Tensor, "batch 3 side side"], numbers: Int[torch.Tensor, " batch"]
    ) -> Float[torch.Tensor, "batch side side"]:
        """The asked category's channel, at the size of the square."""
        channels = self.unet(pixels.contiguous(memory_format=torch.channels_last))
        asked = channels[torch.arange(len(numbers)), numbers]
        return torch.where((numbers < 0)[:, None, None], channels.amax(dim=1), asked)


def _backbone_unet(encoder: str, channels: int) -> Any:
    try:
        from segmentation_models_pytorch import Unet
    except ImportError as error:
        raise MissingExtraError(
            "the U-Net baseline needs segmentation-models-pytorch; in a clone: pip install '.[baselines]'"
        ) from error
    return Unet("tu-" + encoder, encoder_weights=None, classes=channels)


def _monai_unet(channels: int) -> Any:
    try:
        from monai.networks.nets.unet import UNet
    except ImportError as error:
        raise MissingExtraError("the plain U-Net needs monai; in a clone: pip install '.[build]'") from error
    return UNet(2, 3, channels, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


class CategoryPrompt(TrainedBaseline):
    """A CORE-Seg's segmenter with one learned prompt a category; another one gets its "any lesion" prompt.

    `config["segmenter"]` is the segmenter's configuration. The prompts have three tokens, as a box prompt has. What it
    lacks against the whole model is language. Our choice.
    """

    name = "category-embedding"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        parts = AutoConfig.for_model(**config["segmenter"])
        self.segmenter = AutoModelForMaskGeneration.from_config(parts)
        # It swaps masks in eval mode only, so that training and inference would disagree.
        self.segmenter.mask_decoder.dynamic_multimask_via_stability = False
        self.segmenter.vision_encoder.requires_grad_(False)
        self.prompts = nn.Parameter(torch.zeros(len(self.categories), 3, parts.mask_decoder_config.hidden_size))

    @classmethod
    def of(cls, model: CoreSeg, categories: Sequence[str]) -> "CategoryPrompt":
        """A copy of a model's segmenter, in float32, whose prompts all are "any lesion" as yet."""
        baseline = cls(
            {
                "categories": list(categories),
                "size_px": model.config.segmenter_size_px,
                "mean": model.config.segmenter_mean,
                "std": model.config.segmenter_std,
                "segmenter": model.config.segmenter_config.to_dict(),
            }
        )
        baseline.segmenter.load_state_dict(model.segmenter.state_dict())
        baseline.prompts.data.copy_(any_lesion_prompt(baseline.segmenter, len(categories))[:, 0])
        return baseline

    def train(self, mode: bool = True) -> "CategoryPrompt":
        """As always, but the frozen encoder stays in eval mode: its batch statistics must not drift."""
        super().train(mode)
        self.segmenter.vision_encoder.eval()
        return self

    def mask_logits(
        self, pixels: Float[torch.Tensor, "batch 3 side side"], numbers: Int[torch.Tensor, " batch"]
    ) -> Float[torch.Tensor, "batch map_height map_width"]:
        """The asked category's mask, at the size of the finest map."""
        prompts = torch.cat([self.prompts, any_lesion_prompt(self.segmenter, 1)[0]])[numbers]  # -1 is the last
        maps = encode_image(self.segmenter, pixels.contiguous(memory_format=torch.channels_last))
        return decode_masks(self.segmenter, maps, prompts[:, None])[:, 0]


KINDS: Mapping[str, type[TrainedBaseline]] = {kind.name: kind for kind in (UNetBaseline, CategoryPrompt)}


def open_baseline(folder: Path) -> TrainedBaseline:
    """The baseline that a recipe left in `folder`, on the CPU; its `settings` hold the weights' digest.

    Raises ModelError where there is none or it is damaged, MissingExtraError where it needs what is not installed.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = KINDS[config["baseline"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f'{folder} is no trained baseline: expected a config.json in it whose "baseline" is {" or ".join(KINDS)}; '
            "recipes/baselines/run makes such folders"
        ) from error
    try:
        baseline = kind(config)
        load_model(baseline, folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"baseline {folder}: cannot be loaded: {shorten(str(error), 200)}") from error
    baseline.settings = {"weights": weights_digest(folder), **config.get("training", {})}
    return baseline.eval()
