"""Which of torch's attention kernels training may use."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["sound_attention"]


def sound_attention() -> AbstractContextManager[None]:
    """Inside, attention leaves out cuDNN's kernel.

    It is the first choice on Hopper GPUs from torch 2.11 on, and its gradient is NaN for some masked lengths
    (https://github.com/pytorch/pytorch/issues/196678).
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
