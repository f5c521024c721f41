"""RMSNorm in few passes over memory on a CPU; on a GPU it is PyTorch's own.

PyTorch has no fused RMSNorm for CPUs: autograd keeps and multiplies ten tensors as large as the
input, which makes a training step of TIGER some 5 % longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension; the same parameters as PyTorch's.

    Under mixed precision on a CPU y is in the low precision already, as the linear layers after it
    want it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        mixed = torch.is_autocast_enabled("cpu")
        kind = torch.get_autocast_dtype("cpu") if mixed else x.dtype
        return _RootMeanSquare.apply(x, self.weight, self.eps, kind)


class _RootMeanSquare(torch.autograd.Function):
    """The formula and its gradient: with n = x / rms, dx = (w g - n mean(w g n)) / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
        x = x.to(weight.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (length.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse
        along = gradient * normal
        of_weight = along.reshape(-1, x.shape[-1]).sum(0)
        share = along.mul_(weight).mean(-1, keepdim=True)
        of_x = (gradient * weight).addcmul_(normal, share, value=-1).mul_(inverse)
        return of_x, of_weight, None, None
