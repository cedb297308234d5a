"""Networks in the files that their authors published, read into transformers' models with nothing left at random.

DINO, iBOT, DeiT and MAE (plain ViTs), DeiT with a distillation token, such as the one of ReCo that was trained on
Stylized ImageNet, MoCo-v3, and DINOv2 with and without registers. Tensors may have the authors'
names, those of transformers' files or those of its modules; they may be wrapped, as training checkpoints are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe import networks
from raypipe.lookup import one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# The first of these that holds tensors is unwrapped.
WRAPPERS = ("teacher", "state_dict", "segmenter_state_dict", "model", "student", "decoder")
PREFIXES = re.compile(r"^((module|backbone)\.)+")
MOCO = "base_encoder."  # of MoCo-v3, whose momentum encoder and predictor lie beside
DROPPED = re.compile(r"^(head|predictor|pooler|decoder|masked_embed|momentum_encoder)")  # of training, not features
KINDS = {"vit": "ViTModel", "deit": "DeiTModel"}
KINDS |= {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
UNPOOLED = ("vit", "deit")  # of KINDS, whose pooling layer is to be left out
HEAD = 64  # channels of an attention head of every published DINO, iBOT and DINOv2
MOCO_HEADS = 12  # of MoCo-v3's ViT-S, whose heads have 32 channels, and of its ViT-B
EPS = 1e-6  # of every LayerNorm in all of them
SIDES = {"patch_size": "patch", "embed_dim": "width", "hidden_size": "width", "depth": "depth"}  # of a settings file
SIDES |= {"num_hidden_layers": "depth", "num_heads": "heads", "num_attention_heads": "heads"}

# From the authors' names, and those of transformers' modules, to those of transformers' files.
RENAMED = (
    (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^(blocks|layers)\.", "encoder.layer."),
    (r"\.attn\.proj\.|\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.([qkv])_proj\.", lambda found: f".attention.attention.{PARTS['qkv'.index(found[1])]}."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
PARTS = ("query", "key", "value")
PLAIN = (  # further ones of a network without layer scale
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"(\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)


def checkpoint(path: Path, *, method: str) -> Path | None:
    """The one checkpoint file that a path of `networks.locate` leads to; None for a folder that transformers wrote.

    Raises ValueError for a folder of several files.
    """
    if path.is_file():
        return path
    if "model_type" in settings(path, method=method):
        return None
    files = sorted(file for kind in networks.WEIGHTS for file in path.glob(kind))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{method}: {path} has no config.json of transformers and {len(files)} files ({names}); name one"
        )
    return files[0]


def read(file: Path, *, method: str, device: str) -> PreTrainedModel:
    """The network in a checkpoint file, in float32 on the device.

    Its size is read off the shapes, but for the number of heads: one per 64 channels, or what `num_heads` in an
    arch.json or config.json beside the file says. Raises ValueError for anything else.
    """
    return build(tensors(file, method=method), method=method, file=file).to(device)


def tensors(file: Path, *, method: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, unwrapped. Raises ValueError where it holds none.

    Nothing that a file says is executed. Of Python's own only argparse's Namespace is read, which whole checkpoints of
    DINO, MAE and MOVE keep their settings in.
    """
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's, safetensors' and torch's own kinds
        text = f"is not a checkpoint that can be read safely ({one_line(error)})"
        raise ValueError(f"{method}: {file} {text}") from error
    while isinstance(state, Mapping):
        inner = next((state[name] for name in WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    found = {}
    if isinstance(state, Mapping):
        found = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not found:
        raise ValueError(f"{method}: {file} holds no tensors by name")
    return found


def build(
    found: Mapping[str, torch.Tensor], *, method: str, file: Path, heads: int | None = None
) -> PreTrainedModel:  # fmt: skip
    """The network of an original checkpoint's tensors, on the CPU.

    file: named in errors; an arch.json or config.json beside it counts. heads: instead of what `read` goes by. Raises
    ValueError where a tensor is missing, left over or of another shape.
    """
    import transformers

    told = {SIDES[name]: value for name, value in settings(file.parent, method=method).items() if name in SIDES}
    try:
        is_moco = any(PREFIXES.sub("", name).startswith(MOCO) for name in found)
        renamed = as_transformers(found, is_moco=is_moco)
        heads = heads or told.pop("heads", MOCO_HEADS if is_moco else None)
        family, sizes = _architecture(renamed, heads)
        for name, value in told.items():
            if value != sizes[name]:
                raise ValueError(f"its {name} is {sizes[name]}, {file.parent} says {value!r}")
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        text = f"is no checkpoint of a vision transformer such as DINO, iBOT or DINOv2: {why}"
        raise ValueError(f"{method}: {file} {text}") from error
    kind = getattr(transformers, KINDS[family])
    options = {"add_pooling_layer": False} if family in UNPOOLED else {}
    config = kind.config_class(**_config(family, sizes))
    return networks.pretrained(kind, file, method=method, device="cpu", config=config, state_dict=renamed, **options)


def settings(folder: Path, *, method: str) -> dict:
    """What arch.json and config.json in a folder say; {} without one. Raises ValueError for what is none."""
    found = {}
    for file in (folder / "arch.json", folder / "config.json"):
        if file.is_file():
            try:
                found |= json.loads(file.read_bytes())
            except (ValueError, TypeError, RecursionError) as error:  # no JSON, or not by name
                raise ValueError(f"{method}: {file} cannot be read as a configuration: {one_line(error)}") from error
    return found


def as_transformers(found: Mapping[str, torch.Tensor], *, is_moco: bool = False) -> dict[str, torch.Tensor]:
    """The tensors that make the features, under the names of transformers' files, query, key and value apart."""
    import torch

    named = {PREFIXES.sub("", name): tensor for name, tensor in found.items()}
    if is_moco:
        named = {name.removeprefix(MOCO): tensor for name, tensor in named.items() if name.startswith(MOCO)}
    named = {name: tensor for name, tensor in named.items() if not DROPPED.match(name)}
    is_plain = not any("ls1." in name or "layer_scale1." in name for name in named)
    rules, renamed = RENAMED + (PLAIN if is_plain else ()), {}
    for name, tensor in named.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if is_plain and name == "embeddings.mask_token":
            continue  # of training; a DINOv2 of transformers has it
        before, qkv, after = name.partition(".attn.qkv.")
        if not qkv:
            renamed[name] = tensor
            continue
        for part, rows in zip(PARTS, torch.chunk(tensor, 3), strict=True):
            renamed[f"{before}.attention.attention.{part}.{after}"] = rows
    return _with_joined_gates(renamed)


def _with_joined_gates(renamed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with gate and values of a SwiGLU joined, which transformers' modules have apart and its files not."""
    import torch

    for name in [name for name in renamed if ".mlp.gate_proj." in name]:
        halves = [renamed.pop(name), renamed.pop(name.replace("gate_proj", "up_proj"))]
        renamed[name.replace("gate_proj", "weights_in")] = torch.cat(halves)
        rest = name.replace("gate_proj", "down_proj")
        renamed[rest.replace("down_proj", "weights_out")] = renamed.pop(rest)
    return renamed


def _architecture(renamed: Mapping[str, torch.Tensor], heads: int | None) -> tuple[str, dict]:
    """The family of a network and its sizes, read off the shapes of its tensors."""
    shape = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    width = shape["embeddings.cls_token"][-1]
    patch = shape["embeddings.patch_embeddings.projection.weight"][-1]
    is_distilled = "embeddings.distillation_token" in shape
    positions = shape["embeddings.position_embeddings"][1] - 1 - is_distilled
    side = round(positions**0.5)
    if side * side != positions:
        raise ValueError(f"its positions are those of {positions} patches, which is no square")
    numbers = [int(found[1]) for name in shape if (found := re.match(r"encoder\.layer\.(\d+)\.", name))]
    depth = max(numbers) + 1
    if depth > networks.MAX_LAYERS:
        raise ValueError(f"it has {depth:,} blocks")
    if heads is None and width % HEAD:
        raise ValueError(f"{width} channels are no multiple of {HEAD}: say `num_heads` in an arch.json beside the file")
    heads = heads or width // HEAD
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{width} channels cannot be divided among {heads!r} heads")
    first = "encoder.layer.0."
    registers = shape.get("embeddings.register_tokens", (1, 0))[1]
    is_scaled, has_gate = f"{first}layer_scale1.lambda1" in shape, f"{first}mlp.weights_in.weight" in shape
    family = ("dinov2_with_registers" if registers else "dinov2") if is_scaled else UNPOOLED[is_distilled]
    inner = f"{first}mlp.fc1.weight" if is_scaled else f"{first}intermediate.dense.weight"
    hidden = 4 * width if has_gate else shape[inner][0]
    bias = f"{first}attention.attention.query.bias" in shape
    sizes = {"width": width, "patch": patch, "side": side, "depth": depth, "heads": heads, "hidden": hidden}
    return family, sizes | {"registers": registers, "has_gate": has_gate, "bias": bias}


def _config(family: str, sizes: dict) -> dict:
    """The same as settings of transformers."""
    config = {
        "hidden_size": sizes["width"], "num_hidden_layers": sizes["depth"], "num_attention_heads": sizes["heads"],
        "patch_size": sizes["patch"], "image_size": sizes["side"] * sizes["patch"], "qkv_bias": sizes["bias"],
        "layer_norm_eps": EPS,
    }  # fmt: skip
    if family in UNPOOLED:
        return config | {"intermediate_size": sizes["hidden"]}
    config |= {"mlp_ratio": sizes["hidden"] // sizes["width"], "use_swiglu_ffn": sizes["has_gate"]}
    return config | ({"num_register_tokens": sizes["registers"]} if family == "dinov2_with_registers" else {})
