import torch

from coreseg.train.augment import augment


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(4, 3, 48, 64)
    images[:, :, 16:32, 20:40] = 0.9
    masks = (images[:, :1] > 0.5).float()
    return images, masks


def changed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return augment(*batch(), torch.Generator().manual_seed(seed))


def test_the_seed_alone_decides() -> None:
    assert all(torch.equal(one, other) for one, other in zip(changed(0), changed(0), strict=True))
    assert not torch.equal(changed(0)[0], changed(1)[0])


def test_masks_move_with_their_picture_and_stay_binary() -> None:
    images, masks = changed(3)
    assert images.shape == (4, 3, 48, 64) and images.min() >= 0 and images.max() <= 1
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    bright = images.mean(dim=1, keepdim=True) > 0.4
    assert (bright != masks.bool()).float().mean() < 0.02
    assert not torch.equal(masks, batch()[1])
