"""Settings of a training run: read from TOML, checked, and saved beside every checkpoint as they were resolved."""

import difflib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, TypeVar

from coreseg.errors import ConfigError

Settings = TypeVar("Settings")
Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What both stages share. Where the paper is silent the values are our choice, usual ones for small models.

    model: checkpoint folder (or "nano") to start from.      data: data-set folders; all are trained on together.
    out: run folder: checkpoints, logs, sample overlays, the resolved settings.
    steps: optimiser steps.                                   batch_size: rows a device and step.
    cpu_minutes: end after so much processor time of this process, or on a GPU so much time, validation not counted,
    even if steps are left; 0 sets no such limit. For comparisons at equal cost on a machine whose speed changes.
    accumulation: steps of gradients added up before one optimiser step.
    learning_rate: of LoRA, or of the whole language model where `lora_rank` is 0.
    head_learning_rate: of the adapter and the mask decoder.
    lora_rank, lora_alpha: LoRA on every linear layer of the language model; 0 trains the language model itself.
    mask_weight: of the mask loss; 0 leaves adapter and segmenter alone.
    train_decoder: whether the mask decoder trains beside the adapter.
    remeasure: change pictures at random and measure boxes and reasoning again on what came out. Only for reasoning by
    the measured describer; text by a teacher would no longer fit its picture.
    versions: how many changed versions of each picture `remeasure` makes; 0 makes a new one at every draw. With a few,
    what nano's frozen vision tower sees is computed once a version and kept in memory (24 KB each).
    keep_maps: keep the segmenter's feature maps of every version too (1.4 MB each for nano, 44 MB at 1,024 px).
    with_reasoning: whether reference answers hold reasoning; without it texts are short, and boxes are most of them.
    attribute_share: share of questions about one of several lesions, where the picture allows.
    absent_share: share of questions about something that is not there, answered by the absent form: a category that
    `known_absent` names half of the time, else one of another anatomy.
    known_absent: categories that pictures of a category are known not to show, such as {stroke = ["brain tumor"]}.
    filler_share: share of questions with words of no meaning put around and between theirs, for reasoners made from
    scratch, which know no others than our templates'.   typo_share: of those with typing errors.
    own_words: TOML file of questions by category (see `coreseg.questions.read_own_words`); own_words_share: of the
    plain questions, how many are taken from it. Of those about what is not there, only the ones that name it.
    unnamed_share: of the other plain questions, how many name no lesion, or by a word that nobody knows; their answer
    is about the picture's category. Only for categories that share no picture with others.
    leave_out: sources that no row is taken from, for tests on sets that training never saw.
    balance: rows are drawn with weight 1 / (set size) ** balance; 0 draws rows evenly, 1 sets evenly.
    source_weights: a factor on that weight by source, for those that should come more or less often.
    several_weight: another for rows with several lesions.
    warmup_steps: steps in which the learning rates rise; they fall by a cosine after.   weight_decay: of AdamW.
    max_grad_norm: gradients are clipped to this norm; 0 does not clip.
    eval_every, save_every: in steps.          eval_samples: validation rows looked at, and some drawn, each time.
    precision: fp32, bf16 or fp16.                            gradient_checkpointing: less memory for more time.
    workers: processes that load rows; 0 loads them in this one.                         seed: of every draw.
    use_cpu: train on the processor even where there is a GPU.
    """

    model: str
    data: tuple[str, ...]
    out: str
    steps: int = 1000
    cpu_minutes: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    mask_weight: float = 1.0
    train_decoder: bool = True
    remeasure: bool = False
    versions: int = 0
    keep_maps: bool = False
    with_reasoning: bool = True
    attribute_share: float = 0.3
    absent_share: float = 0.05
    known_absent: dict[str, tuple[str, ...]] | None = None
    filler_share: float = 0.0
    typo_share: float = 0.0
    own_words: str | None = None
    own_words_share: float = 0.0
    unnamed_share: float = 0.0
    leave_out: tuple[str, ...] = ()
    balance: float = 0.5
    source_weights: dict[str, float] | None = None
    several_weight: float = 1.0
    eval_every: int = 200
    eval_samples: int = 64
    save_every: int = 200
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    workers: int = 0
    seed: int = 0
    use_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_every", "save_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "head_learning_rate", "lora_alpha", "several_weight"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a number above 0")
        for name in (
            "cpu_minutes", "mask_weight", "lora_rank", "warmup_steps", "weight_decay", "max_grad_norm", "balance",
            "eval_samples", "versions", "workers", "seed",
        ):  # fmt: skip
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in (
            "attribute_share", "absent_share", "filler_share", "typo_share", "own_words_share", "unnamed_share",
        ):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        kept = not self.keep_maps or (self.remeasure and self.versions > 0)
        require(kept, "keep_maps", self.keep_maps, "false where remeasure and versions do not say what to keep")
        require(self.precision in ("fp32", "bf16", "fp16"), "precision", self.precision, "fp32, bf16 or fp16")
        told = self.own_words is not None or self.own_words_share == 0
        require(told, "own_words_share", self.own_words_share, "0 where own_words names no file")
        require(bool(self.data), "data", self.data, "at least one data-set folder")
        for source, weight in (self.source_weights or {}).items():
            require(0 <= weight < math.inf, f"source_weights, {source!r},", weight, "0 or more")

    @property
    def rows(self) -> int:
        """Rows drawn a device and step."""
        return self.batch_size

    @property
    def trains_adapter(self) -> bool:
        """Whether a loss reaches the adapter."""
        return self.mask_weight > 0


@dataclass(frozen=True, kw_only=True)
class SftConfig(StageConfig):
    """Stage 1, with these settings beside the shared ones.

    text_weight: of the text loss, as `mask_weight` of the mask loss.
    box_weight: how much a token of a box's numbers weighs in the text loss, beside 1 for every other token.
    box_spread: in pixels of the reasoner's frame: a box's number may be nearly right, by a normal distribution of this
    deviation; 0 counts the right one alone. For tokenizers of one token a number, such as nano's.
    fresh_adapter: start the adapter anew, centred on the states it will see; for one that no mask loss has trained.
    prompt_weight: of the prompt loss: where one of several lesions is asked for, the adapter is told the mask decoder's
    own prompt for that lesion's box, and where every lesion is, its "any lesion" prompt. For segmenters that know both.
    kind_prompts: a safetensors file of prompts that the decoder has learned, by category: what the adapter is told
    where a category is asked for that pictures show beside others.
    """

    text_weight: float = 1.0
    box_weight: float = 1.0
    box_spread: float = 0.0
    fresh_adapter: bool = False
    prompt_weight: float = 0.0
    kind_prompts: str | None = None

    @property
    def trains_adapter(self) -> bool:
        """Whether a loss reaches the adapter."""
        return super().trains_adapter or self.prompt_weight > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_weight", "prompt_weight"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(0 <= self.box_spread < math.inf, "box_spread", self.box_spread, "0 or more")
        require(0 < self.box_weight < math.inf, "box_weight", self.box_weight, "a number above 0")
        used = self.prompt_weight > 0 or self.kind_prompts is None
        require(used, "kind_prompts", self.kind_prompts, "a prompt_weight above 0 beside it, or nothing")


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Weights of the rewards, and the shape of the segment reward (see `coreseg.train.rewards`).

    format_weight, detect_weight, segment_weight: of the paper's three.
    faithfulness_weight: of the fourth, ours; off by default.
    dice_from: the Dice from which the mask itself is rewarded, rather than its box.
    alpha, beta: the reward is alpha + beta x Dice from there.
    plain_dice: reward Dice alone, at every Dice; the ablation that shows what the second granularity earns.
    """

    format_weight: float = 1.0
    detect_weight: float = 1.0
    segment_weight: float = 1.0
    faithfulness_weight: float = 0.0
    dice_from: float = 0.05
    alpha: float = 1.0
    beta: float = 2.0
    plain_dice: bool = False

    def __post_init__(self) -> None:
        weights = ("format_weight", "detect_weight", "segment_weight", "faithfulness_weight")
        for name in weights:
            require(0 <= getattr(self, name) < math.inf, f"reward.{name}", getattr(self, name), "0 or more")
        rewarded = any(getattr(self, name) for name in weights)
        require(rewarded, "reward", "four weights of 0", "at least one weight above 0")
        require(abs(self.alpha) < math.inf, "reward.alpha", self.alpha, "a number")
        require(0 <= self.beta < math.inf, "reward.beta", self.beta, "0 or more: a better mask never earns less")
        require(0 <= self.dice_from <= 1, "reward.dice_from", self.dice_from, "between 0 and 1")


LOSS_TYPES = ("grpo", "dr_grpo", "dapo")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(StageConfig):
    """Stage 2, with these settings beside the shared ones. `batch_size` counts completions, as in TRL.

    group_size: completions sampled of each prompt, which are compared with each other (4 in the paper's figure).
    temperature: of sampling; log-probabilities are those of the tempered policy.
    max_new_tokens: longest completion; 0 takes the longest answer that the answer grammar allows (not for dr_grpo).
    updates: optimiser steps made with one set of completions; from the second on ratios are clipped.
    clip_low, clip_high: the ratio of new to old probability counts within 1 - clip_low and 1 + clip_high.
    beta: weight of the KL divergence from the model that training starts from; 0 does without that model.
    loss_type: how tokens are averaged. grpo: over a completion's tokens, then over completions; dr_grpo: over
    completions of `max_new_tokens` each, whatever their length; dapo: over all tokens of the optimiser step.
    advantage_weight: factor on the advantages; at 0 rollouts are made but only KL and mask loss act (an ablation).
    mask_truncated_completions: leave completions that hit the length limit out of the policy loss and the KL.
    reward: a table, see `RewardSettings`.
    samples_every: every so many steps, by the next rollout, the completions of one prompt are written out with their
    masks; 0 never.
    """

    learning_rate: float = 1e-5
    head_learning_rate: float = 1e-5
    group_size: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 0
    updates: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    loss_type: str = "grpo"
    advantage_weight: float = 1.0
    mask_truncated_completions: bool = False
    reward: RewardSettings = field(default_factory=RewardSettings)
    samples_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.group_size >= 2, "group_size", self.group_size, "at least 2: a group is compared within itself")
        fits = self.batch_size % self.group_size == 0
        expected = f"a multiple of group_size, {self.group_size}: it counts completions, and groups stay together"
        require(fits, "batch_size", self.batch_size, expected)
        require(self.updates >= 1, "updates", self.updates, "at least 1")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "a number above 0")
        for name in ("max_new_tokens", "clip_high", "beta", "advantage_weight", "samples_every"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "between 0 and 1")
        require(self.loss_type in LOSS_TYPES, "loss_type", self.loss_type, "grpo, dr_grpo or dapo")
        divides = self.loss_type != "dr_grpo" or self.max_new_tokens > 0
        require(divides, "max_new_tokens", self.max_new_tokens, "above 0: dr_grpo divides by it, alike in every step")

    @property
    def rows(self) -> int:
        """Prompts a device and step; each has `group_size` completions."""
        return self.batch_size // self.group_size


def require(fine: bool, name: str, got: object, expected: str) -> None:
    """Raises ConfigError for a setting out of range."""
    if not fine:
        raise ConfigError(f"setting {name} is {got!r}; expected {expected}")


def load(kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a TOML file, then `key=value` overrides (the value in TOML's own notation; bare words are text).

    A file that `extends` another, named from its own folder, has all settings of that one beside and below its own, so
    that runs which differ in little say only that. Other paths are taken as written, relative to the working folder.
    Raises ConfigError for a file that is not TOML, for unknown keys (naming the nearest known one), wrong types and
    values out of range.
    """
    values, where = _read(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set steps=100")
        values[key.strip()] = _toml_value(text.strip())
    return build(kind, values, where)


def _read(file: Path, extending: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """What a file and those that it extends say, and which they are, in words."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); expected a TOML file of settings") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    if (extended := values.pop("extends", None)) is None:
        return values, str(file)
    if not isinstance(extended, str):
        raise ConfigError(f"{file}: extends is {extended!r}; expected the name of a TOML file, from this one's folder")
    extending = (*extending, file.resolve())
    if (below := file.parent / extended).resolve() in extending:
        raise ConfigError(f"{file}: extends {extended!r}, which extends this file in turn; take one of the two out")
    inherited, where = _read(below, extending)
    return inherited | values, f"{file}, extending {where}"


def build(kind: type[Table], values: Mapping[str, Any], where: str) -> Table:
    """Settings from plain values, each checked against its field's type. Raises ConfigError as `load` does.

    A field that would be a word of Python's has an underscore after it: `import_` is [import] in the file.
    """
    hints = {_key(name): hint for name, hint in typing.get_type_hints(kind).items()}
    for key in values:
        if key not in hints:
            if stage := _stage_of(key, kind):
                raise ConfigError(
                    f"{where}: {key!r} is a setting of `coreseg train {stage}`; give the file of this stage"
                )
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(hints)}"
            raise ConfigError(f"{where}: unknown setting {key!r}; {hint}")
    checked = {key: _as_type(value, hints[key], f"{where}: setting {key!r}") for key, value in values.items()}
    needed = [
        _key(each.name)
        for each in fields(typing.cast(Any, kind))
        if each.default is MISSING and each.default_factory is MISSING
    ]
    missing = [name for name in needed if name not in checked]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; give it in the file or with --set")
    return kind(**{f"{key}_" if iskeyword(key) else key: value for key, value in checked.items()})


def _stage_of(key: str, kind: Any) -> str | None:
    """The other stage that knows a setting which this stage does not."""
    stages = {"sft": SftConfig, "grpo": GrpoConfig}
    others = {name: stage for name, stage in stages.items() if kind in stages.values() and stage is not kind}
    return next((name for name, stage in others.items() if key in typing.get_type_hints(stage)), None)


def _key(name: str) -> str:
    return name.removesuffix("_")


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _as_type(value: Any, hint: Any, where: str) -> Any:
    """The value as its field holds it. TOML has lists for tuples, and whole numbers pass for floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option) and isinstance(value, dict):
            return build(typing.cast(Any, option), value, where)
        if option is float and _is_number(value):
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
        if option == tuple[str, ...]:
            items = [value] if isinstance(value, str) else value
            if isinstance(items, list) and all(isinstance(item, str) for item in items):
                return tuple(items)
        if option == dict[str, tuple[str, ...]] and isinstance(value, dict):
            return {key: _as_type(each, tuple[str, ...], f"{where}, {key!r},") for key, each in value.items()}
        if option == dict[str, float] and isinstance(value, dict) and all(map(_is_number, value.values())):
            return {key: float(number) for key, number in value.items()}
    expected = " or ".join(_TYPE_NAMES.get(option, "a table") for option in options if option is not type(None))
    raise ConfigError(f"{where} is {value!r}; expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPE_NAMES: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple[str, ...]: "text or a list of texts",
    dict[str, float]: "a table of numbers, such as {busi = 2.0}",
    dict[str, tuple[str, ...]]: 'a table of lists, such as {stroke = ["tumor"]}',
    RewardSettings: "a table, such as {faithfulness_weight = 0.5}",
}


def save(settings: Any, path: Path) -> None:
    """Write settings as TOML that `load` reads back to the same values; nobody ever reads half of it."""
    lines = [f"{_key(key)} = {_to_toml(value)}" for key, value in asdict(settings).items() if value is not None]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)


def changed(old: Settings, new: Settings) -> list[str]:
    """The names of the settings in which two of a kind differ."""
    return [_key(name) for name in asdict(typing.cast(Any, old)) if getattr(old, name) != getattr(new, name)]


def _to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = [f"{_to_toml(key)} = {_to_toml(item)}" for key, item in value.items() if item is not None]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_to_toml, value)) + "]"
    if isinstance(value, str):
        # JSON's notation, but TOML knows no surrogate pairs and wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
