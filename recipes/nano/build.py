"""The untrained parts of nano: its segmenter on ImageNet-pretrained features."""

import torch
from transformers import EdgeTamConfig, EdgeTamModel, EdgeTamVisionConfig, TimmWrapperConfig
from transformers.models.edgetam.configuration_edgetam import EdgeTamMaskDecoderConfig, EdgeTamPromptEncoderConfig

import coreseg.sam2  # noqa: F401 (keeps transformers 5.17 from asking the hub)
from coreseg.train.baselines import ENCODER, load_imagenet

IMAGE_SIZE_PX = 256
WIDTH = 128


def segmenter_config() -> EdgeTamConfig:
    """EdgeTAM on EfficientNet-Lite0: 256 px in, feature maps at strides 4, 8 and 16, 128 channels."""
    backbone = TimmWrapperConfig(
        architecture=ENCODER,
        model_args={"features_only": True, "in_chans": 3, "out_indices": [1, 2, 3, 4]},
    )
    vision = EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[320, 112, 40, 24],
        backbone_feature_sizes=[[IMAGE_SIZE_PX // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=WIDTH,
    )
    return EdgeTamConfig(
        vision_config=vision,
        prompt_encoder_config=EdgeTamPromptEncoderConfig(hidden_size=WIDTH, image_size=IMAGE_SIZE_PX),
        mask_decoder_config=EdgeTamMaskDecoderConfig(
            hidden_size=WIDTH,
            mlp_dim=4 * WIDTH,
            num_multimask_outputs=1,
            iou_head_hidden_dim=WIDTH,
            # It swaps masks in eval mode only, so that training and inference would disagree.
            dynamic_multimask_via_stability=False,
        ),
    )


def build_segmenter() -> EdgeTamModel:
    """A fresh segmenter whose backbone holds the ImageNet weights of EfficientNet-Lite0."""
    model = EdgeTamModel(segmenter_config())
    load_imagenet(model.vision_encoder.backbone.timm_model)
    # SAM's own start is PyTorch's usual one. transformers' 0.02 everywhere is so weak at this width that prompts never
    # get through: a decoder trained from there gives the same mask whatever it is prompted with.
    for part in (*model.prompt_encoder.modules(), *model.mask_decoder.modules()):
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding | torch.nn.ConvTranspose2d):
            part.reset_parameters()
    # Prompts and image must speak of the same positions; EdgeTAM's class leaves the two copies independent.
    model.prompt_encoder.shared_embedding.load_state_dict(model.shared_image_embedding.state_dict())
    return model
