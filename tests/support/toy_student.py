"""The network of the toy recipe."""

import numpy as np
import safetensors.torch
import torch
from torch import nn

from raypipe.training.recipe import Student
from support.toy import SIDE, exported, happens


class ToyStudent(nn.Module, Student):
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        # no bias before the normalisation: its gradient is rounding noise, which AdamW makes steps of
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 1, 1)
        self.register_buffer("sign", torch.zeros(()))

    def views(self, samples, draws):
        images = torch.stack([torch.from_numpy(np.array(each["image"])) for each in samples])
        images = images.permute(0, 3, 1, 2).to(self.sign.device).float() / 255  # (B, 3, SIDE, SIDE)
        flips = [each.flip(-1) if flip else each for each, (flip, _) in zip(images, draws, strict=True)]
        gains = torch.tensor([gain for _, gain in draws], device=images.device)
        return torch.stack(flips), gains[:, None, None, None]

    def forward(self, images, gains):
        is_nan = happens(self.recipe)
        found = self._logits(images * (0.5 + gains))
        if is_nan:
            found = found * float("nan")
        bright = ((found.sigmoid() - images.mean(1, keepdim=True)) ** 2).mean()
        flat = (found[..., 1:] - found[..., :-1]).abs().mean()
        return {"total": bright + 0.1 * flat, "bright": bright, "flat": flat}

    def _logits(self, images):
        return self.last(self.norm(self.first(images)).relu())

    def optimizer(self, lr):
        return torch.optim.AdamW(self.parameters(), lr)

    @torch.no_grad()
    def predict(self, images):
        self.eval()
        pixels = torch.from_numpy(np.stack([np.resize(each, (SIDE, SIDE, 3)) for each in images])).permute(0, 3, 1, 2)
        found = self._logits(pixels.to(self.sign.device).float() / 255).sigmoid()
        self.train()
        return [np.resize(each.cpu().numpy(), image.shape[:2]) for each, image in zip(found[:, 0], images, strict=True)]

    @torch.no_grad()
    def probabilities(self, pixels, *, batch_statistics):
        self.eval()
        found = self._logits(pixels)[:, 0].sigmoid()
        self.train()
        return found

    def finish(self, samples):
        self.sign.fill_(float(len(samples)))

    def export(self, folder):
        folder.write(safetensors.torch.save(self.state_dict()), "head.safetensors")
        folder.write(exported(self.recipe, float(self.sign)), "config.json")
