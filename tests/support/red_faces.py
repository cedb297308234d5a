"""Networks with the outputs of face detectors, made so that a face is where the image is red."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEIGHT, WIDTH = 48.0, 40.0  # px of CenterFace's faces
OFFSET = (0.25, -0.5)  # of their centres, in cells, as y, x
SIDES = {8: 24.0, 16: 64.0, 32: 96.0}  # px of YuNet's faces by stride


class Graph:
    """Nodes and constants of a network whose input is float32 (1, 3, H, W), as they are added."""

    def __init__(self):
        self.nodes, self.constants, self.outputs = [], [], []

    def node(self, kind: str, inputs: list, name: str, **attributes) -> str:
        names = [
            each if isinstance(each, str) else self._constant(each, f"{name}_{i}") for i, each in enumerate(inputs)
        ]
        self.nodes.append(helper.make_node(kind, names, [name], **attributes))
        return name

    def _constant(self, value: np.ndarray, name: str) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def red(self, channel: int, stride: int, name: str) -> str:
        """The mean of a channel in cells of some pixels, in [0, 1]: (1, 1, H / stride, W / stride)."""
        ends = [np.array([channel]), np.array([channel + 1]), np.array([1])]
        one = self.node("Slice", ["input", *ends], f"{name}_channel")
        mean = self.node("AveragePool", [one], f"{name}_mean", kernel_shape=[stride] * 2, strides=[stride] * 2)
        return self.node("Mul", [mean, np.float32([1 / 255])], name)

    def spread(self, like: str, values: np.ndarray, name: str) -> None:
        """An output with the same values in each cell."""
        none = self.node("Mul", [like, np.zeros(1, np.float32)], f"{name}_none")
        self.node("Add", [none, values.astype(np.float32)], name)

    def write(self, path: Path, outputs: list[str], rank: int) -> Path:
        entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "h", "w"])
        exits = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in outputs]
        graph = helper.make_graph(self.nodes, "red", [entry], exits, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save(model, path)
        return path


def centerface(path: Path, *, outputs=("537", "538", "539", "540")) -> Path:
    """Outputs of CenterFace: a face of HEIGHT x WIDTH px around each cell of 4 px, as red as its score."""
    graph, (heat, sizes, offsets, landmarks) = Graph(), outputs
    graph.red(0, 4, heat)
    graph.spread(heat, np.log(np.array([HEIGHT, WIDTH]) / 4).reshape(1, 2, 1, 1), sizes)
    graph.spread(heat, np.array(OFFSET).reshape(1, 2, 1, 1), offsets)
    graph.spread(heat, np.zeros((1, 10, 1, 1)), landmarks)
    return graph.write(path, list(outputs), 4)


def yunet(path: Path) -> Path:
    """Outputs of YuNet: squares of SIDES px around the corners of cells of 8, 16 and 32 px."""
    graph, outputs = Graph(), []
    for stride, side in SIDES.items():
        mean = graph.red(2, stride, f"red_{stride}")  # the last one of BGR
        cls = graph.node("Reshape", [mean, np.array([1, -1, 1])], f"cls_{stride}")
        graph.spread(cls, np.ones((1, 1, 1)), f"obj_{stride}")
        graph.spread(cls, np.array([0, 0, np.log(side / stride), np.log(side / stride)]), f"bbox_{stride}")
        graph.spread(cls, np.zeros((1, 1, 10)), f"kps_{stride}")
        outputs += [f"{name}_{stride}" for name in ("cls", "obj", "bbox", "kps")]
    return graph.write(path, outputs, 3)
