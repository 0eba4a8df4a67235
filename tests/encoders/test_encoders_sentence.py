"""Texts alone: the packaged model, and a small BERT saved here as sentence-transformers saves it."""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from service.encoders import minilm, registry, sentence
from service.encoders.protocol import Decoder, Encoder, Picture
from service.errors import EmptyText, InvalidRequest, OutOfMemory, WeightsMissing, WeightsRefused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries' own imports say
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the `sentences` extra is missing")
    import transformers
    from sentence_transformers.models import Pooling, Transformer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "and", "two", "##s", "query", ":"]
WIDTH, LENGTH = 16, 12
TEXTS = ["a cat", "two dogs and a cat", "dog", "a dog and a cat and a dog"]


def saved(folder: Path, seed: int = 0, pooling: str = "mean", **config: Any) -> Any:
    """A BERT with random weights, in the format of sentence-transformers."""
    torch.manual_seed(seed)
    plain = folder / "plain"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
    made = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=WIDTH, **{**sizes, **config})
    model = transformers.BertModel(made)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.5)
    model.save_pretrained(plain)
    (plain / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(plain / "vocab.txt")).save_pretrained(plain)
    modules = [Transformer(str(plain), max_seq_length=LENGTH), Pooling(WIDTH, pooling_mode=pooling)]
    whole = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    whole.save(str(folder / "model"))
    shutil.rmtree(plain)
    return whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sentence")
    return folder / "model", saved(folder)


def made(folder: Path, **options: object) -> Encoder:
    return registry.make("sentence", {"model": str(folder), **options})


def test_the_packaged_one_needs_nothing() -> None:
    encoder = registry.make("sentence", {})
    assert isinstance(encoder, Encoder)
    assert not isinstance(encoder, Decoder)
    assert (encoder.takes, encoder.dimension) == (frozenset({"text"}), 384)
    found = encoder.encode_texts(["a cat on a mat", "a kitten on a rug", "the rate of interest"]).vectors
    np.testing.assert_array_equal(found, minilm.MiniLM(1).encode(["a cat on a mat", "a kitten on a rug",
                                                                  "the rate of interest"]).vectors)  # fmt: skip
    assert found[0] @ found[1] > 0.5 > 0.2 > found[0] @ found[2]
    assert encoder.encode_texts(["cat " * 300]).warnings[0][0].startswith("text cut to the model's length: 256 of")
    with pytest.raises(InvalidRequest, match="texts only"):
        encoder.encode_images([Picture(np.zeros((2, 2, 3), dtype=np.uint8))])
    with pytest.raises(InvalidRequest, match="`precision` goes with `model`"):
        registry.make("sentence", {"precision": "fp16"})


def test_its_rows_are_the_models_own(model: tuple[Path, Any]) -> None:
    encoder = made(model[0])
    assert encoder.dimension == WIDTH
    found = encoder.encode_texts(TEXTS).vectors
    np.testing.assert_allclose(found, model[1].encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS[1:2]).vectors[0], found[1], atol=1e-5)
    assert encoder.encode_texts([]).vectors.shape == (0, WIDTH)
    with pytest.raises(EmptyText):
        encoder.encode_texts(["a cat", " \n"])


def test_what_is_lost_of_a_text_is_told(model: tuple[Path, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert made(model[0]).encode_texts(["a cat", "a dog and " * 5, "кошка 猫 cat"]).warnings == (
        (),
        (f"text cut to the model's length: {LENGTH} of 17 tokens kept",),
        ("2 of 5 tokens are unknown to the model: it was not trained on such text",),
    )
    assert "longer than" not in caplog.text  # the library says, wrongly, that such a text will not go


def test_a_prompt_of_the_model_is_put_before_every_text_and_counted(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    whole.prompts, whole.default_prompt_name = {"query": "query: "}, "query"
    whole.save(str(tmp_path / "prompted"))
    prompted, bare = made(tmp_path / "prompted"), made(tmp_path / "model")
    expected = bare.encode_texts(["query: a cat"])
    np.testing.assert_allclose(prompted.encode_texts(["a cat"]).vectors, expected.vectors, atol=1e-5)
    assert prompted.encode_texts(["a cat " * 4]).warnings != ()
    assert bare.encode_texts(["a cat " * 5]).warnings == ((),)
    assert prompted.encode_texts(["a cat " * 5]).warnings[0][0].endswith("12 of 14 tokens kept")
    assert prompted.fingerprint != bare.fingerprint


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("bf16", 0.06)])
def test_half_precision_is_near_and_another_fingerprint(precision: str, error: float, model: tuple[Path, Any]) -> None:
    full, half = made(model[0]), made(model[0], precision=precision)
    expected, found = full.encode_texts(TEXTS).vectors, half.encode_texts(TEXTS).vectors
    assert found.dtype == np.float32
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < error
    assert half.fingerprint != full.fingerprint


def test_the_fingerprint_is_of_all_that_decides_the_numbers(model: tuple[Path, Any], tmp_path: Path) -> None:
    own = made(model[0]).fingerprint
    shutil.copytree(model[0], tmp_path / "copy")
    assert made(tmp_path / "copy").fingerprint == own
    others = {"seed": {"seed": 1}, "heads": {"num_attention_heads": 4}, "pooling": {"pooling": "max"}}
    prints = {own}
    for name, change in others.items():
        saved(tmp_path / name, **change)
        prints.add(made(tmp_path / name / "model").fingerprint)
    shutil.copytree(model[0], tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    file.write_text(json.dumps(words))
    prints.add(made(tmp_path / "words").fingerprint)
    assert len(prints) == 5


def test_many_threads_get_the_rows_of_one(model: tuple[Path, Any]) -> None:
    encoder = made(model[0])
    expected = [encoder.encode_texts([text]).vectors for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: encoder.encode_texts([TEXTS[i % 4]]).vectors, range(64)))
    for i, rows in enumerate(found):
        np.testing.assert_allclose(rows, expected[i % 4], atol=1e-5)


def test_a_batch_that_does_not_fit_is_halved(model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = made(model[0])
    assert isinstance(encoder, sentence.SentenceModel)
    texts = [" ".join(["cat"] * count) for count in (5, 1, 4, 2, 3, 6)]
    expected = encoder.encode_texts(texts).vectors
    whole, runs = encoder._embed, []

    def full(part: list[str], fits: int = 2) -> Any:
        runs.append(len(part))
        if len(part) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(part)

    monkeypatch.setattr(encoder, "_embed", full)
    np.testing.assert_allclose(encoder.encode_texts(texts).vectors, expected, atol=1e-5)
    assert runs == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(encoder, "_embed", lambda part: full(part, fits=0))
    with pytest.raises(OutOfMemory):
        encoder.encode_texts(texts)


# --- weights that are not what they are said to be --------------------------------------------------------------------


def weights_of(folder: Path) -> Path:
    return next(folder.rglob("model.safetensors"))


def test_missing_tensors_are_never_made_up_but_a_pooler_that_is_not_used(tmp_path: Path) -> None:
    saved(tmp_path)
    folder = tmp_path / "model"
    expected = made(folder).encode_texts(TEXTS).vectors
    file = weights_of(folder)
    tensors = load_file(file)
    for name in ("bare", "bare-again", "lacking"):
        shutil.copytree(folder, tmp_path / name)
        lacks = "encoder.layer.0.output.dense" if name == "lacking" else "pooler."
        kept = {key: tensor for key, tensor in tensors.items() if lacks not in key}
        assert len(kept) < len(tensors)
        save_file(kept, tmp_path / name / file.relative_to(folder), {"format": "pt"})
    bare, again = made(tmp_path / "bare"), made(tmp_path / "bare-again")
    np.testing.assert_allclose(bare.encode_texts(TEXTS).vectors, expected, atol=1e-6)
    assert bare.fingerprint == again.fingerprint
    with pytest.raises(WeightsRefused, match=r"lack encoder\.layer\.0\.output\.dense\.bias"):
        made(tmp_path / "lacking")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = next((tmp_path / "model").rglob("config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 32}))
    with pytest.raises(WeightsRefused, match=r"intermediate\.dense\.bias is \(16,\), and \(32,\) is described"):
        made(tmp_path / "model")


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    saved(tmp_path)
    file = weights_of(tmp_path / "model")
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(WeightsRefused, match=r"pickle.*engram convert-weights .*\.bin .*model\.safetensors"):
        made(tmp_path / "model")


def test_what_is_not_there_says_what_the_folder_needs(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"needs what sentence-transformers saves, modules\.json, model\.safet"):
        made(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(WeightsRefused, match="does not list the modules"):
        made(tmp_path)
    with pytest.raises(WeightsMissing, match="no folder"):
        made(Path("/no/such/folder"))
