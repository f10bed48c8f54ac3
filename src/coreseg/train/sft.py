"""Stage 1, supervised fine-tuning: LoRA, adapter and mask decoder, teacher-forced on reference answers.

    L = text_weight * L_text + mask_weight * L_DiceCE

L_text is the cross-entropy of the answer's tokens, L_DiceCE the mask loss of the rows whose answer has a `<seg>`.
Source: CORE-Seg (arXiv 2603.05911), CoT-based semantic alignment. Our choices: the `<seg>` row of the embedding and
output matrices trains beside LoRA; a rank of 0 trains the whole language model (for reasoners made from scratch).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coreseg import config as settings
from coreseg.config import SftConfig
from coreseg.errors import ConfigError, MissingExtraError, ModelError
from coreseg.imaging import overlay
from coreseg.metrics import detect_score, dice
from coreseg.model.assemble import freeze_all_but_heads, load_parts
from coreseg.model.core_seg import CoreSeg, fresh_adapter
from coreseg.model.processor import IGNORED, Batch, CoreSegProcessor
from coreseg.nano.vision import NanoVisionModel
from coreseg.sam2 import FeatureMaps, encode_image
from coreseg.segmenter import Segmenter
from coreseg.train.collate import Draws, Example, Examples, stretch_mask
from coreseg.train.losses import dice_ce

SETTINGS_FILE = "sft.toml"
USUAL_TOKENS = 100
"""About the length of an answer, so that the text loss has the size of a mean over tokens."""


STARTING_ROWS = 64
"""Rows whose states a fresh adapter is centred on."""


def train_sft(config: SftConfig) -> Path:
    """Run stage 1 and return the run folder, which `Segmenter.from_pretrained` opens at once.

    A run folder that already holds checkpoints of the same settings is resumed from its last one. Raises ConfigError
    where the folder belongs to other settings, DataError for data sets without training rows, MissingExtraError
    without the training libraries.
    """
    _check_extra()
    examples, validation = Examples.open(config, "train"), Examples.open(config, "val")
    torch.manual_seed(config.seed)
    model, processor = load_parts(config.model)
    prepare(model, config)
    out = _claim(config)
    trainer = SftTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=examples,
        data_collator=Collator(processor),
        callbacks=[Watch(config, processor, validation)],
        settings=config,
    )
    last = _last_checkpoint(out)
    if config.fresh_adapter and not last:
        trainer.start_adapter()
    trainer.train(resume_from_checkpoint=last)
    if not (out / "best").exists() and trainer.is_world_process_zero():  # nothing was validated
        save_checkpoint(model, processor, out / "best")
    return out


def prepare(model: CoreSeg, config: SftConfig) -> None:
    """Decide what trains: LoRA and the `<seg>` row (or the whole language model), the adapter, the mask decoder."""
    freeze_all_but_heads(model)
    model.segmenter.mask_decoder.requires_grad_(config.train_decoder and config.mask_weight > 0)
    model.adapter.requires_grad_(config.mask_weight > 0)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    else:
        for name, parameter in model.reasoner.named_parameters():
            parameter.requires_grad_("vision" not in name and "visual" not in name)
    if config.gradient_checkpointing:
        model.reasoner.gradient_checkpointing_enable({"use_reentrant": False})


def add_lora(model: CoreSeg, rank: int, alpha: int) -> None:
    """Wrap the reasoner's language model in LoRA, with the `<seg>` row trainable in both matrices."""
    from peft import LoraConfig, get_peft_model

    text = (
        "language_model"
        if any("language_model" in name for name, _ in model.reasoner.named_modules())
        else "text_model"
    )
    inputs, outputs = model.reasoner.get_input_embeddings(), model.reasoner.get_output_embeddings()
    # Asked of the weights themselves: configurations keep the setting in different places, or nowhere.
    tied = inputs.weight is outputs.weight
    rows = [model.config.seg_token_id]
    embedding = next(name for name, module in model.reasoner.named_modules() if module is inputs)
    head = next(name for name, module in model.reasoner.named_modules() if module is outputs)
    model.reasoner = get_peft_model(
        model.reasoner,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=rf".*{text}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            trainable_token_indices=rows if tied else {embedding: rows, head: rows},
        ),
    )
    if tied:
        # PEFT puts both matrices behind wrappers; without the new name a checkpoint of theirs cannot be saved.
        base = model.reasoner.get_base_model()
        base._tied_weights_keys = {**base._tied_weights_keys, f"{head}.token_adapter": f"{embedding}.token_adapter"}


@dataclass(frozen=True)
class Collator:
    """Examples to model inputs: the processor's batch, and the reference masks at the segmenter's size."""

    processor: CoreSegProcessor

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One batch as keyword arguments of `SftTrainer.compute_loss`."""
        batch = self.processor(
            [e.image for e in examples], [e.question for e in examples], [e.answer for e in examples]
        )
        masks = torch.stack([self.reference(e) for e in examples])
        return {"batch": batch, "masks": masks, "pictures": [e.picture for e in examples]}

    def reference(self, example: Example) -> Float[torch.Tensor, "side side"]:
        """The mask in the segmenter's square."""
        return stretch_mask(example.mask, self.processor.config.segmenter_size_px).float()


def text_loss(
    logits: Float[torch.Tensor, "batch tokens vocabulary"], batch: Batch, box_weight: float = 1.0
) -> Float[torch.Tensor, ""]:
    """Cross-entropy summed over a row's answer tokens, over `USUAL_TOKENS`, averaged over the rows.

    A box's numbers weigh `box_weight`. Our choice: neither the batch's count of tokens divides, so that the gradient
    does not depend on how a batch is cut into micro-batches or over processes; nor the row's own, by which every word
    of a short answer would weigh more, and absent lesions, whose answers are the shortest, would be called too often.
    """
    targets = batch.labels[:, 1:]
    each = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    weights = torch.where(batch.of_boxes[:, 1:], box_weight, 1.0)
    return (each * weights).sum(1).mean() / USUAL_TOKENS


class Kept:
    """What a frozen part of the model saw in each picture, computed once and kept in memory, in half precision."""

    def __init__(self) -> None:
        self._seen: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def of(
        self,
        pictures: Sequence[str],
        pixels: Float[torch.Tensor, "batch 3 _ _"],
        look: Callable[[torch.Tensor], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """What `look` gives for the batch, as `pixels` are; only pictures that are new are looked at."""
        new = [row for row, name in enumerate(pictures) if name not in self._seen]
        if new:
            levels = [level.half().cpu() for level in look(pixels[new])]
            self._seen.update(zip((pictures[row] for row in new), map(list, zip(*levels, strict=True)), strict=True))
        rows = zip(*(self._seen[name] for name in pictures), strict=True)
        return [torch.stack(level).to(pixels) for level in rows]


class SftTrainer(Trainer):
    """`Trainer` with this stage's loss, two learning rates, and rows drawn by set size."""

    def __init__(self, *, settings: SftConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        # The loss is a mean over its own rows, so that Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, float] = {}
        self.kept_looks, self.kept_maps = Kept(), Kept()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Text and mask loss of one batch."""
        # Trainer moves tensors, not what holds them.
        batch: Batch = inputs["batch"].to(self.args.device)
        wants_mask = self.settings.mask_weight > 0
        maps = self._encoded(model, batch, inputs["pictures"]) if wants_mask else None
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            reasoner_inputs=self._looked(model, batch.reasoner_inputs, inputs["pictures"]),
            segmenter_pixels=batch.segmenter_pixels if wants_mask and maps is None else None,
            segmenter_maps=maps,
            segmenter_boxes=batch.segmenter_boxes,
        )
        text = text_loss(output.logits, batch, self.settings.box_weight)
        loss = self.settings.text_weight * text
        self._keep("text_loss", text)
        if wants_mask and output.with_mask.any():
            mask = dice_ce(output.mask_logits, inputs["masks"][output.with_mask])
            # A row without a `<seg>` counts as a row with no mask loss.
            loss = loss + self.settings.mask_weight * mask * output.with_mask.float().mean()
            self._keep("mask_loss", mask)
        return (loss, output) if return_outputs else loss

    @torch.no_grad()
    def start_adapter(self) -> None:
        """A fresh adapter at the segmenter's "any lesion" prompt, centred on the states of the run's first rows."""
        examples, rows = cast(Examples, self.train_dataset), self.settings.batch_size
        collate = cast(Collator, self.data_collator)
        drawn = [examples[each] for each in Draws(examples.weights, STARTING_ROWS, self.settings.seed)]
        model = cast(CoreSeg, self.model).eval()  # type: ignore[no-untyped-call]
        found = []
        for start in range(0, len(drawn), rows):
            batch = collate(drawn[start : start + rows])["batch"].to(self.args.device)
            states, present = model.probe_states(batch.input_ids, batch.attention_mask, batch.reasoner_inputs)
            found.append(states[present].float())
        model.adapter = fresh_adapter(model.config)
        model.adapter.start_at(model.segmenter.prompt_encoder.not_a_point_embed.weight.float().cpu())
        model.adapter.centre_on(torch.cat(found).cpu())
        model.adapter.to(self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's figures with the two losses apart."""
        if "loss" in logs:
            logs.update({name: round(value, 4) for name, value in self.parts.items()})
        super().log(logs, *args, **kwargs)

    def _looked(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], pictures: Sequence[str | None]
    ) -> dict[str, torch.Tensor]:
        """The reasoner's inputs, pixels replaced by what nano's tower sees in them, kept by picture."""
        tower = next((part for part in model.modules() if isinstance(part, NanoVisionModel)), None)
        if tower is None or None in pictures:
            return inputs
        names, look = cast(Sequence[str], pictures), tower.look
        (tokens,) = self.kept_looks.of(names, inputs["pixel_values"], lambda pixels: [look(pixels)])
        return inputs | {"pixel_values": tokens}

    def _encoded(self, model: nn.Module, batch: Batch, pictures: Sequence[str | None]) -> FeatureMaps | None:
        """The frozen image encoder's maps, kept by picture; None where the settings do not keep them."""
        if not self.settings.keep_maps or None in pictures:
            return None
        segmenter = next(part for part in model.modules() if isinstance(part, CoreSeg)).segmenter
        names = cast(Sequence[str], pictures)
        return self.kept_maps.of(names, batch.segmenter_pixels, lambda pixels: encode_image(segmenter, pixels))

    def _keep(self, name: str, value: torch.Tensor) -> None:
        old = self.parts.get(name, value.item())
        self.parts[name] = 0.9 * old + 0.1 * value.item()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW: one learning rate for the language model, one for adapter and mask decoder."""
        if self.optimizer is None:
            assert self.model is not None
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            reasoner = [p for n, p in named if n.startswith("reasoner.")]
            heads = [p for n, p in named if not n.startswith("reasoner.")]
            groups = [
                {"params": reasoner, "lr": self.settings.learning_rate},
                {"params": heads, "lr": self.settings.head_learning_rate},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                betas=(0.9, 0.95),
                weight_decay=self.settings.weight_decay,
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's weights under the modules' own names: Trainer reads them back by those."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(
            output_dir or self.args.output_dir,
            state_dict=state_dict,
            is_main_process=self.args.should_save,
            save_original_format=False,
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that left weights as they were; Trainer would only warn, and train on from there."""
        assert self.model is not None
        state, missing = self.model.state_dict(), set(load_result.missing_keys)
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        # A tied weight is read under its other name.
        lost = sorted(name for name in missing if state[name].data_ptr() not in loaded)
        if lost or load_result.unexpected_keys:
            example = [*lost, *load_result.unexpected_keys][0]
            raise ModelError(
                f"the last checkpoint in {self.settings.out} does not fit the model ({example}, for one); "
                "delete that checkpoint to go on from the one before, or start again in another folder"
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Draws:
        """The whole run's draws, those of every process together."""
        rows_a_step = self.settings.batch_size * self.settings.accumulation * self.args.world_size
        examples = cast(Examples, self.train_dataset)
        return Draws(examples.weights, rows_a_step * self.settings.steps, self.settings.seed)


def training_arguments(config: SftConfig) -> TrainingArguments:
    """The run's settings in Trainer's words. Raises ConfigError where one process would meet several GPUs."""
    arguments = TrainingArguments(
        output_dir=config.out,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=10,
        report_to=["tensorboard"],
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        seed=config.seed,
        disable_tqdm=False,
        ddp_find_unused_parameters=True,
    )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs; give each its own: torchrun --nproc-per-node {arguments.n_gpu} "
            "--no-python coreseg train …, or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


class Watch(TrainerCallback):
    """Validates by writing answers, keeps the best state in `best/`, and draws sample overlays."""

    def __init__(self, config: SftConfig, processor: CoreSegProcessor, validation: Examples) -> None:
        self.config = config
        self.processor = processor
        self.examples = validation.fixed(config.eval_samples, config.seed)
        best = Path(config.out) / "best" / "figures.json"
        self.best = json.loads(best.read_text())["score"] if best.exists() else -1.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At its turn: answers to the validation questions, scored and drawn."""
        model, step = kwargs["model"], state.global_step
        if not self.examples or (step % self.config.eval_every and step != args.max_steps):
            return
        if not state.is_world_process_zero:
            return
        was_training = model.training
        figures, panels = self._look(model.eval())
        model.train(was_training)
        folder = Path(self.config.out)
        with (folder / "validation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        state.log_history.append({"step": step, **{f"val_{k}": v for k, v in figures.items()}})
        print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        (folder / "overlays").mkdir(exist_ok=True)
        _sheet(panels).save(folder / "overlays" / f"step-{step:06d}.png")
        if figures["score"] > self.best:
            self.best = figures["score"]
            save_checkpoint(model, self.processor, folder / "best")
            (folder / "best" / "figures.json").write_text(json.dumps({"step": step, **figures}))

    def _look(self, model: CoreSeg) -> tuple[dict[str, float], list[Any]]:
        segmenter = Segmenter(model, self.processor)
        results = []
        for start in range(0, len(self.examples), 16):
            part = self.examples[start : start + 16]
            results += segmenter.segment_batch([e.image for e in part], [e.question for e in part], constrained=False)
        pairs = list(zip(results, self.examples, strict=True))
        there = [(result, example) for result, example in pairs if example.answer.found]
        figures = {
            "dice": _mean([dice(result.mask, example.mask) for result, example in there]),
            "detect": _mean([detect_score(result.boxes, example.answer.boxes) for result, example in there]),
            "valid": _mean([float(result.valid) for result in results]),
        }
        # Masks and boxes, as far as this run learns them.
        learnt = ["dice", "detect"] if self.config.mask_weight > 0 else ["detect"]
        figures["score"] = _mean([figures[name] for name in learnt])
        return figures, [overlay(e.image, r.mask, r.boxes, reference=e.mask) for r, e in pairs[:12]]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _sheet(panels: Sequence[Any], side: int = 224) -> Any:
    from PIL import Image

    sheet = Image.new("RGB", (4 * side, -(-len(panels) // 4) * side))
    for number, panel in enumerate(panels):
        small = panel.copy()
        small.thumbnail((side, side))
        sheet.paste(small, ((number % 4) * side, (number // 4) * side))
    return sheet


def save_checkpoint(model: CoreSeg, processor: CoreSegProcessor, path: Path) -> None:
    """One folder with the whole model, LoRA merged in, that `Segmenter.from_pretrained` opens."""
    import copy

    whole = model
    if hasattr(model.reasoner, "merge_and_unload"):
        whole = copy.deepcopy(model)
        whole.reasoner = whole.reasoner.merge_and_unload()
    whole.save_pretrained(path)
    processor.save_pretrained(path)


def _check_extra() -> None:
    """Raises MissingExtraError where a library of the extra is not installed."""
    missing = [name for name in ("accelerate", "monai", "peft", "tensorboard") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"training needs {', '.join(missing)}; in a clone: pip install '.[train]'")


def _claim(config: SftConfig) -> Path:
    """The run folder, holding these settings. Raises ConfigError where it holds others."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / SETTINGS_FILE
    if file.exists() and (old := settings.load(SftConfig, file)) != config:
        changed = [name for name in asdict(config) if getattr(old, name) != getattr(config, name)]
        what = ", ".join(f"{name} was {getattr(old, name)!r}, is {getattr(config, name)!r}" for name in changed)
        raise ConfigError(
            f"{out} holds a run with other settings ({what}); give another `out` (to train further, with that run as "
            "`model`), or delete that folder"
        )
    # Several processes write the same; after a rename nobody reads half of it.
    part = file.with_suffix(f".{os.getpid()}.part")
    settings.save(config, part)
    part.replace(file)
    return out


def _last_checkpoint(out: Path) -> str | None:
    """The newest of a run's checkpoints that was written to its end."""
    # Trainer writes its state last.
    written = [file.parent for file in out.glob("checkpoint-*/trainer_state.json")]
    return str(max(written, key=lambda path: int(path.name.split("-")[1]))) if written else None
