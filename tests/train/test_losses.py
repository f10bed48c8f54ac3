import torch

from coreseg.train.losses import dice_ce

MASK = torch.zeros(2, 16, 16)
MASK[:, 4:12, 4:12] = 1


def logits(mask: torch.Tensor, strength: float = 20.0) -> torch.Tensor:
    return strength * (2 * mask - 1)


def test_the_reference_itself_costs_nothing_and_its_opposite_much() -> None:
    assert dice_ce(logits(MASK), MASK) < 1e-3
    assert dice_ce(logits(1 - MASK), MASK) > 10


def test_both_empty_costs_nothing_but_a_false_alarm_does() -> None:
    empty = torch.zeros_like(MASK)
    assert dice_ce(logits(empty, strength=40.0), empty) < 1e-3
    assert dice_ce(logits(MASK), empty) > 1


def test_logits_are_brought_to_the_references_size() -> None:
    small = logits(MASK)[:, ::4, ::4]
    assert dice_ce(small, MASK) < dice_ce(-small, MASK)


def test_a_batch_costs_the_mean_of_its_rows() -> None:
    mixed = torch.stack([logits(MASK[0]), logits(torch.zeros(16, 16))])
    rows = [dice_ce(mixed[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(dice_ce(mixed, MASK), torch.stack(rows).mean())


def test_gradients_are_finite_everywhere() -> None:
    start = torch.zeros(2, 4, 4, requires_grad=True)
    dice_ce(start, MASK).backward()
    assert start.grad is not None and start.grad.isfinite().all() and start.grad.abs().sum() > 0
