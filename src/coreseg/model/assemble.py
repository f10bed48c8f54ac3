"""Joining a reasoner and a segmenter into a CORE-Seg, and finding and loading one."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    AutoProcessor,
)

from coreseg.answer import SEG_TOKEN
from coreseg.errors import ModelError
from coreseg.model.card import write_card
from coreseg.model.confidence import Confidence
from coreseg.model.core_seg import SEGMENTER_FAMILY, CoreSeg, CoreSegConfig, Probe, fresh_adapter
from coreseg.model.processor import CoreSegProcessor
from coreseg.model.scope import Scope

EMBEDDED = "nano"
EMBEDDED_SFT = "nano-sft"
"""nano as stage 1 left it, kept as the tensors in which it differs from nano."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assemble(
    reasoner: str,
    segmenter: str,
    out: Path,
    *,
    probe: Probe = "seg",
    dtype: torch.dtype | None = None,
    segmenter_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    segmenter_std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> CoreSeg:
    """A fresh CORE-Seg in `out` from two checkpoints, each a folder or a hub name, with an untrained adapter.

    `<seg>` is added to the tokenizer; the embeddings grow only where no spare row is left, and never shrink.
    Raises ModelError where either is missing or of another kind, or where `out` is not empty.
    """
    _check_empty(out)
    try:
        processor = AutoProcessor.from_pretrained(reasoner)
        talks = AutoModelForImageTextToText.from_pretrained(reasoner, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"reasoner {reasoner!r}: expected an image-text-to-text checkpoint: {_first(error)}"
        ) from error
    try:
        kind = AutoConfig.from_pretrained(segmenter).model_type
        if kind not in SEGMENTER_FAMILY:
            raise ModelError(
                f"segmenter {segmenter!r} is a {kind!r}; expected one of the SAM 2 family: "
                + ", ".join(SEGMENTER_FAMILY)
            )
        segments = AutoModelForMaskGeneration.from_pretrained(segmenter, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise ModelError(f"segmenter {segmenter!r}: expected a SAM 2 or EdgeTAM checkpoint: {_first(error)}") from error
    model, joined = join(
        talks, processor, segments, probe=probe, segmenter_mean=segmenter_mean, segmenter_std=segmenter_std
    )
    model.save_pretrained(out)
    joined.save_pretrained(out)
    write_card(out, model, trained=False)
    return model


def join(
    reasoner: Any,
    processor: Any,
    segmenter: Any,
    *,
    probe: Probe = "seg",
    segmenter_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    segmenter_std: tuple[float, ...] = (0.229, 0.224, 0.225),
    **settings: Any,
) -> tuple[CoreSeg, CoreSegProcessor]:
    """The same from models in memory, which become the new model's own parts. `settings` go to `CoreSegConfig`."""
    tokenizer = processor.tokenizer
    if tokenizer.convert_tokens_to_ids(SEG_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([SEG_TOKEN], special_tokens=True)
    rows = reasoner.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        reasoner.resize_token_embeddings(len(tokenizer))
    for part in (reasoner.config, segmenter.config):
        part._name_or_path = ""  # Where the parts lay is nobody's business once they are joined.
    config = CoreSegConfig(
        reasoner_config=reasoner.config,
        segmenter_config=segmenter.config,
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        answer_token_ids=tokenizer(" </think><answer>", add_special_tokens=False)["input_ids"],
        probe=probe,
        segmenter_mean=segmenter_mean,
        segmenter_std=segmenter_std,
        **settings,
    )
    with torch.device("meta"):  # both halves are there already; random ones of their size would be made for nothing
        model = CoreSeg(config)
    model.reasoner, model.segmenter, model.adapter = reasoner, segmenter, fresh_adapter(config)
    segmenter.mask_decoder.dynamic_multimask_via_stability = False
    segmenter.vision_encoder.requires_grad_(False)
    model.adapter.start_at(segmenter.prompt_encoder.not_a_point_embed.weight)
    model.adapter.to(segmenter.dtype)
    return model, CoreSegProcessor(processor, config)


def find_checkpoint(name_or_path: str | Path) -> Path | str:
    """Where a model is: the embedded default by its name, a run folder's best state, a folder, or a hub name.

    Raises ModelError for a path that is not there.
    """
    if str(name_or_path) in (EMBEDDED, EMBEDDED_SFT):
        return Path(str(resources.files("coreseg.nano"))) / ("weights" if str(name_or_path) == EMBEDDED else "sft")
    path = Path(name_or_path)
    if (path / "best" / "config.json").is_file():
        return path / "best"
    if (path / "trainer_state.json").is_file():
        raise ModelError(f"{path} is for a training run to go on from; give the run's folder, {path.parent}")
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise ModelError(f"{path} is no CORE-Seg checkpoint: no config.json in it (nor in its best/)")
    parts = str(name_or_path).split("/")
    if len(parts) != 2 or str(name_or_path).startswith((".", "/", "~")):
        raise ModelError(
            f"unknown model {str(name_or_path)!r}: there is no folder of that name; "
            "expected 'nano', 'nano-sft', a checkpoint or run folder, or a hub name OWNER/NAME"
        )
    return str(name_or_path)


def load_parts(name_or_path: str | Path, dtype: torch.dtype | None = None) -> tuple[CoreSeg, CoreSegProcessor]:
    """Model (float32 unless told otherwise) and processor of a checkpoint. Raises ModelError where it is none."""
    place = find_checkpoint(name_or_path)
    try:
        if str(name_or_path) == EMBEDDED_SFT:
            model, processor = load_parts(EMBEDDED, dtype)
            model.load_state_dict(model.state_dict() | load_file(Path(place) / "model.safetensors"))
            model.config.word_bias = {}  # nano's own
            return model, processor
        kind = AutoConfig.from_pretrained(place).model_type if isinstance(place, str) else _kind(place)
        if kind != CoreSegConfig.model_type:
            raise ModelError(
                f"{name_or_path} holds a {kind!r}, not a CORE-Seg; join it with a segmenter by `coreseg assemble`"
            )
        processor = CoreSegProcessor.from_pretrained(place)  # the quick part first: it knows a checkpoint without <seg>
        loaded: Any = CoreSeg.from_pretrained(place, dtype=dtype or torch.float32, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"]:
            # transformers would fill them with random numbers: a mask from those is worse than none.
            missing = sorted(report["missing_keys"])
            raise ModelError(
                f"model {name_or_path}: {len(missing)} weights are missing ({missing[0]}, for one); "
                "copy or export the checkpoint again"
            )
        # Loading makes every weight trainable again.
        model.segmenter.vision_encoder.requires_grad_(False)
        return model, processor
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "no folder here, and not to be had as a hub name" if isinstance(place, str) else "cannot be loaded"
        raise ModelError(f"model {name_or_path}: {where}: {_first(error)}") from error


def freeze_all_but_heads(model: CoreSeg) -> None:
    """Only the adapter and the mask decoder stay trainable."""
    model.requires_grad_(False)
    model.adapter.requires_grad_(True)
    model.segmenter.mask_decoder.requires_grad_(True)


def _kind(folder: Path) -> str:
    import json

    try:
        kind: str = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "unknown")
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    return kind


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is not empty; give a new folder")


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def scope_of(name_or_path: str | Path) -> Scope | None:
    """What a checkpoint says that it was trained on, if it does. Raises ModelError where there is no such model."""
    # The state before stage 2 has seen the same pictures, through the same image encoder.
    return Scope.load(find_checkpoint(EMBEDDED if str(name_or_path) == EMBEDDED_SFT else name_or_path))


def confidence_of(name_or_path: str | Path) -> Confidence | None:
    """How sure a checkpoint may be of its masks, if it knows. Raises ModelError where there is no such model."""
    return Confidence.load(find_checkpoint(name_or_path))


def export(
    run: str | Path,
    out: Path,
    dtype: str = "bfloat16",
    shard_size: str = "5GB",
    fit: Callable[[CoreSeg, CoreSegProcessor], Scope] | None = None,
    confidence: Confidence | None = None,
) -> None:
    """Write a checkpoint or a run's best state to `out` as one folder with a model card, in another precision.

    `fit` makes the record of what it was trained on, otherwise it keeps the one that it has, as it does its confidence
    where none is given. Raises ModelError for an unknown precision or where `out` is not empty, and what `fit` raises,
    before anything is written.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    _check_empty(out)
    model, processor = load_parts(run, DTYPES[dtype])
    scope = fit(model, processor) if fit else scope_of(run)
    confidence = confidence or confidence_of(run)
    model.save_pretrained(out, max_shard_size=shard_size)
    processor.save_pretrained(out)
    for beside in (scope, confidence):
        if beside:
            beside.save(out)
    write_card(out, model, trained=True, scope=scope, confidence=confidence)
