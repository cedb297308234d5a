"""A face detector that somebody prepared: its file reads no other file, and a part of one is refused."""

import onnx
import pytest
from support import red_faces

from raypipe.pictures import faces


@pytest.mark.parametrize("kind", ["centerface", "yunet"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_part_of_a_file_is_refused(kind, share, tmp_path):
    file = getattr(red_faces, kind)(tmp_path / "whole.onnx")
    content = file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"^faces: .*cut\.onnx is "):
        faces.load(str(tmp_path / "cut.onnx"))


@pytest.mark.parametrize("place", ["secret.bin", "../secret.bin", "{folder}/secret.bin"])
def test_a_file_reads_no_numbers_from_another(place, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model = onnx.load(red_faces.centerface(folder / "center.onnx"))
    tensor = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(tensor).tobytes()
    for at in (folder, tmp_path):
        (at / "secret.bin").write_bytes(values)
    for name in ("float_data", "raw_data", "int64_data", "int32_data"):
        tensor.ClearField(name)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": place.format(folder=tmp_path), "offset": "0", "length": str(len(values))}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (folder / "center.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"^faces: .*center\.onnx takes its numbers from another file"):
        faces.load(str(folder / "center.onnx"))
