"""Batch normalisation over the images of all workers, on the CPU too, which torch's SyncBatchNorm refuses.

A worker's mean, variance and count travel in one collective forward, two sums per channel in one backward. Everybody
adds up in the order of ranks, so that all workers have the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, whose batch in train mode is that of all workers; on one worker it is torch's own.

    All workers must call it equally often. The gradients suit a data-parallel wrapper, which divides by the workers.
    """

    is_alone = False  # whether this worker normalises by itself for a while

    def forward(self, values: Tensor) -> Tensor:
        """values: float (B, C, H, W); B may differ between workers."""
        if self.is_alone or not self.training or _workers() == 1:
            return super().forward(values)
        return _Normalised.apply(values, self.weight, self.bias, self)


class _Normalised(torch.autograd.Function):
    """The normalisation and its derivative (Ioffe & Szegedy, ICML 2015); saves no more than its input."""

    @staticmethod
    def forward(context, values: Tensor, weight: Tensor, bias: Tensor, layer: BatchNorm2d) -> Tensor:
        variance, mean = torch.var_mean(values.float(), dim=(0, 2, 3), correction=0)
        here = torch.full_like(mean, values.numel() // values.shape[1])
        counts, means, variances = _of_all(torch.stack([here, mean, variance])).unbind(1)  # (workers, C)
        shares = counts / (count := counts.sum(0))
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean) ** 2)).sum(0)
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * count / (count - 1), layer.momentum)
        layer.num_batches_tracked += 1
        context.save_for_backward(values, weight, mean, (variance + layer.eps).rsqrt(), count)
        return functional.batch_norm(values, mean, variance, weight, bias, eps=layer.eps)

    @staticmethod
    def backward(context, gradient: Tensor):
        values, weight, mean, scale, count = context.saved_tensors
        wide = tuple(each[:, None, None] for each in (mean, scale, weight))
        normal, gradient_ = (values.float() - wide[0]) * wide[1], gradient.float()
        sums = torch.stack([gradient_.sum((0, 2, 3)), (gradient_ * normal).sum((0, 2, 3))])  # of bias and weight
        of_bias, of_weight = (_of_all(sums).sum(0) / count)[..., None, None]
        of_values = (gradient_ - of_bias - normal * of_weight) * (wide[1] * wide[2])
        return of_values.to(values.dtype), sums[1], sums[0], None


def across_workers(module: nn.Module) -> nn.Module:
    """Have every BatchNorm2d in a module normalise over all workers, in place; tensors and their names stay."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            spread = BatchNorm2d(child.num_features, child.eps, child.momentum, device="meta")
            spread.load_state_dict(child.state_dict(keep_vars=True), assign=True)
            setattr(module, name, spread.train(child.training))
        across_workers(child)
    return module


def by_batch(module: nn.Module) -> AbstractContextManager:
    """A context in which a module normalises by the statistics of what it is given, here alone, and keeps none.

    The published evaluation of Sempart does so; in eval mode a module takes its running averages otherwise.
    """
    return _changed(module, training=True, track_running_stats=False, is_alone=True)


@contextmanager
def averaged(module: nn.Module) -> Iterator[None]:
    """A context whose calls of a module, in train mode and here alone, make new running averages: their plain mean."""
    for each in _layers(module):
        each.reset_running_stats()
    with _changed(module, training=True, momentum=None, is_alone=True):
        yield


@contextmanager
def _changed(module: nn.Module, **attributes) -> Iterator[None]:
    """A context in which all BatchNorm2d of a module have these attributes."""
    before = [{name: getattr(each, name, False) for name in attributes} for each in _layers(module)]
    for each in _layers(module):
        vars(each).update(attributes)
    try:
        yield
    finally:
        for each, old in zip(_layers(module), before, strict=True):
            vars(each).update(old)


def _layers(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]


def _workers() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _of_all(values: Tensor) -> Tensor:
    """A tensor of every worker, in the order of ranks: (workers, ...)."""
    found = [torch.empty_like(values) for _ in range(_workers())]
    distributed.all_gather(found, values)
    return torch.stack(found)
