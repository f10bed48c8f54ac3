"""Stage 2 with scripted completions: what a random model samples would all be malformed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coreseg.config import GrpoConfig
from coreseg.model.assemble import load_parts
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import Batch
from coreseg.sam2 import FeatureMaps
from coreseg.train.collate import Example, Examples
from coreseg.train.grpo import Collator, Completions, GrpoTrainer, Rollout, with_completions
from coreseg.train.trainer import prepare
from coreseg.types import Answer


def settings(model: Path | str, data: Path | str, out: Path | str, **changes: Any) -> GrpoConfig:
    values: dict[str, Any] = {
        "steps": 3, "batch_size": 8, "warmup_steps": 0, "lora_rank": 2, "eval_samples": 0, "save_every": 100,
        "learning_rate": 1e-3, "head_learning_rate": 1e-3, "absent_share": 0.0, "samples_every": 0,
        "max_new_tokens": 160,
    }  # fmt: skip
    return GrpoConfig(**values | {"model": str(model), "data": (str(data),), "out": str(out)} | changes)


def texts_for(example: Example) -> list[Answer | str]:
    """A good answer, a worse one, a wrong one and a malformed one; of different lengths."""
    good = replace(example.answer, reasoning="Seen.")
    height, width = example.mask.shape
    whole = replace(good, boxes=((0, 0, width, height),), reasoning="It is all over the picture, from side to side.")
    return [good, whole, Answer("cyst", (), "Nothing.", found=False), "<think> The mask is <seg>. <seg>"]


class Scripted(GrpoTrainer):
    """Completions are written by `texts_for`; the masks are the model's own."""

    def _roll_out(self, number: int, inputs: dict[str, Any]) -> Rollout:
        self.examples: list[Example] = inputs["examples"]
        return super()._roll_out(number, inputs)

    def sample(self, model: CoreSeg, prompts: Batch, maps: FeatureMaps) -> Completions:
        processor, rows = self.processor, []
        for number, example in enumerate(self.examples):
            for text in texts_for(example)[: self.settings.group_size]:
                if example.question.startswith("(silent)"):
                    text = "<think> Nothing" + " at all" * len(rows)
                if isinstance(text, str):
                    rows.append([*processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
                    continue
                height, width = example.image.shape[:2]
                frame = prompts.frames_wh[number * self.settings.group_size]
                rows.append(
                    processor.encode_answer(
                        replace(text, boxes=processor.boxes_to_frame(text.boxes, (width, height), frame))
                    )
                )
        longest = max(map(len, rows))
        pad, eos = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        ended = torch.tensor([row[-1] == eos for row in rows])
        whole = with_completions(prompts, Rollout(ids, real, real, torch.zeros(len(rows))))
        output = model(**whole, segmenter_maps=maps)
        masks = iter(output.mask_logits)
        return Completions(ids, real, ended, [next(masks) if has else None for has in output.with_mask.tolist()])


class PartlySilent(Examples):
    """The first draws are marked: their completions get no `<seg>`."""

    silent = 0

    def __getitem__(self, drawn: tuple[int, int]) -> Example:
        example = super().__getitem__(drawn)
        return replace(example, question=f"(silent) {example.question}") if drawn[1] < self.silent else example


def trainer_of(config: GrpoConfig, kind: type[GrpoTrainer] = Scripted) -> GrpoTrainer:
    torch.manual_seed(0)
    model, processor = load_parts(config.model)
    prepare(model, config)
    return kind(
        model=model,
        settings=config,
        processor=processor,
        train_dataset=PartlySilent.open(config, "train"),
        data_collator=Collator(processor, config.group_size),
    )
