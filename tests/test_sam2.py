import pytest
import torch
from transformers import AutoModelForMaskGeneration, PreTrainedModel

from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image
from coreseg.testing_models import tiny_edgetam, tiny_sam2


@pytest.fixture(scope="module", params=[tiny_sam2, tiny_edgetam], ids=["sam2", "edgetam"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = request.param(tmp_path_factory.mktemp("segmenter") / "tiny")
    model = AutoModelForMaskGeneration.from_pretrained(folder).eval()
    model.mask_decoder.dynamic_multimask_via_stability = False
    return model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


BOXES = torch.tensor([[[4.0, 8.0, 40.0, 50.0]], [[0.0, 0.0, 20.0, 64.0]]])


def test_maps_run_from_fine_to_coarse(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    assert [tuple(level.shape) for level in encode_image(model, pixels)] == [(2, 32, s, s) for s in (16, 8, 4)]


@torch.no_grad()
def test_the_same_mask_as_the_stock_forward_pass(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    sparse, _ = model.prompt_encoder(input_points=None, input_labels=None, input_boxes=BOXES, input_masks=None)
    ours = decode_masks(model, encode_image(model, pixels), sparse)
    stock = model(pixel_values=pixels, input_boxes=BOXES, multimask_output=False).pred_masks
    torch.testing.assert_close(ours, stock[:, :, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_larger_square_is_decoded_as_by_a_model_of_that_size(
    model: PreTrainedModel, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = torch.nn.functional.interpolate(pixels, (96, 96), mode="bilinear")
    prompt = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(1))
    ours = decode_masks(model, encode_image(model, larger), prompt)
    # What a configuration of 96 px has.
    monkeypatch.setattr(model.prompt_encoder, "image_embedding_size", (6, 6))
    positions = model.get_image_wide_positional_embeddings().expand(2, -1, -1, -1)
    dense = model.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=None)[1]
    finest, finer, coarse = encode_image(model, larger)
    stock, *_ = model.mask_decoder(
        image_embeddings=coarse + model.no_memory_embedding.view(1, -1, 1, 1),
        image_positional_embeddings=positions,
        sparse_prompt_embeddings=prompt,
        dense_prompt_embeddings=dense.expand(2, -1, -1, -1),
        multimask_output=False,
        high_resolution_features=[model.mask_decoder.conv_s0(finest), model.mask_decoder.conv_s1(finer)],
    )
    assert ours.shape == (2, 1, 24, 24)
    torch.testing.assert_close(ours, stock[:, :, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_its_rows(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    prompt = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(1))
    together = decode_masks(model, encode_image(model, pixels), prompt)
    for row in range(2):
        alone = decode_masks(model, encode_image(model, pixels[row : row + 1]), prompt[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-5)


@torch.no_grad()
def test_several_prompts_a_picture(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    prompts = torch.randn(2, 4, 3, 32, generator=torch.Generator().manual_seed(1))
    maps = encode_image(model, pixels)
    together = decode_masks(model, maps, prompts)
    assert together.shape == (2, 4, 16, 16)
    torch.testing.assert_close(together[:, 2:3], decode_masks(model, maps, prompts[:, 2:3]), atol=1e-5, rtol=1e-4)


def test_gradients_reach_prompt_and_decoder_but_not_the_maps(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    maps = [level.detach() for level in encode_image(model, pixels)]
    prompt = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    decode_masks(model, maps, prompt).square().mean().backward()
    assert prompt.grad is not None and prompt.grad.abs().sum() > 0
    # The convolutions that `get_image_features` would have run without a gradient.
    assert model.mask_decoder.conv_s0.weight.grad.abs().sum() > 0
    assert model.mask_decoder.conv_s1.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_any_lesion_prompt_knows_nothing(model: PreTrainedModel) -> None:
    prompt = any_lesion_prompt(model, 2)
    assert prompt.shape == (2, 1, 3, 32)
    assert torch.equal(prompt[0], prompt[1])
