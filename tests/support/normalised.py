"""What workers of a data-parallel training do with normalised layers: started as processes, which import it by name."""

import torch
from torch import distributed, nn

from raypipe.training import batchnorm

SHARES = (2, 3)  # images of each worker: they need not be alike


def block() -> nn.Sequential:
    """Two normalised convolutions, the second one in a module of its own, with parameters unlike the first ones."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    layers.append(nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)))
    for name, tensor in layers.state_dict().items():
        if name.endswith(("weight", "bias", "running_mean")):
            tensor.uniform_(-1, 1)
    return layers


def images() -> torch.Tensor:
    """Far from mean 0, where sums of squares would lose digits."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SHARES), 3, 8, 9, generator=generator) * torch.tensor([1, 0.1, 3])[:, None, None] + 20


def step(layers: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What two steps in train mode leave: outputs, gradients of the sum of squares of them all, and buffers."""
    batch = batch.clone().requires_grad_()
    layers(batch.detach() * 0.5)
    given = layers(batch)
    (given**2 * torch.linspace(0, 1, given.shape[3])).sum().backward()
    found = {"outputs": given.detach(), "images": batch.grad}
    found |= {f"gradient of {name}": each.grad for name, each in layers.named_parameters()}
    return found | {name: each.clone() for name, each in layers.named_buffers()}


def work(rank: int, folder: str) -> None:
    """What one of the two workers finds, in a file; also what it gets alone while the other does nothing."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(SHARES))
    layers, batch = batchnorm.across_workers(block()), images().split(SHARES)[rank]
    found = step(layers, batch)
    if rank == 1:
        with torch.no_grad(), batchnorm.by_batch(layers):
            found["alone"] = layers(batch)
        with torch.no_grad(), batchnorm.averaged(layers):
            found["averaged"] = layers(batch)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
