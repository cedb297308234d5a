"""ONNX networks laid out as U2-Net."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def write_network(path: Path, *, contrast: float = 1.0) -> Path:
    """An ONNX file laid out as U2-Net: (1, 3, 320, 320) -> (1, 1, 320, 320), sigmoid(contrast * channel mean)."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "contrast"], ["scaled"]),
        helper.make_node("Sigmoid", ["scaled"], ["map"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 320, 320])
    out = helper.make_tensor_value_info("map", TensorProto.FLOAT, [1, 1, 320, 320])
    constant = helper.make_tensor("contrast", TensorProto.FLOAT, [], [contrast])
    graph = helper.make_graph(nodes, "tiny", [image], [out], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def options(folder: Path) -> dict:
    return {"model": str(write_network(folder / "tiny.onnx"))}
