"""Settings of a training run: read from TOML, checked, and saved beside every checkpoint as they were resolved."""

import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from coreseg.errors import ConfigError

Settings = TypeVar("Settings", bound="SftConfig")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Stage 1. Where the paper is silent the values are our choice, usual ones for small vision-language models.

    model: checkpoint folder (or "nano") to start from.      data: data-set folders; all are trained on together.
    out: run folder: checkpoints, logs, sample overlays, the resolved settings.
    steps: optimiser steps.                                   batch_size: rows a device and step.
    accumulation: steps of gradients added up before one optimiser step.
    learning_rate: of LoRA, or of the whole language model where `lora_rank` is 0.
    head_learning_rate: of the adapter and the mask decoder.
    lora_rank, lora_alpha: LoRA on every linear layer of the language model; 0 trains the language model itself.
    text_weight, mask_weight: of the two losses; a mask weight of 0 leaves adapter and segmenter alone.
    train_decoder: whether the mask decoder trains beside the adapter.
    remeasure: change pictures at random and measure boxes and reasoning again on what came out. Only for reasoning by
    the measured describer; text by a teacher would no longer fit its picture.
    attribute_share: share of questions about one of several lesions, where the picture allows.
    absent_share: share of questions about a category of another anatomy, answered by the absent form.
    balance: rows are drawn with weight 1 / (set size) ** balance; 0 draws rows evenly, 1 sets evenly.
    source_weights: a factor on that weight by source, for those that should come more or less often.
    eval_every, save_every, overlay_every: in steps.          eval_samples: validation rows looked at each time.
    """

    model: str
    data: tuple[str, ...]
    out: str
    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    text_weight: float = 1.0
    mask_weight: float = 1.0
    train_decoder: bool = True
    remeasure: bool = False
    attribute_share: float = 0.3
    absent_share: float = 0.05
    balance: float = 0.5
    source_weights: dict[str, float] | None = None
    eval_every: int = 200
    eval_samples: int = 64
    save_every: int = 200
    overlay_every: int = 200
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_every", "save_every", "overlay_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "head_learning_rate"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("text_weight", "mask_weight", "lora_rank", "warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("attribute_share", "absent_share"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(self.precision in ("fp32", "bf16", "fp16"), "precision", self.precision, "fp32, bf16 or fp16")
        _require(bool(self.data), "data", self.data, "at least one data-set folder")


def _require(fine: bool, name: str, got: object, expected: str) -> None:
    if not fine:
        raise ConfigError(f"setting {name} is {got!r}; expected {expected}")


def load(kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a TOML file, then `key=value` overrides (the value in TOML's own notation; bare words are text).

    Paths in the file are taken as written, relative to the working folder. Raises ConfigError for a file that is not
    TOML, for unknown keys (naming the nearest known one), wrong types and values out of range.
    """
    file = Path(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); expected a TOML file of settings") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set steps=100")
        values[key.strip()] = _toml_value(text.strip())
    return build(kind, values, str(file))


def build(kind: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Settings from plain values, each checked against its field's type."""
    import difflib

    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(hints)}"
            raise ConfigError(f"{where}: unknown setting {key!r}; {hint}")
    checked = {key: _as_type(value, hints[key], f"{where}: setting {key!r}") for key, value in values.items()}
    missing = [field.name for field in fields(kind) if field.name in ("model", "data", "out") and field.name not in checked]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; give it in the file or with --set")
    return kind(**checked)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _as_type(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if origin is tuple and isinstance(value, str):
            return (value,)
        if origin in (int, str, bool, dict) and type(value) is origin:
            return value
    raise ConfigError(f"{where} is {value!r}, a {type(value).__name__}; expected {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def save(settings: SftConfig, path: Path) -> None:
    """Write settings as TOML that `load` reads back to the same values."""
    lines = [f"{key} = {_to_toml(value)}" for key, value in asdict(settings).items() if value is not None]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_to_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_to_toml, value)) + "]"
    if isinstance(value, str):
        import json

        return json.dumps(value)
    return repr(value)
