"""Features of every 8 px of an image from a residual network that was trained without labels.

He et al., CVPR 2016, in the files of MoCo-v2 (Chen et al. 2020), SwAV (Caron et al., NeurIPS 2020), DINO (Caron et
al., ICCV 2021), NamedMask and transformers. The last two stages are dilated instead of strided, as SelfMask reads them
(Shin, Albanie, Xie, CVPR Workshops 2022).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe import networks
from raypipe.features import originals
from raypipe.features.dino import Dino
from raypipe.lookup import one_line

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.models import ResNet

STRIDE = 8  # px: without dilation 32
DINO_50 = "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"  # its README
PREFIXES = re.compile(r"^((module|backbone|encoder_q|resnet)\.)+")
DROPPED = re.compile(r"^(fc\.|head\.|classifier\.|projection_head|prototypes|encoder_k|queue)")  # of training
COUNT = "num_batches_tracked"  # of training too; older files lack it
STAGES = ("layer1", "layer2", "layer3", "layer4")
LAST = "layer4.0.conv3.weight"  # what a network of bottlenecks has, and no transformer
KINDS = ("resnet", "namedmask")  # what config.json of a folder says

# From transformers' names to torchvision's.
RENAMED = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
)


class Resnet(Dino):
    """A frozen residual network, in the place of a transformer: it has one facet, its last feature map."""

    def __init__(self, path: Path, *, method: str, device: str, dtype: str = "auto"):
        """Read the file at a path of `networks.locate`. Raises ValueError for anything else than a residual network."""
        self.network = read(path, method=method).to(device)
        self._method, self._device, self._dtype = method, device, dtype
        self.patch = self.stride = STRIDE

    def forward(self, pixels: Tensor, **_) -> tuple[Tensor, None]:
        """The last feature map as float32 (B, P, D), row-major, and no attention.

        pixels: float32 (B, 3, H, W) on the device, normalised, H and W multiples of 8.
        """
        import torch

        network = self.network
        with torch.no_grad(), networks.autocast(self._device, self._dtype):
            picture = network.maxpool(network.relu(network.bn1(network.conv1(pixels))))
            for stage in STAGES:
                picture = getattr(network, stage)(picture)
        return picture.flatten(2).transpose(1, 2).float(), None


def is_resnet(path: Path, *, method: str) -> bool:
    """Whether a path of `networks.locate` leads to a residual network."""
    file = _file(path, method=method)
    return file is not None and LAST in _renamed(originals.tensors(file, method=method))


def read(path: Path, *, method: str) -> ResNet:
    """The network in a checkpoint file or a folder, on the CPU, with as many blocks as it has: 50 layers, 101, ..."""
    import torch
    from torchvision.models.resnet import Bottleneck, ResNet

    file = _file(path, method=method)
    if file is None:
        kind = originals.settings(path, method=method)["model_type"]
        raise ValueError(f"{method}: {path} holds a network of type {kind!r}, expected 'resnet'")
    found = _renamed(originals.tensors(file, method=method))
    try:
        blocks = [len({name.split(".")[1] for name in found if name.startswith(f"{stage}.")}) for stage in STAGES]
        if sum(blocks) > networks.MAX_LAYERS:
            raise ValueError(f"it has {sum(blocks):,} blocks")
        options = {"width_per_group": len(found["layer1.0.conv1.weight"])}
        with torch.device("meta"):  # no memory and no time for random numbers
            network = ResNet(Bottleneck, blocks, replace_stride_with_dilation=[False, True, True], **options)
            network.fc = torch.nn.Identity()
        counts = {name: torch.tensor(0) for name, _ in network.named_buffers() if name.endswith(COUNT)}
        network.load_state_dict(counts | found, assign=True)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{method}: {file} is no checkpoint of a residual network: {why}") from error
    return network.float().eval().requires_grad_(False)


def _file(path: Path, *, method: str) -> Path | None:
    """The file that a path of `networks.locate` leads to; None for a folder of a network of another kind."""
    file = originals.checkpoint(path, method=method)
    if file is None and originals.settings(path, method=method)["model_type"] in KINDS:
        return next(file for kind in networks.WEIGHTS for file in sorted(path.glob(kind)))
    return file


def _renamed(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that make the features, under torchvision's names."""
    renamed = {}
    for name, tensor in found.items():
        name = PREFIXES.sub("", name)
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if not DROPPED.match(name):
            renamed[name] = tensor
    return renamed
