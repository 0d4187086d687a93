"""Adapters that let detectors of Hugging Face transformers use this project's backbones and attention."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from ..ops import ms_deform_attn


class AdapterConfig(BackboneConfigMixin, PretrainedConfig):
    """The backbone config that transformers needs: names and channels of the maps."""

    model_type = "dat_detection_adapter"

    def __init__(self, channels: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = list(channels or [1])
        self.stage_names = [f"map{i}" for i in range(len(self.channels))]
        self.set_output_features_output_indices(self.stage_names, None)


class BackboneAdapter(BackboneMixin, PreTrainedModel):
    """Takes the place of the backbone in a model of transformers, and calls that of the detector.

    Maps images ``[B, 3, H, W]`` to feature maps ``[B, C, h, w]``. The detector's backbone is not a submodule of the
    adapter, so transformers does not reinitialise it, and the state dict of the detector contains it only once.
    """

    config_class = AdapterConfig
    base_model_prefix = "backbone"

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.num_features = config.channels
        self._held: list[nn.Module] = []
        self.post_init()

    def hold(self, backbone: nn.Module) -> None:
        """Set the backbone to call."""
        self._held = [backbone]  # in a list, so that it is not registered as a submodule

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        return BackboneOutput(feature_maps=tuple(self._held[0](pixel_values)))


AutoConfig.register(AdapterConfig.model_type, AdapterConfig)
AutoBackbone.register(AdapterConfig, BackboneAdapter)


class Sampling(nn.Module):
    """Multi-scale deformable attention by `models.ops.ms_deform_attn`, with the arguments of transformers' module.

    Attributes:
        form: form of the operation, see `models.ops.ms_deform_attn`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.form = "auto"

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,  # noqa: ARG002
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,  # noqa: ARG002
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        levels = value_spatial_shapes_list  # in contrast to tensors, all forms read lists without a GPU synchronisation
        starts = [0, *accumulate(height * width for height, width in levels[:-1])]
        return ms_deform_attn(value, levels, starts, sampling_locations, attention_weights, im2col_step, form=self.form)


def adapt(model: nn.Module, backbone: nn.Module) -> None:
    """Let a model of transformers use ``backbone`` and this project's multi-scale deformable attention."""
    for module in list(model.modules()):
        if isinstance(module, BackboneAdapter):
            module.hold(backbone)
        if type(getattr(module, "attn", None)).__name__ == "MultiScaleDeformableAttention":
            module.attn = Sampling()
