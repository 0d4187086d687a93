"""Backbones for Hugging Face transformers, registered with `AutoConfig` and `AutoBackbone` by importing this module.

The detectors and segmenters of transformers take the config as ``backbone_config``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from . import backbone
from .layers import as_pair
from .options import NUM_STAGES
from .registry import model_options


class DATConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a `DATBackbone`.

    Args:
        architecture: name of a published model, such as ``dat_tiny``, see `models.registry`.
        options: options of `models.dat.DAT` that replace those of the architecture. The config then holds, and saves,
            the options of both.
        out_features: names of the returned maps, from ``stage1`` to ``stage4``; the last one by default.
        out_indices: the same as indices from 0.
    """

    model_type = "dat"

    architecture: str = "dat_tiny"
    options: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.options = model_options(self.architecture) | (self.options or {})
        self.num_channels = self.options.get("in_chans", 3)
        self.hidden_size = self.options["dims"][-1]
        self.stage_names = [f"stage{i + 1}" for i in range(NUM_STAGES)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)


class DATBackbone(BackboneMixin, PreTrainedModel):
    """A `models.backbone.DATBackbone` with the interface of transformers' backbones.

    To start from the weights of a classifier, load them into the attribute ``backbone`` with `models.weights.adapt`.
    """

    config_class = DATConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    has_attentions = False
    supports_gradient_checkpointing = True

    def __init__(self, config: DATConfig) -> None:
        super().__init__(config)
        self.num_features = list(config.options["dims"])
        self.backbone = backbone.DATBackbone(**config.options, out_indices=config.out_indices)
        self.post_init()

    def init_weights(self) -> None:
        """Keep the weights with which the constructor initialised the modules, unless it ran on the meta device."""
        if not any(parameter.is_meta for parameter in self.parameters()):
            for module in self.modules():
                module._is_hf_initialized = True
        super().init_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module with entries that a file lacks; `torch.nn.init` does not change the others here."""
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        loaded = all(getattr(tensor, "_is_hf_initialized", False) for tensor in own)
        if hasattr(module, "reset_parameters") and not loaded:
            module.reset_parameters()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the activations of each block are recomputed in the backward pass, which transformers sets."""
        return any(stage.use_checkpoint for stage in self.backbone.stages)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        """Enable or disable it."""
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize the position tables to another image size, as `DAT.set_input_size` does, also in the config.

        Args:
            img_size: height and width in pixels, or both as one number.

        Raises:
            ValueError: the size is not allowed.
        """
        self.backbone.set_input_size(img_size)
        self.config.options["img_size"] = list(as_pair(img_size))

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **_: Any) -> BackboneOutput:
        """Return the normalised maps ``[B, channels[i], H / stride, W / stride]`` of images ``[B, 3, H, W]``.

        Args:
            pixel_values: images.
            output_hidden_states: also return the outputs, before the norms, of all stages up to the last returned map;
                None for the value in the config.

        Raises:
            ValueError: `out_indices` was set to stages that the backbone was not built for.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        indices = [i % NUM_STAGES for i in self.out_indices]
        built = list(self.backbone.out_indices)
        if not set(indices) <= set(built):
            raise ValueError(
                f"out_indices = {indices} must be among those that the backbone was built with, {built}; build another"
            )
        stages = self.backbone.forward_intermediates(pixel_values, range(indices[-1] + 1), intermediates_only=True)
        maps = tuple(self.backbone.norms[i](stages[i]) for i in indices)
        return BackboneOutput(feature_maps=maps, hidden_states=tuple(stages) if output_hidden_states else None)


AutoConfig.register(DATConfig.model_type, DATConfig)
AutoBackbone.register(DATConfig, DATBackbone)
