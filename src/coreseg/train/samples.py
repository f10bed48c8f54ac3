"""What people look at during stage 2: figures of each rollout, and pages of sampled completions with their masks."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from coreseg.config import GrpoConfig
from coreseg.imaging import overlay
from coreseg.train.collate import Example
from coreseg.train.rewards import Completion, Rewards
from coreseg.train.trainer import SAMPLES_FILE, sheet

MASK_SPREAD = 0.05
"""A group's segment rewards, weighted, must differ by more for the masks to teach anything."""


def figures(
    seen: Sequence[Completion], got: Rewards, has_spread: Bool[np.ndarray, " groups"], config: GrpoConfig
) -> dict[str, float]:
    """Means over a rollout: of each reward, and of what drifts when a model learns to please the reward only."""
    of_masks = config.reward.segment_weight * got.segment.reshape(-1, config.group_size)
    boxes = [len(c.answer.boxes) for c in seen if c.answer is not None]
    return {
        "reward": float(got.total.mean()),
        **{f"reward_{name}": float(values.mean()) for name, values in asdict(got).items() if name != "total"},
        "valid": float(np.mean([c.answer is not None for c in seen])),
        "zero_variance": 1 - float(has_spread.mean()),
        "mask_spread": float((np.ptp(of_masks, axis=1) > MASK_SPREAD).mean()),
        "boxes": float(np.mean(boxes)) if boxes else 0.0,
        "mask_share": float(np.mean([c.mask.mean() for c in seen])),
    }


def write_page(
    folder: Path, step: int, example: Example, texts: Sequence[str], seen: Sequence[Completion], got: Rewards
) -> None:
    """One question's completions: `step-N.md` with a table and `step-N.png` with the masks, and a line of JSON.

    `texts` has one completion each of the first rows of `seen` and `got`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{step:06d}"
    rewards = [{key: round(float(values[row]), 3) for key, values in asdict(got).items()} for row in range(len(texts))]
    panels = []
    for completion in seen[: len(texts)]:
        boxes = np.array(completion.answer.boxes if completion.answer else (), dtype=np.int64).reshape(-1, 4)
        panels.append(overlay(example.image, completion.mask, boxes, reference=example.mask))
    sheet(panels).save(folder / f"{name}.png")
    lines = [f"# Step {step}: {example.question}", "", f"![masks]({name}.png)", ""]
    lines += ["| " + " | ".join([*rewards[0], "completion"]) + " |", "|---" * (len(rewards[0]) + 1) + "|"]
    for text, each in zip(texts, rewards, strict=True):
        shown = text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
        lines.append("| " + " | ".join([*map(str, each.values()), shown]) + " |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    line = {"step": step, "question": example.question, "completions": list(texts), "rewards": rewards}
    with (folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
