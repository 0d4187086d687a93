"""The examples of DAT as the backbone of other libraries, with tiny networks."""

from __future__ import annotations

from examples import deformable_detr, mask2former, retinanet, unet
from tests.models.small import SMALL, without_gradient

TINY = {**SMALL, "stage_spec": ["N", "N", "D", "D"], "num_classes": 0}
SHORT = {"encoder_layers": 1, "decoder_layers": 2}


def test_retinanet_of_torchvision() -> None:
    detector = retinanet.main(size=64, channels=16, **TINY)
    assert without_gradient(detector) == []


def test_deformable_detr_of_transformers() -> None:
    small = {"d_model": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
    small |= {"decoder_attention_heads": 2}
    detector = deformable_detr.main(size=96, options=TINY, **SHORT, **small)
    assert without_gradient(detector.model.backbone) == []


def test_mask2former_of_transformers() -> None:
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_feedforward_dim": 16}
    small |= {"dim_feedforward": 16, "num_attention_heads": 2}
    segmenter = mask2former.main(size=64, options=TINY, **SHORT, **small)
    assert without_gradient(segmenter.model.pixel_level_module.encoder) == []


def test_unet_of_segmentation_models() -> None:
    segmenter = unet.main(size=64, decoder_channels=[16, 16, 8, 8, 8], **TINY)
    assert without_gradient(segmenter) == []
