"""What depends on the device of a run: precision, and which kernels are used."""

from __future__ import annotations

import os

import torch
from yacs.config import CfgNode

from models.build import arguments
from utils import seed_everything


def resolve_options(config: CfgNode, device: torch.device) -> None:
    """Resolve the options that depend on the device: AMP "auto" is bf16, or fp16 on a GPU without bf16 in hardware.

    Raises:
        ValueError: the device does not support the options.
    """
    if config.AMP == "auto":
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        config.AMP = "fp16" if emulated else "bf16"
    if (
        config.DETERMINISTIC
        and device.type == "cuda"
        and (config.COMPILE or arguments(config).get("attn_drop_rate", 0))
    ):
        raise ValueError(
            "--deterministic cannot be combined with --compile or attn_drop_rate on CUDA: both sample position tables "
            "with an operation that has no deterministic backward kernel there"
        )


def prepare_device(config: CfgNode) -> None:
    """Seed the generators and configure the precision and the determinism of kernels."""
    seed_everything(config.SEED)
    # PyTorch's default is TF32 for convolutions, but not for matrix products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.TF32
    torch.use_deterministic_algorithms(config.DETERMINISTIC)
    if config.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
