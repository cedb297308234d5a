"""Zero-guidance segmentation as it reads: scipy's tree, all of CLIP for every part, texts padded, nothing kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raypipe import networks
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.plain import clip_masked
from raypipe.benchmark.plain._dino import PlainDino
from raypipe.benchmark.turns import compared, in_turns
from raypipe.segmenters.zero_guidance import names

SIDE = 224  # px: 3,025 keys, and 200 MB of attention for each image; of 12,321 keys it is 4 GB


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """With names by retrieval and DINO's image at SIDE px at most; and ours alone at its full size."""
    small = replace(method, size=min(method.size, SIDE))
    small.load(device)
    plain, batch = Plain(small, device), method.batch_size if device == "cuda" else 1
    arms = [lambda image: list(small.segment([image] * batch))[0], plain]
    (ours, other), found = in_turns(arms, images, repeats)
    pairs = [(names_of(one.masks, one.labels), names_of(*two)) for one, two in zip(*found, strict=True)]
    case = f", DINO at {small.size} px"
    against = f"{device}; one image at a time, scipy's tree, all of CLIP once for each part"
    ((alone,), _) = in_turns([lambda image: list(method.segment([image] * batch))], images[:1], repeats)
    return [
        *compared(method.name, [[total / batch for total in ours], other], against, case=case),
        Figure(
            method.name, "share of pixels unlike plain", "", [float((one != two).mean()) for one, two in pairs],
            f"named otherwise; ours in batches of {batch}",
        ),
        Figure(
            method.name, f"time per image, DINO at {method.size} px", "s", [total / batch for total in alone],
            f"{device}; ours alone",
        ),
    ]  # fmt: skip


def names_of(masks: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """The name of each pixel, (H, W), of disjoint masks (N, H, W) that are the whole image."""
    return np.array(labels)[masks.argmax(0)]


class Strided(PlainDino):
    """DINO whose patches overlap."""

    def __init__(self, network, stride: int):
        super().__init__(network)
        self._stride, self.patch = stride, 1  # px that images are padded to a multiple of: not at all

    def patches(self, pixels):
        import torch

        kernel = self.network.embeddings.patch_embeddings.projection
        return torch.nn.functional.conv2d(pixels, kernel.weight, kernel.bias, stride=self._stride)


class Plain:
    """As the paper and its supplement say it, with the options of a loaded method whose names are retrieved."""

    def __init__(self, method, device: str):
        from transformers import CLIPModel, CLIPTokenizer

        path = networks.locate(method.clip_model, method=method.name)
        self._clip, self._method, self._device = CLIPModel.from_pretrained(path).eval().to(device), method, device
        self._dino = Strided(method._dino.network, method.stride)
        block = names.read_block(method.block)
        self._words = [word for word in names.read_vocabulary(method.vocabulary) if not block(word)]
        self._texts = [self._text(word, CLIPTokenizer.from_pretrained(path)) for word in self._words]

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Masks, bool (N, H, W), and their names."""
        from raypipe.features.clip_masked import squashed

        parts = self._parts(image)
        self._square = squashed(image, self._clip.config.vision_config.image_size)
        left = self._below(0, parts)[1] if self._method.merge else {i: self._named(part) for i, part in parts.items()}
        sides = zip(image.shape[:2], next(iter(parts.values())).shape, strict=True)
        rows, columns = (((np.arange(side) + 0.5) * cells / side).astype(int) for side, cells in sides)
        found = [(part[rows[:, None], columns], word) for part, _, _, word in left.values()]
        return np.stack([mask for mask, _ in found]), [word for _, word in found]

    def _parts(self, image: np.ndarray) -> dict[int, np.ndarray]:
        """Masks at the working size, bool (h, w), by tree id."""
        from raypipe.features.grid import resized
        from raypipe.refiners.crf import dense_crf

        size = self._method.seen_size(image.shape[:2])
        seen = self._dino(resized(image, size), "constant")
        keys = seen.keys[1:].cpu().numpy().astype(np.float64)
        rows = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        cut = cut_tree(rows, self._method.num_parts, self._method.t_dino)
        energies = np.stack([((rows - rows[members].mean(0)) ** 2).sum(1) for members in cut.values()])
        energies = (energies - energies.max(0)).reshape(-1, *seen.grid)
        ups = (np.arange(side) * cells // side for side, cells in zip(size, seen.grid, strict=True))
        down, across = ups
        _, labels = dense_crf(resized(image, size), energies[:, down[:, None], across], device=self._device)
        return {tree_id: labels == i for i, tree_id in enumerate(cut) if (labels == i).any()}

    def _below(self, node: int, parts: dict[int, np.ndarray]) -> tuple[bool, dict]:
        """Whether a node of the tree is there, and what is left of its parts: (mask, embedding, text, word) by id."""
        if node in parts:
            return True, {node: self._named(parts[node])}
        if not any(is_above(node, tree_id) for tree_id in parts):
            return False, {}
        sides = [self._below(child, parts) for child in (2 * node + 1, 2 * node + 2)]
        left = sides[0][1] | sides[1][1]
        if all(there for there, _ in sides):
            (one, *vectors, _), (two, *others, _) = left.values()
            cosines = [cosine(a, b) for a, b in zip(vectors, others, strict=True)]
            if sum(cosines) / 2 >= self._method.tau_merge:
                return True, {node: self._named(one | two)}
        return False, left

    def _named(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        import torch

        method, vision = self._method, self._clip.config.vision_config
        mask = torch.nn.functional.adaptive_avg_pool2d(
            torch.tensor(part, dtype=torch.float32)[None], vision.image_size // vision.patch_size
        )[0].numpy()
        sigma2 = method.sigma2 if method.subtract else None
        options = {"last": method.mask_last_layers, "sigma2": sigma2}
        embedding = clip_masked.embedding(self._clip, self._square, mask, **options)
        best = max(range(len(self._words)), key=lambda i: cosine(embedding, self._texts[i]))
        return part, embedding, self._texts[best], self._words[best]

    def _text(self, word: str, tokenizer) -> np.ndarray:
        import torch

        text = names.TEMPLATE.replace("{}", word)
        tokens = tokenizer(text, return_tensors="pt", padding="max_length", truncation=True).to(self._device)
        with torch.inference_mode():
            found = self._clip.text_projection(self._clip.text_model(**tokens).pooler_output)
        return found[0].cpu().numpy()


def cut_tree(rows: np.ndarray, num_parts: int | None, t_dino: float) -> dict[int, np.ndarray]:
    """The rows of each part, int (m,), by tree id: float64 (n, D) cut at the top of its tree (supplement)."""
    from scipy.cluster.hierarchy import to_tree, ward

    tree = to_tree(ward(rows))
    parts, frontier = {0: tree}, {tree.id: (0, tree)}
    for _ in range((num_parts or len(rows)) - 1):
        tree_id, node = frontier.pop(max(frontier))
        if node.is_leaf():
            break
        kids = sorted((node.left, node.right), key=lambda kid: kid.id)
        ids = (2 * tree_id + 1, 2 * tree_id + 2)
        frontier |= {kid.id: (i, kid) for i, kid in zip(ids, kids, strict=True)}
        if tree_id in parts and cosine(*(rows[kid.pre_order()].mean(0) for kid in kids)) <= t_dino:
            del parts[tree_id]
            parts |= dict(zip(ids, kids, strict=True))
    return {tree_id: np.array(node.pre_order()) for tree_id, node in parts.items()}


def is_above(node: int, other: int) -> bool:
    """Whether a node of the tree is among those above another, by their ids."""
    while other > node:
        other = (other - 1) // 2
    return other == node


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))
