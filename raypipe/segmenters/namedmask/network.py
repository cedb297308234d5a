"""NamedMask's network: DeepLabv3+ on a residual network of stride 8, with the names of the published weights.

Shin, Xie, Albanie, "NamedMask", CVPR Workshops 2023, section 4; its form is that of Chen et al., ECCV 2018, with
separable convolutions. The backbone is torchvision's residual network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from raypipe import networks
from raypipe.features import originals, resnet
from raypipe.lookup import one_line

KIND = "namedmask"  # what its config.json says
RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # of the atrous convolutions, by output stride (DeepLabv3+, table 2)
MOMENTUM = 0.01  # of the backbone's batch norms (reference); those of the head have torch's 0.1
DROPOUT = 0.1  # behind the pyramid (reference)
FILE = "model.safetensors"  # in a folder that a training exported
CLASSES = "classifier.classifier.3.weight"


class Separable(nn.Module):
    """A 3 x 3 convolution of each channel by itself, then one of all channels at each pixel, nothing between."""

    def __init__(self, inside: int, outside: int, *, rate: int = 1):
        super().__init__()
        options = {"padding": rate, "dilation": rate, "groups": inside, "bias": False}
        self.body = nn.Sequential(nn.Conv2d(inside, inside, 3, **options), nn.Conv2d(inside, outside, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        each, joined = self.body
        if min(each.dilation) < max(x.shape[2:]):
            return joined(each(x))
        return joined(x * each.weight[:, 0, 1, 1, None, None])  # all but the middle lie outside, where it is 0


def normed(convolution: nn.Module, channels: int) -> list[nn.Module]:
    """A convolution, its batch norm and the ReLU."""
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: each pixel alone, from three distances, and in the light of the whole image."""

    def __init__(self, inside: int, channels: int, rates: Sequence[int]):
        super().__init__()
        alone = nn.Sequential(*normed(nn.Conv2d(inside, channels, 1, bias=False), channels))
        atrous = (nn.Sequential(*normed(Separable(inside, channels, rate=rate), channels)) for rate in rates)
        pooled = [nn.AdaptiveAvgPool2d(1), *normed(nn.Conv2d(inside, channels, 1, bias=False), channels)]
        self.convs = nn.ModuleList([alone, *atrous, nn.Sequential(*pooled)])
        joined = nn.Conv2d(len(self.convs) * channels, channels, 1, bias=False)
        self.project = nn.Sequential(*normed(joined, channels), nn.Dropout(DROPOUT))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, h, w) to (B, channels, h, w)."""
        found = [branch(x) for branch in self.convs]
        found[-1] = found[-1].expand_as(found[0])  # bilinear from one value
        return self.project(torch.cat(found, dim=1))


class Head(nn.Module):
    """From the two feature maps of the backbone to logits of a quarter of the image's size."""

    def __init__(self, classes: int, low: int, high: int, rates: Sequence[int], *, channels: int, fine: int):
        """low, high: channels of the feature maps. channels: of the head. fine: of what it keeps of the low level."""
        super().__init__()
        self.project = nn.Sequential(*normed(nn.Conv2d(low, fine, 1, bias=False), fine))
        self.aspp = Pyramid(high, channels, rates)
        decoder = normed(Separable(fine + channels, channels), channels)
        self.classifier = nn.Sequential(*decoder, nn.Conv2d(channels, classes, 1))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low: (B, low, H/4, W/4). high: (B, high, h, w). Returns (B, classes, H/4, W/4)."""
        coarse = F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear")
        return self.classifier(torch.cat([self.project(low), coarse], dim=1))


class DeepLab(nn.Module):
    """Logits of every class at every pixel: 26,614,373 parameters with the published sizes and 21 classes."""

    def __init__(
        self,
        classes: int,
        *,
        output_stride: int = 8,
        rates: Sequence[int] | None = None,
        blocks: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        channels: int = 256,
        fine: int = 48,
    ):
        """classes: the background, which comes first, among them. output_stride: px between the values of the last
        feature map, 8 or 16. rates: None = those of the stride. blocks, width: of the backbone, as published ResNet-50.
        """
        super().__init__()
        if output_stride not in RATES:
            raise ValueError(f"namedmask: output_stride must be 8 or 16, got {output_stride!r}")
        self.output_stride, self.rates = output_stride, tuple(rates or RATES[output_stride])
        dilated = [False, output_stride == 8, True]
        self.backbone = ResNet(Bottleneck, list(blocks), replace_stride_with_dilation=dilated, width_per_group=width)
        self.backbone.fc = nn.Identity()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = MOMENTUM
        expansion = Bottleneck.expansion
        self.classifier = Head(
            classes, 64 * expansion, 512 * expansion, self.rates, channels=channels, fine=fine
        )  # whatever the width, its stages give as many channels

    @property
    def classes(self) -> int:
        """How many, with the background."""
        return len(self.classifier.classifier[-1].weight)

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The feature maps of a quarter of the size, and of an eighth or a sixteenth.

        pixels: float (B, 3, H, W) with ImageNet's mean 0 and deviation 1, of any size.
        """
        body = self.backbone
        low = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(pixels)))))
        return low, body.layer4(body.layer3(body.layer2(low)))

    def coarse(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes, ceil(H / 4), ceil(W / 4)), for whoever enlarges them by parts."""
        return self.classifier(*self.features(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, float32 (B, classes, H, W)."""
        return F.interpolate(self.coarse(pixels).float(), size=pixels.shape[2:], mode="bilinear")


def initialise(network: DeepLab, backbone: Path | None, seed: int, *, method: str = KIND) -> None:
    """Give a network its first weights: those of a trained backbone, the head's at random.

    backbone: what `resnet.read` reads, such as DINO's ResNet-50; None = at random too. Raises ValueError for a residual
    network of another size.
    """
    parts = {network.classifier: "fan_in"} | ({network.backbone: "fan_out"} if backbone is None else {})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch the GPUs'
        for part, mode in parts.items():  # as the authors', and as torchvision's
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                    module.reset_parameters()
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    if backbone is not None:
        try:
            network.backbone.load_state_dict(resnet.read(backbone, method=method).state_dict())
        except RuntimeError as error:
            raise ValueError(f"{method}: {backbone} is another backbone than is trained: {one_line(error)}") from error


def read(path: Path, *, method: str) -> tuple[DeepLab, dict]:
    """A network on the CPU, not to be trained, and what the config.json beside it says; {} without one.

    path: a folder that a training exported, or a published checkpoint. Sizes are read off the shapes, stride and rates
    are the published ones where no config.json tells others. `classes` of the settings, where they have any, are as
    many names as the network has classes beside the background. Raises ValueError for anything else.
    """
    file = originals.checkpoint(path, method=method)
    config = originals.settings(path if file is None else file.parent, method=method)
    if (kind := config.get("model_type", KIND)) != KIND:
        raise ValueError(f"{method}: {path} holds a network of type {kind!r}, expected {KIND!r}")
    file = file or path / FILE
    found = {name.removeprefix("module."): each for name, each in originals.tensors(file, method=method).items()}
    try:
        network = _filled({name: each.float() for name, each in found.items()}, config)
        _check_names(config, network.classes)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{method}: {file} is no checkpoint of NamedMask: {why}") from error
    return network.eval().requires_grad_(False), config


def _filled(found: dict[str, Tensor], config: Mapping) -> DeepLab:
    """A network of the sizes that tensors have, with them in it."""
    body = {name.removeprefix("backbone.") for name in found if name.startswith("backbone.")}
    blocks = [len({name.split(".")[1] for name in body if name.startswith(f"{stage}.")}) for stage in resnet.STAGES]
    if sum(blocks) > networks.MAX_LAYERS:
        raise ValueError(f"it has {sum(blocks):,} blocks")
    sizes = {"blocks": blocks, "width": len(found["backbone.layer1.0.conv1.weight"])}
    sizes |= {"fine": len(found["classifier.project.0.weight"]), "channels": found[CLASSES].shape[1]}
    told = {name: config[name] for name in ("output_stride", "rates") if name in config}
    with torch.device("meta"):  # no memory and no time for random numbers
        network = DeepLab(len(found[CLASSES]), **sizes, **told)
    names = (name for name, _ in network.named_buffers() if name.endswith(resnet.COUNT))
    counts = {name: torch.tensor(0) for name in names}  # older files lack them
    network.load_state_dict(counts | found, assign=True)
    return network


def _check_names(config: Mapping, classes: int) -> None:
    """Raise ValueError where the names of the classes are none, or not as many as the network has."""
    names = config.get("classes")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes of its config.json must be a list of names, got {names!r:.80}")
    if len(names) != classes - 1:
        raise ValueError(f"config.json names {len(names)} classes, it has {classes - 1} beside the background")


def files(network: DeepLab, config: Mapping) -> dict[str, bytes]:
    """What a folder holds that `read` reads: content by name.

    config: `classes` (the names by label, without the background), and what else config.json is to say.
    """
    settings = {"model_type": KIND, "output_stride": network.output_stride, "rates": network.rates} | dict(config)
    _check_names(settings, network.classes)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return {FILE: save(state), "config.json": json.dumps(settings, indent=1).encode()}


def fold(network: DeepLab) -> None:
    """Work the batch norms of a network that is not trained any more into the convolutions before them, in place."""
    for parent, first, second in list(_pairs(network)):
        convolution = getattr(parent, first)
        whole = convolution.body if isinstance(convolution, Separable) else None
        last = convolution if whole is None else whole[-1]
        joined = nn.utils.fuse_conv_bn_eval(last, getattr(parent, second))
        if whole is None:
            setattr(parent, first, joined)
        else:
            whole[-1] = joined
        setattr(parent, second, nn.Identity())


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every module with a batch norm in it, the name of the convolution before that, and the norm's."""
    for parent in network.modules():
        names = list(dict(parent.named_children()))
        for name in names:
            if isinstance(getattr(parent, name), nn.BatchNorm2d):
                before = name.replace("bn", "conv") if name.startswith("bn") else names[names.index(name) - 1]
                yield parent, before, name
