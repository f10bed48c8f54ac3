"""Stage 2, reinforcement learning: GRPO with the adaptive dual-granularity reward, the mask loss alongside.

    one step:  prompts -> G completions each, sampled -> a mask each -> rewards -> advantages within the group
               L = L_policy + beta * KL(policy || start) + mask_weight * L_DiceCE

Read from top to bottom: the run, the rollout (`sample`, `score`), the loss (`policy_loss`), and the trainer that ties
them together. What a mask needs of the image is encoded once an image and step, whatever the number of completions.

Source: CORE-Seg (arXiv 2603.05911), RL-based reasoning exploration and segmentation refinement; GRPO: DeepSeekMath
(arXiv 2402.03300); loss averages as TRL names them: Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476). Our choices
where the paper is silent: the reference is the model that training starts from; completions are sampled from the policy
itself, without the answer grammar; the mask loss acts on every sampled completion that has a `<seg>`, through the
policy's own pass, so that it reaches the language model too. See docs/method.md.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.utils.data import Sampler

from coreseg.config import GrpoConfig
from coreseg.errors import DataError, TrainingError
from coreseg.model.assemble import load_parts
from coreseg.model.core_seg import Boxes, CoreSeg
from coreseg.model.processor import Batch, CoreSegProcessor
from coreseg.sam2 import FeatureMaps, encode_image
from coreseg.train import samples
from coreseg.train.collate import Draws, Example, Examples, stretch_mask
from coreseg.train.losses import dice_ce
from coreseg.train.rewards import Completion, Rewards, rewards
from coreseg.train.trainer import SAMPLES_FOLDER, StageTrainer, check, claim, prepare

NO_SPREAD = 1e-6
"""A group whose rewards deviate by less has nothing to prefer."""
STABILISER = 1e-4
"""Added to a group's standard deviation, as in TRL."""
LARGEST_LOG_RATIO = 20.0
"""Beyond it probabilities are held for as different as this: the exponential of more would overflow."""


def train_grpo(config: GrpoConfig) -> Path:
    """Run stage 2 and return the run folder, which `Segmenter.from_pretrained` opens at once.

    Resumed and refused as `coreseg.train.sft.train_sft`. Raises DataError for data sets without any lesion to train
    on, TrainingError where the loss stops being a number.
    """
    check(config)
    examples, validation = Examples.open(config, "train"), Examples.open(config, "val")
    if not any(sample.boxes for _, sample in examples.rows):
        raise DataError(
            f"no train row of {', '.join(config.data)} has a box: every reward would be the same; add rows with lesions"
        )
    torch.manual_seed(config.seed)
    model, processor = load_parts(config.model)
    prepare(model, config)
    claim(config)
    trainer = GrpoTrainer(
        model=model,
        settings=config,
        processor=processor,
        validation=validation,
        train_dataset=examples,
        data_collator=Collator(processor, config.group_size),
    )
    return trainer.to_the_end()


# --- Rollout ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collator:
    """Examples to prompts, each `group_size` times, and what their completions will be compared with."""

    processor: CoreSegProcessor
    group_size: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One batch: the prompts, and the examples they come from, one a prompt."""
        batch = self.processor([e.image for e in examples], [e.question for e in examples], copies=self.group_size)
        return {"batch": batch, "examples": list(examples)}


@dataclass(frozen=True)
class Completions:
    """What was sampled: ids padded on the right, which of them are real (the end of text is), and the masks.

    `ended`: whether the completion wrote its end of text within the limit. `mask_logits`: None without a `<seg>`.
    """

    ids: Int[torch.Tensor, "batch tokens"]
    real: Bool[torch.Tensor, "batch tokens"]
    ended: Bool[torch.Tensor, " batch"]
    mask_logits: list[Float[torch.Tensor, "_ _"] | None]

    @property
    def written(self) -> list[list[int]]:
        """Each completion's own tokens, without the end of text."""
        lengths = self.real.sum(1) - self.ended.long()
        return [ids[:length] for ids, length in zip(self.ids.tolist(), lengths.tolist(), strict=True)]


def sample(
    model: CoreSeg,
    processor: CoreSegProcessor,
    prompts: Batch,
    maps: FeatureMaps,
    temperature: float,
    max_new_tokens: int,
) -> Completions:
    """One completion of each prompt, sampled from the model itself: no grammar, no top-k, no penalties.

    `maps` are the segmenter's, one a prompt. Another engine may take this function's place, as long as its weights are
    the policy's and the masks come from `CoreSeg.decode`.
    """
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    written = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        reasoner_inputs=prompts.reasoner_inputs,
        segmenter_maps=maps,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        temperature=temperature,
        read_boxes=lambda ids: processor.read_boxes(ids, prompts.frames_wh),
    )
    rows = [ids if len(ids) == max_new_tokens else [*ids, eos] for ids in written.ids]
    lengths = torch.tensor([len(ids) for ids in rows])
    real = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.full(real.shape, pad)
    ids[real] = torch.tensor([token for row in rows for token in row])
    ended = torch.tensor([len(row) < max_new_tokens for row in written.ids])
    place = prompts.input_ids.device
    return Completions(ids.to(place), real.to(place), ended.to(place), written.mask_logits)


def score(
    completions: Completions,
    examples: Sequence[Example],
    prompts: Batch,
    processor: CoreSegProcessor,
    config: GrpoConfig,
) -> tuple[list[Completion], Rewards]:
    """Completions as the rewards see them, in the pictures' own pixels, and the rewards."""
    seen = []
    for row, ids in enumerate(completions.written):
        example = examples[row // config.group_size]
        size_hw = example.image.shape[:2]
        answer = processor.read(processor.decode(ids), prompts.frames_wh[row], size_hw[::-1])
        logits, mask = completions.mask_logits[row], np.zeros(size_hw, bool)
        if answer is not None and answer.found and logits is not None:
            mask = processor.mask_from_logits(logits, size_hw)
        seen.append(Completion(answer, mask, example.answer.boxes, example.mask, example.image))
    return seen, rewards(seen, config.reward)


def group_advantages(
    totals: Float[np.ndarray, " completions"], group_size: int
) -> tuple[Float[torch.Tensor, " completions"], Bool[np.ndarray, " groups"]]:
    """Each reward less its group's mean, over the group's sample standard deviation; and which groups have any spread.

    Groups stand side by side. A group without spread has advantages of 0, so it moves the policy nowhere.
    """
    groups = torch.from_numpy(totals).reshape(-1, group_size)
    spread = groups.std(dim=1, keepdim=True)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (spread + STABILISER)
    has_spread = spread[:, 0] > NO_SPREAD
    return (advantages * has_spread[:, None]).flatten().float(), has_spread.numpy()


@dataclass
class Rollout:
    """What the updates need of one batch of completions; tensors only, so that a checkpoint can hold it.

    old: log-probabilities under the policy that sampled; None until that policy's first pass has given them.
    reference: those under the model that training started from; None without a KL term.
    boxes: the completions' own, as `CoreSeg.decode` wants them; None where they do not prompt the mask decoder.
    """

    ids: Int[torch.Tensor, "batch tokens"]
    real: Bool[torch.Tensor, "batch tokens"]
    counted: Bool[torch.Tensor, "batch tokens"]
    advantages: Float[torch.Tensor, " batch"]
    old: Float[torch.Tensor, "batch tokens"] | None = None
    reference: Float[torch.Tensor, "batch tokens"] | None = None
    boxes: Boxes | None = None


def with_completions(prompts: Batch, rollout: Rollout) -> dict[str, Any]:
    """Prompts and completions as whole rows: what `CoreSeg.forward` wants of them beside the segmenter's picture."""
    inputs = dict(prompts.reasoner_inputs)
    if "mm_token_type_ids" in inputs:  # 0: text
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(rollout.ids)], dim=1)
    return {
        "input_ids": torch.cat([prompts.input_ids, rollout.ids], dim=1),
        "attention_mask": torch.cat([prompts.attention_mask, rollout.real.to(prompts.attention_mask)], dim=1),
        "reasoner_inputs": inputs,
    }


# --- Loss ------------------------------------------------------------------------------------------------------------


def token_log_probs(
    logits: Float[torch.Tensor, "batch tokens vocabulary"],
    ids: Int[torch.Tensor, "batch completion"],
    temperature: float,
) -> tuple[Float[torch.Tensor, "batch completion"], Float[torch.Tensor, "batch completion"]]:
    """Log-probability of each completion token under the tempered policy, and the entropy where it was drawn.

    `logits` are those of whole rows, whose last tokens are the completion. The entropy carries no gradient.
    """
    drawn_from = logits[:, -ids.shape[1] - 1 : -1].float() / temperature
    everything = drawn_from.log_softmax(-1)
    with torch.no_grad():
        entropy = -(everything.exp() * everything).sum(-1)
    return everything.gather(-1, ids[..., None])[..., 0], entropy


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, and what to watch: mean KL a counted token, and the share of counted tokens whose ratio was clipped."""

    loss: Float[torch.Tensor, ""]
    kl: Float[torch.Tensor, ""]
    clipped: Float[torch.Tensor, ""]


def policy_loss(
    log_probs: Float[torch.Tensor, "batch tokens"],
    rollout: Rollout,
    config: GrpoConfig,
    max_new_tokens: int,
    tokens_a_batch: float,
) -> PolicyLoss:
    """The clipped policy-gradient loss with the KL penalty to the reference (k3 estimator), averaged by `loss_type`.

    `tokens_a_batch`: counted tokens of the whole optimiser step, over the batches it is made of; only dapo asks.
    Source: DeepSeekMath eq. 3 and 4; k3: http://joschu.net/blog/kl-approx.html. On the same numbers it equals
    `trl.GRPOTrainer`, its `use_bias_correction_kl` off (tests/train/test_trl.py).
    """
    old = log_probs.detach() if rollout.old is None else rollout.old
    ratio = _held(log_probs - old).exp()
    inside = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    advantages = config.advantage_weight * rollout.advantages[:, None]
    each = -torch.minimum(ratio * advantages, inside * advantages)
    counted = rollout.counted.to(each)
    tokens = counted.sum().clamp(min=1)
    kl = torch.zeros_like(each)
    if rollout.reference is not None:
        gap = _held(rollout.reference - log_probs)
        kl = gap.exp() - gap - 1
    each = (each + config.beta * kl) * counted
    if config.loss_type == "grpo":
        loss = (each.sum(1) / counted.sum(1).clamp(min=1)).mean()
    elif config.loss_type == "dr_grpo":
        loss = each.sum() / (len(each) * max_new_tokens)
    else:
        loss = each.sum() / max(tokens_a_batch, 1.0)
    with torch.no_grad():
        # Only where the clip takes the gradient away.
        low, high = (ratio < 1 - config.clip_low) & (advantages < 0), (ratio > 1 + config.clip_high) & (advantages > 0)
        return PolicyLoss(loss, (kl * counted).sum() / tokens, ((low | high) * counted).sum() / tokens)


def _held(log_ratio: Float[torch.Tensor, "batch tokens"]) -> Float[torch.Tensor, "batch tokens"]:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


# --- Trainer ---------------------------------------------------------------------------------------------------------


class GrpoTrainer(StageTrainer):
    """Rollouts before the optimiser steps that use them, this stage's loss, and rollouts as part of a checkpoint."""

    settings: GrpoConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rollouts: list[Rollout] = []
        model = cast(CoreSeg, self.model)
        # LoRA switched off is the model that training started from; a whole language model needs a copy kept.
        needs_copy = self.settings.beta > 0 and not self.settings.lora_rank
        self._frozen_copy = copy.deepcopy(model.reasoner).requires_grad_(False).eval() if needs_copy else None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The batches of one optimiser step with their rollouts, and the step's counted tokens over all processes.

        Trainer fetches them together, so this is where rollouts are made, and what frozen parts see of the pictures.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        anew = self.state.global_step % self.settings.updates == 0 or not self.rollouts
        for inputs in batches:
            inputs["batch"] = self._looked_at(inputs["batch"].to(self.args.device), inputs["examples"])
            if anew or self.settings.mask_weight > 0:
                with self._timed("masks"):
                    inputs["maps"] = self._maps(inputs["batch"], inputs["examples"])
        if anew:
            self.rollouts = [self._roll_out(number, inputs) for number, inputs in enumerate(batches)]
        counted = torch.tensor(sum(int(rollout.counted.sum()) for rollout in self.rollouts), device=self.args.device)
        together = [inputs | {"rollout": rollout} for inputs, rollout in zip(batches, self.rollouts, strict=True)]
        return together, cast(torch.Tensor, self.accelerator.reduce(counted, "sum"))

    def sample(self, model: CoreSeg, prompts: Batch, maps: FeatureMaps) -> Completions:
        """Completions of these prompts by this run's settings."""
        return sample(model, self.processor, prompts, maps, self.settings.temperature, self._limit(prompts))

    def _limit(self, prompts: Batch) -> int:
        return self.settings.max_new_tokens or max(map(self.processor.grammar.max_tokens, prompts.frames_wh))

    @torch.no_grad()
    def _roll_out(self, number: int, inputs: dict[str, Any]) -> Rollout:
        """Sample, decode the masks, score, and compare within the groups."""
        model, config = cast(CoreSeg, self.accelerator.unwrap_model(self.model)), self.settings
        was_training = model.training
        model.eval()  # type: ignore[no-untyped-call]
        prompts: Batch = inputs["batch"]
        with self._timed("generate"), torch.random.fork_rng(), self.accelerator.autocast():
            # By place in the run, so that a resumed run samples what an uninterrupted one would have sampled.
            torch.manual_seed(hash((config.seed, self.state.global_step, number, self.args.process_index)))
            completions = self.sample(model, prompts, self._for_each(inputs["maps"]))
        with self._timed("rewards"):
            seen, got = score(completions, inputs["examples"], prompts, self.processor, config)
        advantages, has_spread = group_advantages(got.total, config.group_size)
        counted = completions.real
        if config.mask_truncated_completions:
            counted = counted & completions.ended[:, None]
        rollout = Rollout(completions.ids, completions.real, counted, advantages.to(counted.device))
        if model.config.box_prompts:
            rollout.boxes = self.processor.read_boxes(completions.written, prompts.frames_wh)
        if config.beta > 0:
            with self._timed("reference"):
                rollout.reference = self._reference_log_probs(model, with_completions(prompts, rollout), rollout.ids)
        self.note(
            completion_tokens=completions.real.sum(1).float().mean(),
            truncated=1 - completions.ended.float().mean(),
            **samples.figures(seen, got, has_spread, config),
        )
        every = config.samples_every  # the first rollout from then on, which may be some updates later
        at_its_turn = every and self.state.global_step % every < config.updates
        if number == 0 and at_its_turn and self.is_world_process_zero():
            texts = [self.processor.decode(ids) for ids in completions.written[: config.group_size]]
            folder, step = Path(config.out) / SAMPLES_FOLDER, self.state.global_step
            samples.write_page(folder, step, inputs["examples"][0], texts, seen, got)
        model.train(was_training)
        return rollout

    def _reference_log_probs(
        self, model: CoreSeg, rows: dict[str, Any], ids: Int[torch.Tensor, "batch completion"]
    ) -> Float[torch.Tensor, "batch completion"]:
        def log_probs(reasoner: Any) -> Float[torch.Tensor, "batch completion"]:
            with self.accelerator.autocast():  # Trainer does so for the policy's own pass
                logits = reasoner(
                    rows["input_ids"], attention_mask=rows["attention_mask"], **rows["reasoner_inputs"]
                ).logits
            return token_log_probs(logits, ids, self.settings.temperature)[0]

        if self._frozen_copy is not None:
            return log_probs(self._frozen_copy.to(ids.device))
        with model.reasoner.disable_adapter():
            return log_probs(model.reasoner)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Policy, KL and mask loss of one batch of completions."""
        config, rollout = self.settings, cast(Rollout, inputs["rollout"])
        prompts: Batch = inputs["batch"]
        wants_mask = config.mask_weight > 0
        with self._timed("policy"):
            maps = self._for_each(inputs["maps"]) if wants_mask else None
            output = model(
                **with_completions(prompts, rollout),
                segmenter_maps=maps,
                segmenter_boxes=rollout.boxes,
            )
            log_probs, entropy = token_log_probs(output.logits, rollout.ids, config.temperature)
            if rollout.old is None:
                rollout.old = log_probs.detach()  # this very pass is the sampling policy's
            batches = self.args.world_size * self.current_gradient_accumulation_steps
            tokens_a_batch = float(num_items_in_batch or rollout.counted.sum()) / batches
            policy = policy_loss(log_probs, rollout, config, self._limit(prompts), tokens_a_batch)
            loss = policy.loss
            self.note(policy_loss=policy.loss, kl=policy.kl, clipped=policy.clipped)
            self.note(entropy=(entropy * rollout.real).sum() / rollout.real.sum())
            if wants_mask and output.with_mask.any():
                mask_loss = dice_ce(output.mask_logits, self._references(inputs)[output.with_mask])
                # A completion without a `<seg>` counts as one with no mask loss.
                loss = loss + config.mask_weight * mask_loss * output.with_mask.float().mean()
                self.note(mask_loss=mask_loss)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} (policy {policy.loss.item():.4g}, "
                f"KL {policy.kl.item():.4g}); lower learning_rate and start in another `out`; "
                f"the last checkpoint in {config.out} is still good"
            )
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As always, with what the backward pass took."""
        before, started = self._seconds_noted(), time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._synchronise()
        self.note(seconds_backward=time.perf_counter() - started - (self._seconds_noted() - before))
        return loss

    # --- What the model sees, once a picture ---

    def _looked_at(self, prompts: Batch, examples: Sequence[Example]) -> Batch:
        """The prompts, pixels replaced by what nano's tower sees in them (see `looked`)."""
        names = [example.picture for example in examples for _ in range(self.settings.group_size)]
        seen = self.looked(cast(nn.Module, self.model), prompts.reasoner_inputs, names)
        return replace(prompts, reasoner_inputs=seen)

    @torch.no_grad()
    def _maps(self, prompts: Batch, examples: Sequence[Example]) -> FeatureMaps:
        """The image encoder's maps, one a picture."""
        model = cast(CoreSeg, self.accelerator.unwrap_model(self.model))
        kept = self.encoded(model, prompts, [example.picture for example in examples])
        return kept or encode_image(model.segmenter, prompts.segmenter_pixels)

    def _for_each(self, maps: FeatureMaps) -> list[torch.Tensor]:
        """A picture's maps for each of its completions."""
        return [level.repeat_interleave(self.settings.group_size, dim=0) for level in maps]

    def _references(self, inputs: dict[str, Any]) -> Float[torch.Tensor, "batch side side"]:
        side = self.processor.config.segmenter_size_px
        masks = torch.stack([stretch_mask(e.mask, side).float() for e in inputs["examples"]])
        return masks.repeat_interleave(self.settings.group_size, dim=0).to(self.args.device)

    # --- How long it takes ---

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._synchronise()
        self.note(**{f"seconds_{part}": time.perf_counter() - started})

    def _seconds_noted(self) -> float:
        return sum((sum(values) for name, values in self._noted.items() if name.startswith("seconds_")), 0.0)

    def _synchronise(self) -> None:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)

    # --- A run that is stopped in the middle of a rollout ---

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[tuple[int, int]]:
        draws = cast(Draws, super()._get_train_sampler(*args, **kwargs))
        return Repeated(draws, self.rows_a_step, self.settings.updates)

    def _rollout_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollouts-{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save([vars(rollout) for rollout in self.rollouts], self._rollout_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            saved = torch.load(self._rollout_file(checkpoint), weights_only=True, map_location=self.args.device)
            self.rollouts = [Rollout(**rollout) for rollout in saved]


class Repeated(Sampler[tuple[int, int]]):
    """Draws in which each optimiser step's rows come `updates` times, once for every step that uses their rollout."""

    def __init__(self, draws: Draws, rows_a_step: int, updates: int) -> None:
        self.draws = draws
        self.rows_a_step = rows_a_step
        self.updates = updates

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        drawn = iter(self.draws)
        steps = iter(lambda: list(islice(drawn, self.rows_a_step)), [])
        return islice((row for rows in steps for _ in range(self.updates) for row in rows), len(self))
