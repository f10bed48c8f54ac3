"""Stage 1, supervised fine-tuning: LoRA, adapter and mask decoder, teacher-forced on reference answers.

    L = text_weight * L_text + mask_weight * L_DiceCE + prompt_weight * L_prompt

L_text is the cross-entropy of the answer's tokens, L_DiceCE the mask loss of the rows whose answer has a `<seg>`.
Source: CORE-Seg (arXiv 2603.05911), CoT-based semantic alignment. Our choices: L_prompt, off by default, for reasoners
made from scratch, whose adapter otherwise learns one prompt for every question (see `own_prompts`); the `<seg>` row of
the embedding and output matrices trains beside LoRA; a rank of 0 trains the whole language model (for such reasoners).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from coreseg.config import SftConfig
from coreseg.errors import ConfigError, DataError
from coreseg.model.assemble import load_parts
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import IGNORED, Batch, CoreSegProcessor
from coreseg.sam2 import SegmenterModel, any_lesion_prompt, box_prompts
from coreseg.train.collate import Draws, Example, Examples, stretch_mask
from coreseg.train.losses import dice_ce
from coreseg.train.trainer import StageTrainer, check, claim, last_checkpoint, prepare

USUAL_TOKENS = 100
"""About the length of an answer, so that the text loss has the size of a mean over tokens."""


PROMPT_TOKENS = 3
"""Of a box in the SAM 2 family."""

STARTING_ROWS = 64
"""Rows whose states a fresh adapter is centred on."""


def train_sft(config: SftConfig) -> Path:
    """Run stage 1 and return the run folder, which `Segmenter.from_pretrained` opens at once.

    A run folder that already holds checkpoints of the same settings is resumed from its last one. Raises ConfigError
    where the folder belongs to other settings, DataError for data sets without training rows, MissingExtraError
    without the training libraries.
    """
    check(config)
    examples, validation = Examples.open(config, "train"), Examples.open(config, "val")
    torch.manual_seed(config.seed)
    model, processor = load_parts(config.model)
    if config.prompt_weight and model.config.adapter_queries != PROMPT_TOKENS:
        raise ConfigError(
            f"setting prompt_weight is {config.prompt_weight}; expected 0, since this model's prompts have "
            f"{model.config.adapter_queries} tokens and the mask decoder's own have {PROMPT_TOKENS}"
        )
    kinds = read_kind_prompts(Path(config.kind_prompts), model.segmenter) if config.kind_prompts else {}
    prepare(model, config)
    out = claim(config)
    trainer = SftTrainer(
        model=model,
        settings=config,
        processor=processor,
        validation=validation,
        train_dataset=examples,
        data_collator=Collator(processor, kinds),
    )
    if config.fresh_adapter and not last_checkpoint(out):
        trainer.start_adapter()
    return trainer.to_the_end()


Prompts = Mapping[str, Float[torch.Tensor, "tokens channels"]]
"""Prompts that a mask decoder learned, by category."""


def read_kind_prompts(path: Path, segmenter: SegmenterModel) -> Prompts:
    """The prompts of a safetensors file that `segmenter` learned; raises ConfigError where it is anything else."""
    try:
        prompts = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"setting kind_prompts is {str(path)!r}, which cannot be read: {error}") from error
    expected = any_lesion_prompt(segmenter, 1)[0, 0].shape
    for category, prompt in prompts.items():
        if prompt.shape != expected:
            raise ConfigError(
                f"setting kind_prompts is {str(path)!r}, whose {category!r} has the shape {tuple(prompt.shape)}; "
                f"expected {tuple(expected)}, that of this model's prompts"
            )
    return prompts


@dataclass(frozen=True)
class Collator:
    """Examples to model inputs: the processor's batch, the reference masks at the segmenter's size, and what is asked.

    That is None, "one", "every" or one of `kinds`: categories that the mask decoder has learned prompts for.
    """

    processor: CoreSegProcessor
    kinds: Prompts = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One batch as keyword arguments of `SftTrainer.compute_loss`."""
        batch = self.processor(
            [e.image for e in examples], [e.question for e in examples], [e.answer for e in examples]
        )
        masks = torch.stack([self.reference(e) for e in examples])
        of_kinds = [e.answer.category if e.answer.category in self.kinds else None for e in examples]
        asks = [of_kind if e.asks == "kind" else e.asks for e, of_kind in zip(examples, of_kinds, strict=True)]
        return {"batch": batch, "masks": masks, "pictures": [e.picture for e in examples], "asks": asks}

    def reference(self, example: Example) -> Float[torch.Tensor, "side side"]:
        """The mask in the segmenter's square."""
        return stretch_mask(example.mask, self.processor.config.segmenter_size_px).float()


@dataclass(frozen=True)
class NearNumbers:
    """Targets for a box's numbers that are nearly right beside the right one, for tokenizers of one token a number.

    A number is as good as its distance from the right one says, by a normal distribution of deviation `spread`. Source:
    label smoothing over the neighbours of an ordinal class, Diaz and Marathe (CVPR 2019). Our choice: its use here.
    """

    tokens: Int[torch.Tensor, " numbers"]
    spread: float

    @classmethod
    def of(cls, tokenizer: Any, numbers: int, spread: float) -> "NearNumbers":
        """Raises ConfigError where a number up to `numbers` is not one token."""
        found = [tokenizer(str(number), add_special_tokens=False)["input_ids"] for number in range(numbers + 1)]
        first = next((number for number, ids in enumerate(found) if len(ids) != 1), None)
        if first is not None:
            raise ConfigError(
                f"setting box_spread is {spread}; expected 0, since the tokenizer writes {first} in several tokens"
            )
        return cls(torch.tensor([ids[0] for ids in found]), spread)

    def loss(
        self, logits: Float[torch.Tensor, "tokens vocabulary"], targets: Int[torch.Tensor, " tokens"]
    ) -> Float[torch.Tensor, " tokens"]:
        """Cross-entropy of each number's distribution with that of the nearly right ones."""
        known = self.tokens.to(targets.device)
        right = (targets[:, None] == known).int().argmax(1)
        distance = torch.arange(len(known), device=targets.device) - right[:, None]
        wanted = (-(distance / self.spread).square() / 2).softmax(1)
        return -(wanted * logits.log_softmax(1)[:, known]).sum(1)


def text_loss(
    logits: Float[torch.Tensor, "batch tokens vocabulary"],
    batch: Batch,
    box_weight: float = 1.0,
    near: NearNumbers | None = None,
) -> Float[torch.Tensor, ""]:
    """Cross-entropy summed over a row's answer tokens, over `USUAL_TOKENS`, averaged over the rows.

    A box's numbers weigh `box_weight`, and have the targets of `near` where it is given. Our choice: neither the
    batch's count of tokens divides, so that the gradient does not depend on how a batch is cut into micro-batches or
    over processes; nor the row's own, by which every word of a short answer would weigh more, and absent lesions, whose
    answers are the shortest, would be called too often.
    """
    targets = batch.labels[:, 1:]
    each = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    numbers = batch.of_boxes[:, 1:]
    if near is not None:
        known = numbers & torch.isin(targets, near.tokens.to(targets.device))  # frames may grow from batch to batch
        each = each.masked_scatter(known, near.loss(logits[:, :-1][known].float(), targets[known]))
    weights = torch.where(numbers, box_weight, 1.0)
    return (each * weights).sum(1).mean() / USUAL_TOKENS


@torch.no_grad()
def own_prompts(
    model: CoreSeg, batch: Batch, asks: Sequence[str | None], kinds: Prompts
) -> Float[torch.Tensor, "asked tokens channels"]:
    """The mask decoder's own prompts for what these rows ask, without those whose `asks` is None.

    A box for "one", as people would draw it; for "every" the "any lesion" prompt that nano's segmenter was trained
    with; for one of `kinds` what the decoder learned of it. Our choice throughout.
    """
    asked = [(row, each) for row, each in enumerate(asks) if each]
    prompts = any_lesion_prompt(model.segmenter, len(asked))[:, 0].clone()
    for place, (row, each) in enumerate(asked):
        if each == "one":
            prompts[place] = box_prompts(model.segmenter, [batch.segmenter_boxes[row][:1]])[0, 0]
        elif each in kinds:
            prompts[place] = kinds[each].to(prompts)
    return prompts


class SftTrainer(StageTrainer):
    """This stage's loss."""

    settings: SftConfig
    _near_numbers: NearNumbers | None = None

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
        maps = self.encoded(model, batch, inputs["pictures"]) if wants_mask else None
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            reasoner_inputs=self.looked(model, batch.reasoner_inputs, inputs["pictures"]),
            segmenter_pixels=batch.segmenter_pixels if wants_mask and maps is None else None,
            segmenter_maps=maps,
            segmenter_boxes=batch.segmenter_boxes,
        )
        text = text_loss(output.logits, batch, self.settings.box_weight, self.near_numbers(batch))
        loss = self.settings.text_weight * text
        self.note(text_loss=text)
        if wants_mask and output.with_mask.any():
            mask = dice_ce(output.mask_logits, inputs["masks"][output.with_mask])
            # A row without a `<seg>` counts as a row with no mask loss.
            loss = loss + self.settings.mask_weight * mask * output.with_mask.float().mean()
            self.note(mask_loss=mask)
        if self.settings.prompt_weight and any(inputs["asks"]):
            core = next(part for part in model.modules() if isinstance(part, CoreSeg))
            told = own_prompts(core, batch, inputs["asks"], cast(Collator, self.data_collator).kinds)
            rows = torch.tensor([asks is not None for asks in inputs["asks"]], device=told.device)
            said = core.adapter(output.states[rows], output.present[rows])
            prompt = functional.mse_loss(said.float(), told.float())
            loss = loss + self.settings.prompt_weight * prompt * rows.float().mean()
            self.note(prompt_loss=prompt)
        return (loss, output) if return_outputs else loss

    def near_numbers(self, batch: Batch) -> NearNumbers | None:
        """The targets of numbers where `box_spread` asks for them; the first batch says how many numbers there are."""
        if self.settings.box_spread and self._near_numbers is None:
            largest = max(map(max, batch.frames_wh))
            self._near_numbers = NearNumbers.of(self.processor.tokenizer, largest, self.settings.box_spread)
        return self._near_numbers

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
        if sum(map(len, found)) < 2:
            raise DataError(
                "a fresh adapter is centred on the states of rows with a lesion, and the first "
                f"{STARTING_ROWS} draws have hardly any; give data with lesions, or fresh_adapter = false"
            )
        model.restart_adapter(torch.cat(found))
