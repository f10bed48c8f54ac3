import pytest
import torch

from coreseg.train.augment import augment


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(4, 3, 48, 64)
    images[:, :, 16:32, 20:40] = 0.9
    masks = (images[:, :1] > 0.5).float()
    return images, masks


def changed(seed: int, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return augment(*batch(), torch.Generator().manual_seed(seed), strength)


def test_the_seed_alone_decides() -> None:
    assert all(torch.equal(one, other) for one, other in zip(changed(0), changed(0), strict=True))
    assert not torch.equal(changed(0)[0], changed(1)[0])


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_masks_move_with_their_picture_and_stay_binary(strength: float) -> None:
    images, masks = changed(3, strength)
    assert images.shape == (4, 3, 48, 64) and images.min() >= 0 and images.max() <= 1
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    bright = images.mean(dim=1, keepdim=True) > 0.4
    assert (bright != masks.bool()).float().mean() < 0.02
    assert not torch.equal(masks, batch()[1])


def test_numbered_lesions_keep_their_numbers() -> None:
    images, masks = batch()
    numbered = masks * 7
    numbered[:, :, :, :30] *= 2
    moved = augment(images, numbered, torch.Generator().manual_seed(1), 2.0)[1]
    assert set(moved.unique().tolist()) == {0.0, 7.0, 14.0}


def test_a_strength_of_nothing_changes_no_light_and_at_most_mirrors() -> None:
    images, masks = batch()
    moved_images, moved_masks = changed(0, 0.0)
    for row in range(len(images)):
        mirrored = any(torch.equal(moved_masks[row], one) for one in (masks[row], masks[row].flip(-1)))
        assert mirrored and torch.isclose(moved_images[row].max(), images[row].max())


def test_only_beyond_a_strength_of_one_are_pictures_tinted_and_turned_upside_down() -> None:
    grey = torch.full((64, 3, 16, 16), 0.5)
    below = torch.zeros(64, 1, 16, 16)
    below[:, :, 12:, 6:10] = 1.0

    def looks(strength: float) -> tuple[bool, float]:
        images, masks = augment(grey, below, torch.Generator().manual_seed(0), strength)
        middle = images[:, :, 8, 8]
        rows = torch.arange(16.0)[:, None]
        above = [(mask[0] * rows).sum() / mask.sum() < 5 for mask in masks if mask.any()]
        return bool((middle.std(1) > 1e-3).any()), sum(map(float, above)) / len(above)

    assert looks(1.0) == (False, 0.0)
    tinted, above = looks(2.0)
    assert tinted and 0.2 < above < 0.8
