"""The joined model: one path to the mask, the same in training, inference and evaluation."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from coreseg.answer import parse
from coreseg.errors import InputError
from coreseg.model.assemble import freeze_all_but_heads
from coreseg.model.core_seg import CoreSeg, CoreSegConfig, Generation, TrainingOutput
from coreseg.model.processor import IGNORED, Batch
from coreseg.sam2 import box_prompts, decode_masks, encode_image
from coreseg.segmenter import Segmenter
from coreseg.types import Answer

HOSTILE_WORDS = (
    "<seg>",
    "</answer>",
    "<think>",
    "<|im_end|>",
    "[[1, 2",
    "]]. The mask is",
    "No cyst",
    "\n",
    "\U0001f9e0",
)
ANSWERS = [
    Answer("cyst", ((3, 4, 20, 30), (40, 1, 71, 50)), "Two of them, both dark.", found=True),
    Answer("nodule", ((0, 0, 40, 96),), "One.", found=True),
    Answer("polyp", (), "Nothing.", found=False),
]


def generate(
    segmenter: Segmenter,
    batch: Batch,
    constrained: bool = True,
    temperature: float = 0.0,
    openings: Sequence[Sequence[int]] = (),
) -> Generation:
    return segmenter.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        reasoner_inputs=batch.reasoner_inputs,
        segmenter_pixels=batch.segmenter_pixels,
        max_new_tokens=max(segmenter.processor.grammar.max_tokens(frame) for frame in batch.frames_wh),
        eos_token_id=segmenter.processor.tokenizer.eos_token_id,
        pad_token_id=segmenter.processor.tokenizer.pad_token_id,
        constraint=segmenter.processor.constraint(batch.frames_wh, openings) if constrained else None,
        temperature=temperature,
        read_boxes=partial(segmenter.processor.read_boxes, frames_wh=batch.frames_wh),
    )


@torch.no_grad()
def forward(model: CoreSeg, batch: Batch) -> TrainingOutput:
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        reasoner_inputs=batch.reasoner_inputs,
        segmenter_pixels=batch.segmenter_pixels,
        segmenter_boxes=batch.segmenter_boxes,
    )


def with_completion(segmenter: Segmenter, batch: Batch, completions: list[list[int]]) -> Batch:
    """The prompts followed by what was written, padded on the left anew."""
    pad = segmenter.processor.tokenizer.pad_token_id
    rows = [
        ids[mask.bool()].tolist() + completion
        for ids, mask, completion in zip(batch.input_ids, batch.attention_mask, completions, strict=True)
    ]
    longest = max(map(len, rows))
    inputs = dict(batch.reasoner_inputs)
    if "mm_token_type_ids" in inputs:
        kinds = [k[m.bool()].tolist() for k, m in zip(inputs["mm_token_type_ids"], batch.attention_mask, strict=True)]
        inputs["mm_token_type_ids"] = torch.tensor(
            [
                [0] * (longest - len(row)) + kind + [0] * (len(row) - len(kind))
                for row, kind in zip(rows, kinds, strict=True)
            ]
        )
    return Batch(
        input_ids=torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        labels=torch.zeros((len(rows), longest), dtype=torch.long),
        of_boxes=torch.zeros((len(rows), longest), dtype=torch.bool),
        reasoner_inputs=inputs,
        segmenter_pixels=batch.segmenter_pixels,
        frames_wh=batch.frames_wh,
        segmenter_boxes=segmenter.processor.read_boxes(completions, batch.frames_wh),
    )


def found_generation(segmenter: Segmenter, batch: Batch, openings: Sequence[Sequence[int]] = ()) -> Generation:
    """A sampled batch in which at least two rows have a mask."""
    for seed in range(20):
        torch.manual_seed(seed)
        generation = generate(segmenter, batch, temperature=1.0, openings=openings)
        if sum(logits is not None for logits in generation.mask_logits) >= 2:
            return generation
    raise AssertionError("no sample had two masks")


@pytest.mark.parametrize("box_prompts", [False, True])
@pytest.mark.parametrize("probe", ["seg", "answer"])
def test_states_kept_from_generation_equal_a_full_pass(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str], probe: str, box_prompts: bool
) -> None:
    segmenter.model.config.probe, segmenter.model.config.box_prompts = probe, box_prompts
    try:
        batch = segmenter.processor(pictures, questions)
        generation = found_generation(segmenter, batch)
        output = forward(segmenter.model, with_completion(segmenter, batch, generation.ids))
    finally:
        segmenter.model.config.probe, segmenter.model.config.box_prompts = "seg", False
    kept = [logits for logits in generation.mask_logits if logits is not None]
    assert output.with_mask.tolist() == [logits is not None for logits in generation.mask_logits]
    torch.testing.assert_close(torch.stack(kept), output.mask_logits, atol=1e-4, rtol=1e-4)
    assert (kept[0] - kept[1]).abs().max() > 1e-2, "the comparison could not fail"


def test_the_state_depends_on_the_question(segmenter: Segmenter, pictures: list[np.ndarray]) -> None:
    """The same picture and answer after two questions: only the state at `<seg>` can tell them apart."""
    masks = [
        forward(segmenter.model, segmenter.processor(pictures[:1], [q], ANSWERS[:1])).mask_logits
        for q in ("Where is the cyst?", "Segment the brain tumor on the left.")
    ]
    assert (masks[0] - masks[1]).abs().max() > 1e-3


def test_a_batch_answers_as_its_rows_do(segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]) -> None:
    together = segmenter.segment_batch(pictures, questions)
    for picture, question, result in zip(pictures, questions, together, strict=True):
        alone = segmenter.segment(picture, question)
        assert result.text == alone.text
        assert np.mean(result.mask != alone.mask) < 0.002, "but for pixels on the threshold"
        assert np.array_equal(result.boxes, alone.boxes)


def test_constrained_answers_are_valid_and_masks_fit_their_pictures(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]
) -> None:
    for picture, result in zip(pictures, segmenter.segment_batch(pictures, questions), strict=True):
        height, width = picture.shape[:2]
        assert result.valid and result.reasoning and result.answer
        assert result.mask.shape == (height, width) and result.mask.dtype == bool
        assert result.found == bool(len(result.boxes))
        for x1, y1, x2, y2 in result.boxes:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


REASONINGS = ["Two of them lie on the left, both dark.", "", "It is round < and \U0001f9e0 bright."]


def test_its_own_reasoning_gives_the_same_answer_again(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]
) -> None:
    own = segmenter.segment_batch(pictures, questions)
    again = segmenter.segment_batch(pictures, questions, reasoning=[result.reasoning for result in own])
    for first, second in zip(own, again, strict=True):
        assert first.reasoning and second.text == first.text
        assert np.array_equal(first.mask, second.mask) and np.array_equal(first.boxes, second.boxes)


@pytest.mark.parametrize("probe", ["seg", "answer"])
def test_a_given_reasoning_stands_where_training_has_it(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str], probe: str
) -> None:
    """What follows a given reasoning, mask included, is what a teacher-forced pass over the whole answer gives."""
    openings = [segmenter.processor.opening(text) for text in REASONINGS]
    segmenter.model.config.probe = probe
    try:
        batch = segmenter.processor(pictures, questions)
        generation = found_generation(segmenter, batch, openings)
        output = forward(segmenter.model, with_completion(segmenter, batch, generation.ids))
    finally:
        segmenter.model.config.probe = "seg"
    for ids, opening, reasoning in zip(generation.ids, openings, REASONINGS, strict=True):
        answer = parse(segmenter.processor.decode(ids))
        assert answer is not None and answer.reasoning == reasoning
        assert ids[: len(opening)] == opening == segmenter.processor.encode_answer(answer)[: len(opening)]
    kept = [logits for logits in generation.mask_logits if logits is not None]
    torch.testing.assert_close(torch.stack(kept), output.mask_logits, atol=1e-4, rtol=1e-4)


def test_without_the_grammar_a_given_reasoning_is_gone_on_from(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]
) -> None:
    """The same words as when the reasoning stands in the prompt."""
    batch = segmenter.processor(pictures, questions)
    openings = [segmenter.processor.opening(text) for text in REASONINGS]
    in_prompt = generate(segmenter, with_completion(segmenter, batch, openings), constrained=False)
    for result, opening, ids in zip(
        segmenter.segment_batch(pictures, questions, constrained=False, reasoning=REASONINGS),
        openings,
        in_prompt.ids,
        strict=True,
    ):
        whole = segmenter.processor.decode(opening + ids)
        assert len(ids) > 5 and result.text[: len(whole)] == whole[: len(result.text)]
        assert not result.valid, "it has learnt nothing"


def test_the_mask_hears_the_reasoning(nano: Segmenter, pictures: list[np.ndarray]) -> None:
    masks = [
        nano.segment_batch(pictures[:1], ["Where is the cyst?"], reasoning=[reasoning])[0]
        for reasoning in ("Left.", "Two round spots on the right side, brighter than their surroundings.")
    ]
    assert all(result.found for result in masks)
    assert not np.array_equal(masks[0].mask, masks[1].mask)


def test_a_reasoning_longer_than_the_budget_leaves_room_for_the_answer(
    nano: Segmenter, pictures: list[np.ndarray]
) -> None:
    long = " ".join(["and so on"] * 100)
    (result,) = nano.segment_batch(pictures[:1], ["Where is the cyst?"], reasoning=[f" {long} "])
    assert result.valid and result.reasoning == long


def test_reasonings_that_cannot_be_given_are_refused(nano: Segmenter, pictures: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="1 pictures and 2 reasonings"):
        nano.segment_batch(pictures[:1], ["Where?"], reasoning=["One.", "Two."])
    for marker in ("<seg>", "</think>", "<answer>"):
        with pytest.raises(InputError, match=marker):
            nano.segment_batch(pictures[:1], ["Where?"], reasoning=[f"Here {marker} it is."])


def test_an_invalid_answer_has_an_empty_mask(segmenter: Segmenter, pictures: list[np.ndarray]) -> None:
    result = segmenter.segment(pictures[0], "Where is the cyst?", constrained=False)
    assert not result.valid and not result.found and not result.mask.any() and result.answer == ""


@pytest.mark.parametrize("question", ["", " \n", "x" * 2001])
def test_questions_that_are_none_are_refused(nano: Segmenter, pictures: list[np.ndarray], question: str) -> None:
    with pytest.raises(InputError, match="question"):
        nano.segment(pictures[0], question)


@torch.no_grad()
def test_train_and_eval_mode_decode_alike(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]
) -> None:
    model = copy.deepcopy(segmenter.model)
    freeze_all_but_heads(model)
    batch = segmenter.processor(pictures, questions, ANSWERS)
    in_eval = forward(model.eval(), batch)
    in_train = forward(model.train(), batch)
    torch.testing.assert_close(in_train.mask_logits, in_eval.mask_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(in_train.logits, in_eval.logits, atol=1e-5, rtol=1e-4)


def test_frozen_parts_stay_in_eval_mode(segmenter: Segmenter) -> None:
    model = copy.deepcopy(segmenter.model)
    freeze_all_but_heads(model)
    model.train()
    assert not model.segmenter.vision_encoder.training
    assert all(not module.training for module in model.segmenter.vision_encoder.modules())
    assert model.adapter.training and model.segmenter.mask_decoder.training
    assert all(not module.training for module in model.eval().modules())


def test_rows_without_a_marker_have_no_mask(
    segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]
) -> None:
    output = forward(segmenter.model, segmenter.processor(pictures, questions, ANSWERS))
    assert output.with_mask.tolist() == [True, True, False]
    assert len(output.mask_logits) == 2
    none = forward(segmenter.model, segmenter.processor(pictures[2:], questions[2:], ANSWERS[2:]))
    assert none.with_mask.tolist() == [False] and len(none.mask_logits) == 0


@torch.no_grad()
def test_cached_maps_give_the_mask_that_pixels_give(nano: Segmenter, pictures: list[np.ndarray]) -> None:
    batch = nano.processor(pictures[:1], ["Where?"], ANSWERS[:1])
    maps = encode_image(nano.model.segmenter, batch.segmenter_pixels)
    cached = nano.model(batch.input_ids, batch.attention_mask, batch.reasoner_inputs, segmenter_maps=maps)
    torch.testing.assert_close(cached.mask_logits, forward(nano.model, batch).mask_logits)


def test_probe_positions(qwen: Segmenter) -> None:
    model, seg = qwen.model, qwen.processor.config.seg_token_id
    opening = qwen.processor.config.answer_token_ids
    assert opening is not None
    ids = torch.tensor([[7, seg, *opening, 7, 8, seg, 9], [7] * (6 + len(opening))])
    assert model.probe_positions(ids).nonzero().tolist() == [[0, 4 + len(opening)]], "the last marker counts"
    whole = copy.deepcopy(model.config)
    whole.probe = "answer"
    part = copy.copy(model)
    part.config = whole
    positions = part.probe_positions(ids).nonzero()[:, 1].tolist()
    # From the opening's last token, which is what carries "the answer starts here", up to `<seg>`.
    assert positions == list(range(1 + len(opening), 5 + len(opening)))


def test_a_word_bias_moves_greedy_writing_and_no_sampling(nano: Segmenter, tmp_path: Path) -> None:
    pictures = [np.zeros((40, 60, 3), dtype=np.uint8)] * 2
    batch = nano.processor(pictures, ["Where is the polyp?"] * 2)

    def first_words(temperature: float) -> list[int]:
        torch.manual_seed(0)
        return [ids[0] for ids in generate(nano, batch, constrained=False, temperature=temperature).ids]

    usual, sampled = first_words(0.0), first_words(1.0)
    word = next(token for token in range(50, 60) if token not in usual + sampled)
    plain = nano.model.config
    nano.model.config = CoreSegConfig.from_dict({**plain.to_dict(), "word_bias": {str(word): 1e4}})
    try:
        nano.model.config.save_pretrained(tmp_path)
        assert CoreSegConfig.from_pretrained(tmp_path).word_bias == {word: 1e4}
        assert first_words(0.0) == [word, word]
        assert first_words(1.0) == sampled
    finally:
        nano.model.config = plain
    assert first_words(0.0) == usual


def test_boxes_reach_the_decoder_only_where_the_configuration_says_so(nano: Segmenter) -> None:
    model = copy.deepcopy(nano.model)
    states = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    maps = [torch.randn(1, 32, side, side, generator=torch.Generator().manual_seed(side)) for side in (16, 8, 4)]
    present, boxes = torch.ones(1, 1, dtype=torch.bool), [torch.tensor([[4.0, 4.0, 30.0, 50.0]])]
    with torch.no_grad():
        without = model.decode(states, present, maps)
        assert torch.equal(model.decode(states, present, maps, boxes), without)
        model.config.box_prompts = True
        assert not torch.allclose(model.decode(states, present, maps, boxes), without, atol=1e-4)


def test_box_prompts_of_unequal_rows_are_filled_with_no_point(nano: Segmenter) -> None:
    two, none = torch.tensor([[4.0, 4.0, 30.0, 50.0], [1.0, 2.0, 9.0, 8.0]]), torch.zeros(0, 4)
    with torch.no_grad():
        prompts = box_prompts(nano.model.segmenter, [two[:1], two, none])
        alone = box_prompts(nano.model.segmenter, [two[:1]])
    count = alone.shape[2]
    assert prompts.shape[:3] == (3, 1, 2 * count)
    torch.testing.assert_close(prompts[:1, :, :count], alone)
    torch.testing.assert_close(prompts[1, 0, :count], alone[0, 0])
    blank = nano.model.segmenter.prompt_encoder.not_a_point_embed.weight.expand(2 * count, -1)
    torch.testing.assert_close(prompts[2, 0], blank)
    torch.testing.assert_close(prompts[0, 0, count:], blank[count:])


def test_each_box_is_decoded_by_itself_and_the_masks_are_united(nano: Segmenter, pictures: list[np.ndarray]) -> None:
    model = nano.model
    pixels = torch.cat([nano.processor.segmenter_pixels(picture) for picture in pictures])
    first, second = torch.tensor([[5.0, 5.0, 20.0, 20.0]]), torch.tensor([[30.0, 40.0, 60.0, 62.0]])
    with torch.no_grad():
        both = model.in_boxes(pixels, [torch.cat([first, second]), torch.zeros(0, 4), second])
        maps = encode_image(model.segmenter, pixels)
        one = decode_masks(model.segmenter, maps, box_prompts(model.segmenter, [first] * 3))
        other = decode_masks(model.segmenter, maps, box_prompts(model.segmenter, [second] * 3))
    assert torch.allclose(both[0], torch.maximum(one[0, 0], other[0, 0]), atol=1e-5)
    assert not torch.allclose(one[0, 0], other[0, 0], atol=1e-3), "the boxes differ, and so do their masks"
    assert torch.allclose(both[2], other[2, 0], atol=1e-5)
    assert (both[1] < 0).all(), "no box, no mask"


def test_the_processor_reads_boxes_into_the_segmenters_square(nano: Segmenter, pictures: list[np.ndarray]) -> None:
    height, width = pictures[0].shape[:2]
    answer = Answer("cyst", ((0, 0, width, height), (0, 0, width // 2, height)), "Two.", found=True)
    batch = nano.processor(pictures[:1], ["Where?"], [answer])
    side = nano.processor.config.segmenter_size_px
    expected = torch.tensor([[0.0, 0, side, side], [0, 0, side * (width // 2) / width, side]])
    torch.testing.assert_close(batch.segmenter_boxes[0], expected)
    written = batch.labels[0][batch.labels[0] != IGNORED].tolist()[:-1]
    read = nano.processor.read_boxes([written], batch.frames_wh)[0]
    torch.testing.assert_close(read, expected, atol=1.0, rtol=0)  # written boxes are whole pixels of the frame
    assert nano.processor.read_boxes([written[:-3]], batch.frames_wh)[0].shape == (0, 4)


def test_written_boxes_do_not_change_the_mask(
    nano: Segmenter, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    stock = nano.model.segmenter.prompt_encoder.forward

    def spy(**prompts: object) -> object:
        given.extend(value for value in prompts.values() if value is not None)
        return stock(**prompts)

    monkeypatch.setattr(nano.model.segmenter.prompt_encoder, "forward", spy)
    nano.segment(pictures[0], "Where is the cyst?")
    assert given == []


@torch.no_grad()
def test_how_likely_the_words_were(segmenter: Segmenter, pictures: list[np.ndarray], questions: list[str]) -> None:
    """As a pass over the whole text has it, greedy and without the grammar, which would leave some steps no choice."""
    batch = segmenter.processor(pictures, questions)
    written = generate(segmenter, batch, constrained=False)
    again = with_completion(segmenter, batch, written.ids)
    likely = forward(segmenter.model, again).logits.log_softmax(-1).amax(-1)
    for row, ids in enumerate(written.ids):
        expected = likely[row, -len(ids) - 1 :][: len(ids) + 1].mean()
        assert written.log_probabilities[row] == pytest.approx(float(expected), abs=0.02), row
    constrained = generate(segmenter, batch)
    assert all(-10 < told < 0 for told in constrained.log_probabilities)


def test_question_blind_masks_know_no_question(nano: Segmenter, pictures: list[np.ndarray]) -> None:
    pixels = nano.processor.segmenter_pixels(pictures[0])
    with torch.no_grad():
        assert nano.model.question_blind(pixels).shape == (1, 16, 16)


def hostile_question(rng: np.random.Generator) -> str:
    return " ".join(["Where is it?", *rng.choice(HOSTILE_WORDS, int(rng.integers(1, 5)))])


def invalid_of(segmenter: Segmenter, count: int, batch_size: int = 50) -> list[str]:
    """The texts that do not parse, of so many sampled under the grammar from a model that has learnt nothing."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    invalid = []
    for _ in range(count // batch_size):
        sizes = rng.integers(20, 200, (batch_size, 2))
        batch = segmenter.processor(
            [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes],
            [hostile_question(rng) for _ in range(batch_size)],
        )
        generation = generate(segmenter, batch, temperature=1.0)
        for ids, logits, frame in zip(generation.ids, generation.mask_logits, batch.frames_wh, strict=True):
            text = segmenter.processor.decode(ids)
            answer = parse(text, frame)
            if answer is None or answer.found != (logits is not None):
                invalid.append(text)
    return invalid


def test_200_constrained_answers_to_hostile_questions_are_valid(qwen: Segmenter) -> None:
    assert invalid_of(qwen, 200) == []


@pytest.mark.slow
def test_1000_constrained_answers_to_hostile_questions_are_valid(segmenter: Segmenter) -> None:
    assert invalid_of(segmenter, 1000) == []


@pytest.mark.slow
def test_1000_constrained_answers_of_the_embedded_nano_are_valid() -> None:
    assert invalid_of(Segmenter.from_pretrained(device="cpu"), 1000) == []
