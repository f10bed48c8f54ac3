"""CORE-Seg: a reasoner, the semantic-guided prompt adapter and a segmenter, joined.

    text + image -> reasoner -> text with <seg>; the last hidden state at <seg> -> adapter -> semantic prompt
    image -> image encoder (once) -> feature maps -> mask decoder, prompted by the semantic prompt -> mask

`CoreSeg.decode` is the only way from hidden states to a mask: training, inference and evaluation all call it.
Source: CORE-Seg (arXiv 2603.05911).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)

from coreseg.errors import ConfigError, ModelError
from coreseg.model.adapter import SemanticPromptAdapter
from coreseg.nano.vision import register
from coreseg.sam2 import FeatureMaps, any_lesion_prompt, box_prompts, decode_masks, encode_image

register()

Probe = Literal["seg", "answer"]
Boxes = Sequence[Float[torch.Tensor, "_ 4"]]
"""One tensor a row: boxes xyxy in pixels of the segmenter's square."""
SEGMENTER_FAMILY = ("sam2", "sam2_video", "edgetam", "edgetam_video")


class CoreSegConfig(PreTrainedConfig):
    """Both sub-configurations, the adapter, the probe and the segmenter's frame.

    probe: "seg" takes the state at `<seg>` alone, "answer" the states of every token of the answer block up to it.
    adapter_tokens, adapter_queries, adapter_blocks, adapter_heads: see `SemanticPromptAdapter`.
    box_prompts: whether the boxes written in the text prompt the mask decoder too (an ablation; off in CORE-Seg).
    looks_px: by the category that an answer names, "" for any other, the sides of the squares in which the picture is
    seen for its mask, multiples of 32 (`looks.py`; empty, as in CORE-Seg, for the segmenter's own square alone).
    second_look: whether answers look again, enlarged, at what they found (`looks.py`; off in CORE-Seg).
    segmenter_mean, segmenter_std: how the segmenter's pixels, in [0, 1], are normalised.
    reasoning_budget: how many tokens of reasoning the grammar leaves free.
    word_bias: by token, what is added to its logit in greedy writing, so that a word which decides something, such as
    the one that every finding begins with, comes as readily as it should. Sampling in stage 2 does without.
    """

    model_type = "core_seg"
    sub_configs = {"reasoner_config": AutoConfig, "segmenter_config": AutoConfig}  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        reasoner_config: PreTrainedConfig | dict[str, Any] | None = None,
        segmenter_config: PreTrainedConfig | dict[str, Any] | None = None,
        seg_token_id: int | None = None,
        answer_token_ids: list[int] | None = None,
        probe: Probe = "seg",
        adapter_tokens: int = 8,
        adapter_queries: int = 3,
        adapter_blocks: int = 2,
        adapter_heads: int = 4,
        box_prompts: bool = False,
        looks_px: Mapping[str, list[int]] | None = None,
        second_look: bool = False,
        segmenter_mean: tuple[float, ...] | list[float] = (0.485, 0.456, 0.406),
        segmenter_std: tuple[float, ...] | list[float] = (0.229, 0.224, 0.225),
        reasoning_budget: int = 160,
        word_bias: Mapping[Any, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if probe not in ("seg", "answer"):
            raise ConfigError(f"probe is {probe!r}; expected 'seg' or 'answer'")
        for category, sides in (looks_px or {}).items():
            if not sides or any(side <= 0 or side % 32 for side in sides):
                raise ConfigError(f"looks_px[{category!r}] is {sides}; expected multiples of 32, such as [256, 320]")
        self.reasoner_config = _as_config(reasoner_config)
        self.segmenter_config = _as_config(segmenter_config)
        self.seg_token_id = seg_token_id
        self.answer_token_ids = answer_token_ids
        self.probe = probe
        self.adapter_tokens = adapter_tokens
        self.adapter_queries = adapter_queries
        self.adapter_blocks = adapter_blocks
        self.adapter_heads = adapter_heads
        self.box_prompts = box_prompts
        self.looks_px = dict(looks_px or {})
        self.second_look = second_look
        self.segmenter_mean = list(segmenter_mean)
        self.segmenter_std = list(segmenter_std)
        self.reasoning_budget = reasoning_budget
        # JSON has text for keys.
        self.word_bias = {int(token): float(bias) for token, bias in (word_bias or {}).items()}
        super().__init__(**kwargs)

    @property
    def segmenter_size_px(self) -> int:
        """Side of the square that the segmenter sees."""
        size: int = self.segmenter_config.prompt_encoder_config.image_size
        return size


# Without this, loading the tokenizer beside the model takes the configuration for a nameless one, and says so.
AutoConfig.register(CoreSegConfig.model_type, CoreSegConfig, exist_ok=True)


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> Any:
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config


@dataclass(frozen=True)
class TrainingOutput:
    """What one teacher-forced pass gives: next-token logits, and mask logits of the rows that have a `<seg>`.

    `with_mask` says which rows those are, in order. `states` are what the adapter is shown of each row, and `present`
    which of it is real: nothing of a row without `<seg>`.
    """

    logits: Float[torch.Tensor, "batch tokens vocabulary"]
    mask_logits: Float[torch.Tensor, "masked height width"]
    with_mask: Bool[torch.Tensor, " batch"]
    states: Float[torch.Tensor, "batch probes reasoner"]
    present: Bool[torch.Tensor, "batch probes"]


@dataclass(frozen=True)
class Generation:
    """What generation gives, row by row: the completion's ids (cut at the end of text), and mask logits or None.

    `states` are what `decode` made the mask from. `log_probabilities` are the likeliest token's, which is the one
    written where nothing is sampled: their mean over a row's tokens and the end of text.
    """

    ids: list[list[int]]
    mask_logits: list[Float[torch.Tensor, "height width"] | None]
    states: list[Float[torch.Tensor, "_ reasoner"] | None]
    log_probabilities: list[float]


class CoreSeg(PreTrainedModel):
    """A reasoner, an adapter and a segmenter under these three prefixes."""

    config_class = CoreSegConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    reasoner: Any
    segmenter: Any
    adapter: SemanticPromptAdapter

    def __init__(self, config: CoreSegConfig) -> None:
        super().__init__(config)
        if config.segmenter_config.model_type not in SEGMENTER_FAMILY:
            raise ModelError(
                f"the segmenter is a {config.segmenter_config.model_type!r}; expected one of the SAM 2 family: "
                + ", ".join(SEGMENTER_FAMILY)
            )
        self.reasoner = AutoModelForImageTextToText.from_config(config.reasoner_config)
        self.adapter = fresh_adapter(config)
        self.segmenter = AutoModelForMaskGeneration.from_config(config.segmenter_config)
        # It swaps masks in eval mode only, so that training and inference would disagree.
        self.segmenter.mask_decoder.dynamic_multimask_via_stability = False
        self.segmenter.vision_encoder.requires_grad_(False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """The adapter's; the two halves initialise themselves."""
        if isinstance(module, SemanticPromptAdapter):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The reasoner's token embedding."""
        return self.reasoner.get_input_embeddings()  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "CoreSeg":
        """As always, but what is frozen stays in eval mode: its batch statistics must not drift.

        `Trainer` calls this at every step.
        """
        super().train(mode)
        if mode:
            _rest_frozen(self)
        return self

    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch tokens"],
        attention_mask: Int[torch.Tensor, "batch tokens"],
        reasoner_inputs: Mapping[str, Any],
        segmenter_pixels: Float[torch.Tensor, "batch 3 side side"] | None = None,
        segmenter_maps: FeatureMaps | None = None,
        segmenter_boxes: Boxes | None = None,
    ) -> TrainingOutput:
        """One teacher-forced pass over prompt and answer.

        `reasoner_inputs` are the picture's own inputs of the reasoner (pixel values, grids…). The segmenter's picture
        comes as pixels or as the image encoder's maps, cached; without either no mask is decoded. `segmenter_boxes`
        are the answers' boxes, for `decode`.
        """
        with _last_hidden_states(self.reasoner) as seen:
            logits = self.reasoner(input_ids=input_ids, attention_mask=attention_mask, **reasoner_inputs).logits
        # No gradient flows to maps of a frozen encoder, so the two forms are the same to the loss.
        if segmenter_maps is None and segmenter_pixels is not None:
            segmenter_maps = encode_image(self.segmenter, segmenter_pixels)
        chosen = self.probe_positions(input_ids)
        with_mask = chosen.any(dim=1)
        states, present = _gather(seen[-1], chosen)
        if segmenter_maps is None or not with_mask.any():
            return TrainingOutput(logits, logits.new_zeros((0, 1, 1)), with_mask & False, states, present)
        maps = [level[with_mask] for level in segmenter_maps]
        boxes = segmenter_boxes and [segmenter_boxes[row] for row in torch.nonzero(with_mask)[:, 0]]
        masks = self.decode(states[with_mask], present[with_mask], maps, boxes)
        return TrainingOutput(logits, masks, with_mask, states, present)

    @torch.no_grad()
    def restart_adapter(self, states: Float[torch.Tensor, "states reasoner"]) -> None:
        """A fresh adapter at the segmenter's "any lesion" prompt, centred on states that it will see."""
        self.adapter = fresh_adapter(cast(CoreSegConfig, self.config))
        self.adapter.start_at(self.segmenter.prompt_encoder.not_a_point_embed.weight.float().cpu())
        self.adapter.centre_on(states.float().cpu())
        self.adapter.to(self.device)

    def probe_states(
        self,
        input_ids: Int[torch.Tensor, "batch tokens"],
        attention_mask: Int[torch.Tensor, "batch tokens"],
        reasoner_inputs: Mapping[str, Any],
    ) -> tuple[Float[torch.Tensor, "batch probes reasoner"], Bool[torch.Tensor, "batch probes"]]:
        """What the adapter would be shown of these rows, and which of it is real; a row without `<seg>` has none."""
        with _last_hidden_states(self.reasoner) as seen:
            self.reasoner(input_ids=input_ids, attention_mask=attention_mask, **reasoner_inputs)
        return _gather(seen[-1], self.probe_positions(input_ids))

    def probe_positions(self, ids: Int[torch.Tensor, "batch tokens"]) -> Bool[torch.Tensor, "batch tokens"]:
        """Which positions' states the adapter reads: `<seg>` as the input, or the whole answer up to it.

        A row without `<seg>` has none. Should a row hold several `<seg>`, the last one counts.
        """
        is_seg = ids.eq(self.config.seg_token_id)
        last_seg: torch.Tensor = is_seg & (is_seg.flip(1).cumsum(1).flip(1) == 1)
        if self.config.probe == "seg":
            return last_seg
        opening = self.config.answer_token_ids
        if ids.shape[1] < len(opening):
            return torch.zeros_like(last_seg)
        windows = ids.unfold(1, len(opening), 1) == torch.tensor(opening, device=ids.device)
        opened = nn.functional.pad(windows.all(-1), (len(opening) - 1, 0))
        until_seg: torch.Tensor = last_seg.flip(1).cumsum(1).flip(1) > 0
        return until_seg & (opened.cumsum(1) > 0)

    def decode(
        self,
        states: Float[torch.Tensor, "batch probes reasoner"],
        present: Bool[torch.Tensor, "batch probes"],
        maps: FeatureMaps,
        boxes: Boxes | None = None,
    ) -> Float[torch.Tensor, "batch height width"]:
        """Probe states -> semantic prompt -> mask logits at the finest map's size. The one path to a mask.

        `boxes` join the prompt only where the configuration says `box_prompts`.
        """
        prompt = self.adapter(states.to(self.adapter.mlp.project.weight.dtype), present)[:, None]
        if self.config.box_prompts and boxes is not None:
            prompt = torch.cat([prompt, box_prompts(self.segmenter, boxes)], dim=2)
        return decode_masks(self.segmenter, maps, prompt)[:, 0]

    def question_blind(
        self, segmenter_pixels: Float[torch.Tensor, "batch 3 side side"]
    ) -> Float[torch.Tensor, "batch height width"]:
        """Mask logits of the segmenter's "any lesion" prompt: what it finds without knowing the question."""
        maps = encode_image(self.segmenter, segmenter_pixels)
        return decode_masks(self.segmenter, maps, any_lesion_prompt(self.segmenter, len(segmenter_pixels)))[:, 0]

    def in_boxes(
        self, segmenter_pixels: Float[torch.Tensor, "batch 3 side side"], boxes: Boxes
    ) -> Float[torch.Tensor, "batch height width"]:
        """Mask logits of the segmenter's own box prompts; -1 throughout for a row without boxes.

        Each box is decoded by itself and the masks are united: to a SAM a box means one object, and all boxes in one
        prompt would be a prompt that it never saw. Our choice.
        """
        maps = encode_image(self.segmenter, segmenter_pixels)
        logits = torch.full((len(maps[0]), *maps[0].shape[-2:]), -1.0).to(maps[0])
        for row, asked in enumerate(boxes):
            if len(asked):
                prompts = box_prompts(self.segmenter, list(asked[:, None])).transpose(0, 1)
                own = [level[row : row + 1] for level in maps]
                logits[row] = decode_masks(self.segmenter, own, prompts)[0].amax(dim=0)
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[torch.Tensor, "batch tokens"],
        attention_mask: Int[torch.Tensor, "batch tokens"],
        reasoner_inputs: Mapping[str, Any],
        max_new_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
        segmenter_pixels: Float[torch.Tensor, "batch 3 side side"] | None = None,
        segmenter_maps: FeatureMaps | None = None,
        constraint: Any | None = None,
        temperature: float = 0.0,
        read_boxes: Callable[[list[list[int]]], Boxes] | None = None,
    ) -> Generation:
        """Write the answer, and decode the mask of each completion from the states kept while writing.

        Prompts are padded on the left. Greedy at temperature 0, else sampled from the policy itself (no top-k or
        top-p); only a picture's placeholder is never written, since no pass over the text could read it back. The
        segmenter's picture comes as in `forward`. A completion whose `<seg>` never became an input, cut off by the
        length limit, has no mask.
        """
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        elif self.config.word_bias:
            sampling["sequence_bias"] = {(token,): bias for token, bias in self.config.word_bias.items()}
        likeliest = _Likeliest()
        with _last_hidden_states(self.reasoner) as seen:
            sequences = self.reasoner.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **reasoner_inputs,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                num_beams=1,
                repetition_penalty=1.0,
                use_cache=True,
                suppress_tokens=_placeholders(self.config.reasoner_config),
                logits_processor=LogitsProcessorList([*([constraint] if constraint else []), likeliest]),
                **sampling,
            )
        completion = sequences[:, input_ids.shape[1] :]
        # seen[0] is the prompt's last state, seen[k] that of completion token k - 1 as the input.
        written = completion[:, : len(seen) - 1]
        ended = (written == eos_token_id).cumsum(1) > 0
        chosen = self.probe_positions(written.masked_fill(ended, pad_token_id))
        with_mask = chosen.any(dim=1)
        mask_logits: list[Float[torch.Tensor, "height width"] | None] = [None] * len(input_ids)
        row_states: list[Float[torch.Tensor, "_ reasoner"] | None] = [None] * len(input_ids)
        rows = [ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids for ids in completion.tolist()]
        if with_mask.any() and (segmenter_pixels is not None or segmenter_maps is not None):
            kept = torch.stack([step[:, -1] for step in seen[1:]], dim=1)
            states, present = _gather(kept, chosen)
            if segmenter_maps is not None:
                maps = [level[with_mask] for level in segmenter_maps]
            else:
                maps = encode_image(self.segmenter, cast(torch.Tensor, segmenter_pixels)[with_mask])
            numbers = torch.nonzero(with_mask)[:, 0].tolist()
            boxes = None
            if self.config.box_prompts and read_boxes:
                written_boxes = read_boxes(rows)
                boxes = [written_boxes[row] for row in numbers]
            decoded = self.decode(states[with_mask], present[with_mask], maps, boxes)
            for row, logits in zip(numbers, decoded, strict=True):
                mask_logits[row], row_states[row] = logits, states[row, present[row]]
        return Generation(rows, mask_logits, row_states, likeliest.means([len(row) + 1 for row in rows]))


class _Likeliest(LogitsProcessor):
    """Notes how likely each row's likeliest next token is, and changes nothing."""

    def __init__(self) -> None:
        self._seen: list[Float[torch.Tensor, " batch"]] = []

    def __call__(
        self, input_ids: Int[torch.Tensor, "batch tokens"], scores: Float[torch.Tensor, "batch vocabulary"]
    ) -> Float[torch.Tensor, "batch vocabulary"]:
        self._seen.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def means(self, tokens: Sequence[int]) -> list[float]:
        """The mean logarithm over so many first tokens of each row, or over all where there are fewer."""
        seen = torch.stack(self._seen, dim=1).cpu()
        return [float(row[:count].mean()) for row, count in zip(seen, tokens, strict=True)]


def _placeholders(reasoner_config: Any) -> list[int] | None:
    """The tokens that stand for pictures and films in a prompt."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    found = [getattr(reasoner_config, name, None) for name in names]
    return [token for token in found if token is not None] or None


def fresh_adapter(config: CoreSegConfig) -> SemanticPromptAdapter:
    """An untrained adapter that fits between the two halves."""
    return SemanticPromptAdapter(
        reasoner_width=config.reasoner_config.get_text_config().hidden_size,
        width=config.segmenter_config.mask_decoder_config.hidden_size,
        tokens=config.adapter_tokens,
        queries=config.adapter_queries,
        blocks=config.adapter_blocks,
        heads=config.adapter_heads,
    )


def _rest_frozen(module: nn.Module) -> None:
    """Eval mode for the largest parts in which no parameter trains; what has no parameters goes with its neighbours."""
    for child in module.children():
        trains = [parameter.requires_grad for parameter in child.parameters()]
        if any(trains):
            _rest_frozen(child)
        elif trains:
            child.eval()


@contextmanager
def _last_hidden_states(reasoner: nn.Module) -> Iterator[list[Float[torch.Tensor, "batch tokens width"]]]:
    """Collects what the output head reads, call by call: the last layer's hidden states, normalised.

    Asking the model for `output_hidden_states` would keep every layer's; this keeps one.
    """
    seen: list[Float[torch.Tensor, "batch tokens width"]] = []
    head = reasoner.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _gather(
    states: Float[torch.Tensor, "batch tokens width"], chosen: Bool[torch.Tensor, "batch tokens"]
) -> tuple[Float[torch.Tensor, "batch probes width"], Bool[torch.Tensor, "batch probes"]]:
    """The chosen positions' states, moved to the front of each row, and which of them are real."""
    probes = int(chosen.sum(1).max())
    order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)[:, :probes]
    gathered = torch.gather(states, 1, order[..., None].expand(-1, -1, states.shape[-1]))
    return gathered, torch.gather(chosen, 1, order)
