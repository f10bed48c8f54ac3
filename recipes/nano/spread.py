"""How often does a group of completions differ in its mask reward? The same completions, scored by both rewards.

python recipes/nano/spread.py CONFIG.toml --model MODEL [--set KEY=VALUE]… [--groups N]

Draws questions as a stage-2 run with these settings would and samples a group for each. Printed for the dual reward,
for plain Dice, and for plain Dice times the dual reward's slope: how many groups' mask rewards spread by more than
0.05, of all groups and of those in which no mask reaches the Dice from which the dual reward goes by the mask. Both
also among the completions with a mask alone: there no spread is that of the form.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from coreseg.config import GrpoConfig, RewardSettings, load
from coreseg.metrics import dice
from coreseg.model.assemble import load_parts
from coreseg.sam2 import encode_image
from coreseg.train.collate import Draws, Examples
from coreseg.train.grpo import Collator, sample, score
from coreseg.train.samples import MASK_SPREAD

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--groups", type=int, default=200)
    options = parser.parse_args()
    config = load(GrpoConfig, options.config, [*options.set, f"model={options.model}", "out=unused"])
    model, processor = load_parts(config.model)
    model.eval()
    examples, collate = Examples.open(config, "train"), Collator(processor, config.group_size)
    drawn = list(Draws(examples.weights, options.groups, config.seed))
    settings = {"dual": RewardSettings(), "plain": RewardSettings(plain_dice=True)}
    earned: dict[str, list[float]] = {name: [] for name in settings}
    dices, valid, with_mask = [], [], []
    torch.manual_seed(config.seed)
    for start in tqdm(range(0, len(drawn), config.rows), desc="sampling"):
        asked = [examples[each] for each in drawn[start : start + config.rows]]
        prompts = collate(asked)["batch"]
        with torch.no_grad():
            once = encode_image(model.segmenter, prompts.segmenter_pixels)
            maps = [level.repeat_interleave(config.group_size, 0) for level in once]
            completions = sample(model, processor, prompts, maps, config.temperature, config.max_new_tokens)
        for name, reward in settings.items():
            seen, got = score(completions, asked, prompts, processor, replace(config, reward=reward))
            earned[name] += got.segment.tolist()
        dices += [dice(c.mask, c.reference_mask) for c in seen]
        valid += [c.answer is not None for c in seen]
        with_mask += [bool(c.mask.any()) for c in seen]

    groups = {name: np.array(values).reshape(-1, config.group_size) for name, values in earned.items()}
    groups["plain x beta"] = settings["dual"].beta * groups["plain"]
    enough = settings["dual"].dice_from
    misses = np.array(dices) < enough
    missed = misses.reshape(-1, config.group_size).all(axis=1)
    print(
        f"{config.model}: {len(missed)} groups of {config.group_size}; {100 * np.mean(valid):.1f} % of the completions "
        f"valid, mean Dice {np.mean(dices):.3f}, Dice below {enough} in {100 * misses.mean():.1f} %, "
        f"and throughout the group in {100 * missed.mean():.1f} % of the groups"
    )
    without_mask = ~np.array(with_mask).reshape(-1, config.group_size)
    for name, rewards in groups.items():
        for whose, left_out in (("all completions", False), ("those with a mask", without_mask)):
            spread = np.ma.ptp(np.ma.array(rewards, mask=left_out), axis=1).filled(0) > MASK_SPREAD
            among = f"{100 * spread[missed].mean():.1f} %" if missed.any() else "none such"
            print(f"{name}, {whose}: {100 * spread.mean():.1f} % of all groups spread, of those that missed {among}")
