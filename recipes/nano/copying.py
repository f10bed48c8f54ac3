"""Stage (b): the reasoner learns to write the boxes of the regions it is shown, before it answers of pictures.

    python recipes/nano/copying.py MODEL DATASET… --out RUN --minutes M [--kinds FILE] [--seed S]
    torchrun --nproc-per-node 2 recipes/nano/copying.py …            (two processes: their minutes count together)

Layouts of regions are drawn, always fresh, and shown as the tower shows a picture's, in the grid of a training picture;
the question asks for all of them or for what stands out. A box's first number tells which region is meant, and the
other three follow from it. In half of the answers (--any-order) boxes come in any order, and only the later numbers
count: they can be learned without knowing which region is meant. Where one of several is asked for, its first number
weighs as much as a whole answer, and half of those layouts (--mixed-up) are shown with any region as the largest, the
leftmost and so on: what is asked for must then be looked up, and cannot be worked out from the other regions.

Three runs, each from the one before. The first (--absent 0) asks for what is there. In the second a quarter of the
questions ask for what such a picture does not show, which only its grid tells. In the third most answers (--reasoned)
have a reasoning before the boxes, as all have later on, and questions come in any words (--any-words). A reasoning
states what is shown of the asked region, or of all as one: at random, so that it cannot be worked out from the boxes.
All in one run leaves boxes unlearned (docs/log.md).

Heads, thrown away later, have two states know what was asked for. That before the first word knows what a reasoning
would state, and where absent things are asked for, what is asked for and what the picture shows. Short answers teach
that: beside reasonings, whose wording is chance, none of it was found (docs/log.md). That at `<seg>` knows box and
category; at the end of the third run (--kinds) the adapter learns to say it to the mask decoder: a box for one of
several, for a kind that `kinds.py` learned a prompt for that prompt, else that every lesion is meant.

What must be learned is the same for every picture, and thousands of layouts take the time of a few hundred pictures.
Muon (`coreseg.train.muon`) trains the matrices of the layers: AdamW did not find the look-up of a region by one of its
numbers, nor by what it stands out by, in several times as long (docs/log.md). Our choice throughout.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from absent import NEAR, QUESTIONS
from readiness import SENTENCES_BEFORE
from segmenter import add_budget, draw_weights
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from coreseg.data.build.describe import in_words
from coreseg.data.store import LesionSet
from coreseg.model.assemble import load_parts
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import IGNORED, Batch, CoreSegProcessor
from coreseg.nano.vision import (
    GRID,
    SHOWN_AGAIN,
    STAND_OUTS,
    STATED,
    NanoVisionModel,
    Regions,
    grid_tokens,
    stated_code,
)
from coreseg.questions import Wordings, among_other_words, ask_for_one, clearly_apart, mistyped, read_own_words
from coreseg.sam2 import encode_image
from coreseg.sentences import VALUES, word
from coreseg.statements import count_value
from coreseg.train.collate import of_other_anatomies, side_by_side
from coreseg.train.loop import Budget, join_group, spend
from coreseg.train.sft import Prompts, own_prompts, read_kind_prompts
from coreseg.types import MAX_BOXES, Answer

BATCH = 32
LEARNING_RATE = 2e-3
OTHERS_LEARNING_RATE = 1e-3
FRAME_PX = 256
BOX_WEIGHT = 4.0
FIRST_NUMBER_WEIGHT = 40.0
"""Of the number that tells which of several is meant: about what all else in its answer weighs."""
HEADS_WEIGHT = 0.25
"""Of those at `<seg>`; those before the first word weigh 1."""
LIGHT_MARGIN = 0.3
"""By which the brightest region stands out, in deviations of the picture."""
TEMPLATES = Wordings({}, own_words_share=0.0, unnamed_share=0.0)
ANY_WORDS = Wordings(
    read_own_words(Path(__file__).parent / "own_words" / "shown.toml"),
    own_words_share=QUESTIONS["own_words_share"],
    unnamed_share=QUESTIONS["unnamed_share"],
)
ADAPTER_STEPS = 6000
ADAPTER_DRAWS = 16384


class Picture(NamedTuple):
    """What a training picture shows, and the tokens of its grid, (cells, channels).

    alone: whether no picture shows its category beside another.   absent: categories that it does not show.
    """

    category: str
    modality: str
    anatomy: str
    grid: torch.Tensor
    alone: bool
    absent: Sequence[str]


class Album(NamedTuple):
    """Training pictures of one category, and how likely each is drawn: by the root of its set's size, as elsewhere."""

    pictures: Sequence[Picture]
    weights: np.ndarray

    def draw(self, rng: np.random.Generator) -> Picture:
        """One of them."""
        return self.pictures[int(rng.choice(len(self.pictures), p=self.weights))]


Pictures = dict[str, Album]
"""Training pictures by category."""


@dataclass(frozen=True)
class Layout:
    """Regions of one drawn picture in reading order; boxes are (regions, 4) in px of the reasoner's frame.

    stated: what is stated of each region and, last, of all as one: a value of each kind.
    """

    boxes: np.ndarray
    area: np.ndarray
    colours: np.ndarray
    stated: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Asked:
    """A question about a layout. `kind`: what it asks by, if not for all; in `any_order` all boxes are written.

    stand_outs: which region is shown as each of `STAND_OUTS`, where that is not what it is. stated: what a reasoning
    states, a value a kind.
    """

    picture: Picture
    layout: Layout
    question: str
    answer: Answer
    kind: str | None
    any_order: bool
    stated: Mapping[str, str]
    stand_outs: tuple[int, ...] = ()

    @property
    def for_one(self) -> bool:
        """Whether the answer is one of several."""
        return self.kind in STAND_OUTS and not self.any_order


def draw_layout(rng: np.random.Generator) -> Layout:
    """One to eight regions without specks, which may overlap as the boxes of lesions do."""
    count = int(rng.choice(np.arange(1, MAX_BOXES + 1), p=[0.15, 0.22, 0.19, 0.15, 0.11, 0.08, 0.06, 0.04]))
    usual_px = np.exp(rng.uniform(np.log(6), np.log(110)))
    sides = np.clip(usual_px * np.exp(rng.normal(0, 0.5, (count, 1)) + rng.normal(0, 0.25, (count, 2))), 3, 240)
    corners = rng.uniform(0, FRAME_PX - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).round().astype(int)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2).clip(max=FRAME_PX)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * rng.uniform(0.4, 1.0, count)
    kept = area >= 0.1 * area.max()
    order = np.lexsort((boxes[:, 2], boxes[:, 3], boxes[:, 0], boxes[:, 1]))
    order = order[kept[order]]
    inside = rng.normal(0, 1) + rng.normal(0, 0.6, (count, 1)) + rng.normal(0, 0.15, (count, 3))
    spread, around = np.abs(rng.normal(0.4, 0.2, (count, 3))), rng.normal(0, 0.5) + rng.normal(0, 0.2, (count, 3))
    colours = np.concatenate([inside, spread, around], axis=1)
    stated = [draw_statements(1, rng) for _ in order]
    stated.append(draw_statements(len(order), rng) if len(order) > 1 else stated[0])
    return Layout(boxes[order], area[order] / FRAME_PX**2, colours[order], tuple(stated))


def draw_statements(regions: int, rng: np.random.Generator) -> dict[str, str]:
    """A value of each kind, at random but for the count; some of those that cannot always be measured are missing."""
    missing = {kind for kind in ("shape", "edge", "contrast", "texture") if rng.random() < 0.1}
    stated = {kind: one_of(values, rng) for kind, values in VALUES.items() if kind not in missing}
    return stated | {"count": count_value(regions)}


def regions_of(layouts: list[Layout], features: int) -> Regions:
    """Layouts as the tower measures pictures; features say nothing, and are alike within one picture."""
    places = MAX_BOXES + 1
    there = torch.zeros(len(layouts), places, 1, dtype=torch.bool)
    boxes, colours, area, stated = (torch.zeros(len(layouts), places, size) for size in (4, 9, 1, len(STATED)))
    for row, layout in enumerate(layouts):
        shown = np.s_[row, [*range(len(layout.boxes)), MAX_BOXES]]
        there[shown] = True
        around = np.concatenate([layout.boxes[:, :2].min(0), layout.boxes[:, 2:].max(0)])
        boxes[shown] = torch.from_numpy(np.vstack([layout.boxes, around])).float() / FRAME_PX
        colours[shown] = torch.from_numpy(np.vstack([layout.colours, layout.colours.mean(0)])).float()
        area[shown] = torch.from_numpy(np.append(layout.area, layout.area.sum())).float()[:, None]
        stated[shown] = torch.tensor([stated_code(values) for values in layout.stated])
    alike = torch.randn(len(layouts), 1, 2, features) + 0.5 * torch.randn(len(layouts), places, 2, features)
    return Regions(there, boxes, colours, functional.normalize(alike, dim=-1).flatten(2), area, stated)


@torch.no_grad()
def look_at(model: CoreSeg, processor: CoreSegProcessor, sets: list[LesionSet]) -> Pictures:
    """What all training pictures with a lesion show, and their grids."""
    tower = model.reasoner.model.vision_tower.eval()
    rows = [(lesions, sample) for lesions in sets for sample in lesions.split("train") if sample.boxes]
    beside, known = side_by_side(rows), sorted({(sample.anatomy, sample.category) for _, sample in rows})
    pictures = defaultdict[str, list[Picture]](list)
    sources = defaultdict[str, list[str]](list)
    for lesions, sample in tqdm(rows, desc="pictures"):
        pixels = processor.segmenter_pixels(lesions.image(sample)).contiguous(memory_format=torch.channels_last)
        grid = grid_tokens(encode_image(tower.segmenter, pixels))[0].half()
        alone, absent = sample.category not in beside, of_other_anatomies(sample.anatomy, known)
        shown = Picture(sample.category, sample.modality, sample.anatomy, grid, alone, absent)
        pictures[sample.category].append(shown)
        sources[sample.category].append(sample.source)
    return {category: Album(pictures[category], draw_weights(sources[category])) for category in sorted(pictures)}


def clear_kinds(layout: Layout) -> dict[str, int]:
    """What stands out by the margins of `coreseg.questions.attribute_questions`, and which region it is."""
    if len(layout.boxes) < 2:
        return {}
    centres, light = layout.boxes.reshape(-1, 2, 2).mean(1), layout.colours[:, :3].mean(1)
    return clearly_apart(layout.boxes, centres, layout.area, light, LIGHT_MARGIN, (FRAME_PX, FRAME_PX))


def draw_question(
    pictures: Pictures,
    rng: np.random.Generator,
    any_order: float = 0.0,
    mixed_up: float = 0.0,
    reasoned: bool = False,
    absent: float = 0.0,
    any_words: bool = False,
    categories: list[str] | None = None,
) -> Asked:
    """A layout in the place of a picture's lesions, and a question about all of it or about what stands out.

    absent: share of questions for what the picture does not show.   categories: of `pictures`, all where not given.
    any_words: ask in people's own words too, without names, and with typing errors.
    """
    wordings = ANY_WORDS if any_words else TEMPLATES

    def asked(question: str) -> str:
        question = among_other_words(question, rng) if rng.random() < 0.3 else question
        return mistyped(question, rng) if any_words and rng.random() < QUESTIONS["typo_share"] else question

    layout = draw_layout(rng)
    category = one_of(categories or list(pictures), rng)
    picture = pictures[category].draw(rng)
    if rng.random() < absent:
        near = NEAR.get(category)
        category = near if near and rng.random() < 0.5 else one_of(picture.absent, rng)
        question, nothing = asked(wordings.ask(category, rng, there=False)), {"count": "none"}
        text = in_words(nothing, picture.modality, picture.anatomy, category, rng) if reasoned else ""
        answer = Answer(category, (), text, found=False)
        return Asked(picture, layout, question, answer, "absent", any_order=False, stated=nothing)
    kind, question, shown_as = None, wordings.ask(category, rng, alone=picture.alone), ()
    numbers, stated = list(range(len(layout.boxes))), layout.stated[-1]
    if (kinds := clear_kinds(layout)) and rng.random() < 0.75:
        kind = one_of(list(kinds), rng)
        one = kinds[kind]
        if all_but := kind in ("largest", "smallest") and len(numbers) > 2 and rng.random() < 0.2:
            kind = f"all but {kind}"
        elif rng.random() < mixed_up:
            shown_as = tuple(rng.integers(len(numbers), size=len(STAND_OUTS)).tolist())
            one = shown_as[STAND_OUTS.index(kind)]
        question = ask_for_one(kind, category, rng)
        numbers = [number for number in numbers if (number != one) == all_but]
        stated = stated | {"count": count_value(len(numbers))} if all_but else layout.stated[one]
    question = asked(question)
    shuffled = bool(rng.random() < any_order)
    if shuffled:
        numbers = rng.permutation(len(layout.boxes)).tolist()
    boxes = tuple(tuple(layout.boxes[number].tolist()) for number in numbers)
    reasoning = in_words(stated, picture.modality, picture.anatomy, category, rng) if reasoned else ""
    answer = Answer(category, boxes, reasoning, found=True)
    return Asked(picture, layout, question, answer, kind, shuffled, stated, shown_as)


def one_of(things: Sequence[Any], rng: np.random.Generator) -> Any:
    """One of several, each as likely as the others."""
    return things[int(rng.integers(len(things)))]


class Copier(nn.Module):
    """The reasoner, and heads: what was asked for, off the state at `<seg>`; what is asked for, what kind of picture it
    is and what may be stated, off the one before the first word."""

    def __init__(self, model: CoreSeg, categories: int) -> None:
        super().__init__()
        width = model.reasoner.config.text_config.hidden_size
        self.reasoner = model.reasoner
        self.places = nn.Linear(width, 4 * (FRAME_PX + 1))
        self.category = nn.Linear(width, categories)
        self.asked, self.shown = nn.Linear(width, categories), nn.Linear(width, categories)
        self.stated = nn.Linear(width, len(STATED))


def show(tower: NanoVisionModel, asked: list[Asked]) -> torch.Tensor:
    """The image tokens of layouts, in the grids of their pictures."""
    features, kinds = tower.config.segmenter_config.vision_config.fpn_hidden_size, len(SHOWN_AGAIN)
    grids = torch.stack([each.picture.grid for each in asked]).float()
    tokens = tower.tokens(grids, regions_of([each.layout for each in asked], features))
    for row, each in enumerate(asked):
        if each.stand_outs:
            again = GRID**2 + MAX_BOXES + torch.arange(len(STAND_OUTS))
            tokens[row, again, :-kinds] = tokens[row, GRID**2 + torch.tensor(each.stand_outs), :-kinds]
    return tokens


def telling_tokens(processor: CoreSegProcessor) -> torch.Tensor:
    """The tokens of "Yes" and "No", and of words that state few values, and so tell one from another."""
    rng, values = np.random.default_rng(0), Counter[int]()
    for kind, value in STATED:
        values.update(set(tokens_of("".join(f" {word(kind, value, rng)}" for _ in range(30)), processor)))
    telling = {token for token, count in values.items() if count <= 2} | set(tokens_of(" Yes No", processor))
    return torch.tensor(sorted(telling))


def tokens_of(text: str, processor: CoreSegProcessor) -> list[int]:
    """A text's tokens."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def token_weights(asked: list[Asked], batch: Batch, telling: torch.Tensor, stop: int) -> torch.Tensor:
    """How much each answer token counts, (rows, tokens). `stop`: the token of ".", which ends a sentence."""
    weights = torch.where(batch.of_boxes, BOX_WEIGHT, 1.0) * (batch.labels != IGNORED)
    for row, each in enumerate(asked):
        numbers = torch.nonzero(batch.of_boxes[row])[:, 0]
        if each.answer.reasoning:
            stated = (batch.labels[row] == stop).cumsum(0) >= SENTENCES_BEFORE
            weights[row, stated & torch.isin(batch.labels[row], telling)] = BOX_WEIGHT
        if each.any_order:
            weights[row] = 0
            weights[row, numbers] = BOX_WEIGHT
            weights[row, numbers[::4]] = 0
        elif each.for_one:
            weights[row, numbers[0]] = FIRST_NUMBER_WEIGHT
    return weights


def batch_of(processor: CoreSegProcessor, tower: NanoVisionModel, asked: list[Asked]) -> Batch:
    """Model inputs and labels; the pictures that the processor needs are blank, and not looked at."""
    blank = np.zeros((FRAME_PX, FRAME_PX, 3), dtype=np.uint8)
    batch = processor([blank] * len(asked), [each.question for each in asked], [each.answer for each in asked])
    return replace(batch, reasoner_inputs={"pixel_values": show(tower, asked)})


def last_states(reasoner: nn.Module, batch: Batch) -> torch.Tensor:
    """The last hidden states, (rows, tokens, width); in bfloat16 inside where the processor can.

    There it takes half of the time; where it can not, three (AVX-512 without it) to fifty times as long (AVX2).
    """
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
        states: torch.Tensor = reasoner.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.reasoner_inputs
        ).last_hidden_state
    return states.float()


def train(
    model: CoreSeg, processor: CoreSegProcessor, pictures: Pictures, rank: int, options: argparse.Namespace
) -> None:
    """Spend the budget; the averaged reasoner takes the place of the model's own."""
    categories = list(pictures)
    model.requires_grad_(False)
    copier = Copier(model, len(categories))
    copier.requires_grad_(True)
    copier.reasoner.model.vision_tower.requires_grad_(False)
    tower = model.reasoner.model.vision_tower
    telling, stop = telling_tokens(processor), tokens_of(".", processor)[-1]

    def loss_of(copier: Copier, step: int) -> torch.Tensor:
        copier.reasoner.model.vision_tower.eval()
        rng = np.random.default_rng((options.seed, step, rank))
        torch.manual_seed(int(rng.integers(2**63)))
        # Rows with a reasoning are twice as long, so they come together; none of them counts in part.
        reasoned = bool(rng.random() < options.reasoned)
        any_order = 0.0 if reasoned else options.any_order
        asked = [
            draw_question(pictures, rng, any_order, options.mixed_up, reasoned, options.absent, options.any_words)
            for _ in range(BATCH)
        ]
        batch = batch_of(processor, tower, asked)
        states, targets = last_states(copier.reasoner, batch), batch.labels[:, 1:]
        answers = targets != IGNORED
        each = functional.cross_entropy(
            copier.reasoner.lm_head(states[:, :-1][answers]), targets[answers], reduction="none"
        )
        weights = token_weights(asked, batch, telling, stop)[:, 1:]
        loss = (each * weights[answers]).sum() / (100 * BATCH)
        true = torch.tensor([stated_code(each.stated) for each in asked])
        before = states[torch.arange(BATCH), answers.int().argmax(1)]
        wrong = functional.binary_cross_entropy_with_logits(copier.stated(before), true, reduction="none")
        loss = loss + wrong.sum(1).mean()
        named = torch.tensor([categories.index(each.answer.category) for each in asked])
        if options.absent:
            shown = torch.tensor([categories.index(each.picture.category) for each in asked])
            loss = loss + functional.cross_entropy(copier.asked(before), named)
            loss = loss + functional.cross_entropy(copier.shown(before), shown)
        at_seg = states[model.probe_positions(batch.input_ids)]
        found = [each.answer.found for each in asked]
        loss = loss + HEADS_WEIGHT * functional.cross_entropy(copier.category(at_seg), named[found])
        asked = [each for each in asked if each.answer.found]
        ones = [row for row, each in enumerate(asked) if each.for_one]
        if ones:
            wanted = torch.tensor([asked[row].answer.boxes[0] for row in ones])
            read = copier.places(at_seg[torch.tensor(ones)]).view(len(ones), 4, FRAME_PX + 1)
            loss = loss + HEADS_WEIGHT * functional.cross_entropy(read.transpose(1, 2), wanted)
        return loss

    matrices = {p for p in copier.reasoner.model.language_model.layers.parameters() if p.ndim == 2}
    trained = [p for p in copier.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in matrices], "lr": OTHERS_LEARNING_RATE},
        {"params": [p for p in trained if p in matrices], "lr": LEARNING_RATE, "muon": True},
    ]
    budget = Budget(options.steps, options.minutes)
    averaged, _ = spend(budget, copier, groups, loss_of, options.out, description="copying")
    model.reasoner.load_state_dict(averaged.reasoner.state_dict())


@torch.no_grad()
def states_and_prompts(
    model: CoreSeg, processor: CoreSegProcessor, pictures: Pictures, kinds: Prompts, draws: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """States at `<seg>`, the prompts for what was asked, and that: "one" of several, "every" one, or a kind's name."""
    rng, tower = np.random.default_rng(seed), model.reasoner.model.vision_tower
    torch.manual_seed(seed)
    often = list(pictures) + list(kinds) * (len(pictures) // len(kinds))
    states: list[torch.Tensor] = []
    prompts: list[torch.Tensor] = []
    asks: list[str] = []
    for number in tqdm(range(draws // BATCH), desc="states"):
        asked = [
            draw_question(pictures, rng, reasoned=number % 2 == 0, any_words=True, categories=often)
            for _ in range(BATCH)
        ]
        asked = [each for each in asked if each.kind is None or each.for_one]
        batch = batch_of(processor, tower, asked)
        states.append(last_states(model.reasoner, batch)[model.probe_positions(batch.input_ids)])
        named = ["one" if each.for_one else each.answer.category for each in asked]
        named = [ask if ask == "one" or ask in kinds else "every" for ask in named]
        prompts.append(own_prompts(model, batch, named, kinds))
        asks += named
    return torch.cat(states), torch.cat(prompts), asks


def fit_adapter(model: CoreSeg, processor: CoreSegProcessor, pictures: Pictures, kinds: Prompts, seed: int) -> None:
    """The adapter learns to turn the state at `<seg>` into the prompt for what was asked."""
    model.requires_grad_(False).eval()
    states, prompts, asks = states_and_prompts(model, processor, pictures, kinds, ADAPTER_DRAWS, seed)
    model.adapter.requires_grad_(True)
    model.restart_adapter(states)
    held_out = len(states) // 10
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ADAPTER_STEPS)
    generator = torch.Generator().manual_seed(seed)

    def said(rows: torch.Tensor | slice) -> torch.Tensor:
        there = torch.ones(len(states[rows]), 1, dtype=torch.bool)
        return model.adapter(states[rows][:, None], there)

    for _ in tqdm(range(ADAPTER_STEPS), desc="adapter"):
        rows = torch.randint(held_out, len(states), (64,), generator=generator)
        functional.mse_loss(said(rows), prompts[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        far = (said(slice(held_out)) - prompts[:held_out]).square().mean((1, 2)).sqrt()
    for kind in ("one", "every", *kinds):
        rows = torch.tensor([asked == kind for asked in asks[:held_out]])
        print(f"from the prompt for {kind}: {far[rows].mean():.3f}")


@torch.no_grad()
def read_back(model: CoreSeg, processor: CoreSegProcessor, pictures: Pictures) -> None:
    """Print what is written of fresh layouts, given the right answer so far: numbers within 4 px, by what was asked.

    First of answers without reasoning, then of those with one; after a right reasoning the first number is half said.
    """
    rng, tower = np.random.default_rng(12345), model.reasoner.model.vision_tower
    torch.manual_seed(0)
    right: dict[tuple[bool, str], list[list[bool]]] = {}
    for number in range(24):
        reasoned = number >= 12
        asked = [draw_question(pictures, rng, reasoned=reasoned) for _ in range(BATCH)]
        batch = batch_of(processor, tower, asked)
        states = last_states(model.reasoner, batch)
        for row, each in enumerate(asked):
            places = torch.nonzero(batch.of_boxes[row])[:4, 0]
            written = [
                processor.tokenizer.decode([token])
                for token in model.reasoner.lm_head(states[row, places - 1]).argmax(-1).tolist()
            ]
            near = [
                text.strip().isdigit() and abs(int(text) - number) <= 4
                for text, number in zip(written, each.answer.boxes[0], strict=True)
            ]
            right.setdefault((reasoned, each.kind or "plain"), []).append(near)
    for (reasoned, kind), near in sorted(right.items()):
        shares = " ".join(f"{share:4.0f}" for share in 100 * np.mean(near, axis=0))
        print(f"{'reasoned' if reasoned else 'short':9}{kind:16} {len(near):4} questions: {shares}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a CORE-Seg checkpoint with nano's tower")
    parser.add_argument("datasets", type=Path, nargs="+", help="whose categories are asked for")
    parser.add_argument(
        "--kinds",
        type=Path,
        metavar="FILE",
        help="the prompts that kinds.py learned: fit the adapter, which the budget does not count",
    )
    add_budget(parser)
    parser.add_argument("--any-order", type=float, default=0.5, metavar="SHARE", help="of answers in any order")
    parser.add_argument(
        "--mixed-up",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of questions for one, with what stands out at random",
    )
    parser.add_argument(
        "--absent", type=float, default=0.25, metavar="SHARE", help="of questions for what the picture does not show"
    )
    parser.add_argument("--reasoned", type=float, default=0.0, metavar="SHARE", help="of batches with a reasoning")
    parser.add_argument(
        "--any-words",
        action="store_true",
        help="ask in people's own words too, without names, and with typing errors, not by templates alone",
    )
    options = parser.parse_args()
    rank = join_group()
    torch.manual_seed(options.seed)
    model, processor = load_parts(options.model)
    sets = [LesionSet.open(path) for path in options.datasets]
    pictures = look_at(model, processor, sets)
    train(model, processor, pictures, rank, options)
    if rank == 0:
        read_back(model, processor, pictures)
        if options.kinds:
            fit_adapter(model, processor, pictures, read_kind_prompts(options.kinds, model.segmenter), options.seed)
        model.save_pretrained(options.out / "model")
        processor.save_pretrained(options.out / "model")
