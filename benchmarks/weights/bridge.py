"""The bridge's trained part: a projection from what EfficientNet-Lite0 sees to what MiniLM means, and the words for its
classes. `python -m benchmarks.weights bridge` makes service/encoders/shipped/bridge.safetensors and its figures.

Strategy: InfoNCE (van den Oord et al. 2018, equation 4; both ways, as CLIP has it) on two kinds of pairs at once:

- drawings and emoji (data.py) with their titles and keywords, `held_out` ones left out;
- **the network's own classes**: the weights of a class's logit are the direction of the features of its photographs, so
  they stand for a photograph of it, paired with its name and its words (imagenet_kinds.txt). No photograph is needed,
  and without these pairs a projection trained on drawings is lost on photographs.

Rules:
- One thread, one seed. Another processor's rounding gives other last digits, so a new file has a new hash, which goes
  into `SHIPPED` of service/encoders/bridge.py.
- Constants of the recipe were chosen on GCompris's photographs, the demo's and the held-out drawings; Tux Paint's
  photographs (captioned.py) are what the figures to quote are measured on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.weights import bridge_judge, data
from service.encoders.bridge import CLASSES, FEATURES, SHIPPED, Eyes, Parts, imagenet_classes
from service.encoders.minilm import DIMENSION, MiniLM
from service.encoders.protocol import Picture

SEED = 0
STEPS = 600
AT_ONCE = 512
RATE = 2e-3
TEMPERATURE = 0.05
DROPPED = 0.2
"""Share of the features set to 0 at random in each step."""

KINDS = Path(__file__).with_name("imagenet_kinds.txt")
FILE = Path(__file__).parents[2] / "service" / SHIPPED.path

Rows = NDArray[np.float32]


def run(results: Path) -> None:
    """Trains, writes the weights, and judges them."""
    eyes, text = Eyes("cpu"), MiniLM(1)
    drawings = (*data.noto(), *data.fluent(), *data.openclipart())
    # One by one: a picture is let go once it was looked at.
    features = np.concatenate([eyes.look([Picture(np.asarray(each.picture()))])[0] for each in drawings])
    started = time.perf_counter()
    parts = made(eyes.class_directions(), text, drawings, features)
    print(f"bridge: trained in {time.perf_counter() - started:.0f} s", flush=True)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(written(parts))
    print(f"bridge: {FILE.stat().st_size:,} bytes, sha256 {hashlib.sha256(FILE.read_bytes()).hexdigest()}", flush=True)
    (results / "bridge.md").write_text(bridge_judge.report(eyes, text, Parts.of(FILE.read_bytes())))


def made(directions: Rows, text: MiniLM, drawings: Sequence[data.TitledPicture], features: Rows) -> Parts:
    """The shipped parts, trained on the drawings that are not held out."""
    words, kinds = class_words()
    word_rows = embedded(text, words)
    class_rows = class_embeddings(text, words, word_rows, kinds)
    kept = [i for i, each in enumerate(drawings) if not data.held_out(each.title)]
    titles, meanings = titled(text, [drawings[i] for i in kept])
    projection, bias = trained(features[kept], titles, meanings, directions, class_rows)
    random = np.random.default_rng(SEED)
    reduction = random.standard_normal((CLASSES, DIMENSION)).astype(np.float32) / np.float32(DIMENSION**0.5)
    return Parts(projection, bias, class_rows, word_rows, kinds, reduction)


def class_words() -> tuple[list[str], NDArray[np.int64]]:
    """The plain words of imagenet_kinds.txt, in order, and (m, 2) pairs of a class and its word."""
    words: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for line in KINDS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        numbers, said = line.split(":")
        for word in map(str.strip, said.split(",")):
            at = words.setdefault(word, len(words))
            for part in numbers.split():
                first, _, last = part.partition("-")
                pairs += [(each, at) for each in range(int(first), int(last or first) + 1)]
    return list(words), np.array(sorted(set(pairs)), dtype=np.int64)


def class_embeddings(text: MiniLM, words: Sequence[str], word_rows: Rows, kinds: NDArray[np.int64]) -> Rows:
    """(1000, 384) unit rows: the mean of a class's name in a prompt, with its words in one, and with their mean."""
    names = imagenet_classes()
    of = [kinds[kinds[:, 0] == i, 1] for i in range(CLASSES)]
    plain = embedded(text, names)
    prompts = text.encode([f"a photo of a {name}" for name in names]).vectors
    told = [", ".join([f"a photo of a {name}", *(words[k] for k in of[i])]) for i, name in enumerate(names)]
    with_mean = np.stack([plain[i] + (word_rows[of[i]].mean(axis=0) if len(of[i]) else 0) for i in range(CLASSES)])
    return _unit(_unit(with_mean) + text.encode(told).vectors + prompts)


def embedded(text: MiniLM, things: Sequence[str]) -> Rows:
    """(n, 384): each thing as "a ..."."""
    return text.encode([f"a {thing}" for thing in things]).vectors


def titled(text: MiniLM, drawings: Sequence[data.TitledPicture]) -> tuple[NDArray[np.int64], Rows]:
    """(n) a number for each title, and (n, 2, 384): the title's embedding, and the mean of its keywords'."""
    things = sorted({word for each in drawings for word in (each.title, *each.keywords)})
    rows = dict(zip(things, embedded(text, things), strict=True))
    keywords = [np.mean([rows[word] for word in each.keywords or (each.title,)], axis=0) for each in drawings]
    titles = np.unique([each.title for each in drawings], return_inverse=True)[1].astype(np.int64)
    return titles, np.stack([np.stack([rows[each.title] for each in drawings]), _unit(np.stack(keywords))], axis=1)


def trained(
    features: Rows,
    titles: NDArray[np.int64],
    meanings: Rows,
    directions: Rows,
    class_rows: Rows,
    steps: int = STEPS,
    at_once: int = AT_ONCE,
) -> tuple[Rows, Rows]:
    """(384, 1280) and (384): the projection of raw features.

    features (n, 1280), titles (n), meanings (n, 2, 384); directions (1000, 1280), class_rows (1000, 384).
    """
    draw = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    centre, spread = features.mean(axis=0), features.std(axis=0) + np.float32(0.05)
    pictures = torch.from_numpy((features - centre) / spread)
    # A direction has no length of its own: it gets a picture's.
    scaled = directions / spread
    scaled *= np.linalg.norm(pictures, axis=1).mean() / np.linalg.norm(scaled, axis=1, keepdims=True)
    classes, class_meanings = torch.from_numpy(scaled), torch.from_numpy(class_rows)
    numbers, said = torch.from_numpy(titles), torch.from_numpy(meanings)
    linear = torch.nn.Linear(FEATURES, DIMENSION)
    optimiser = torch.optim.AdamW(linear.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (at_once,), generator=draw)
        mixed = torch.rand((at_once, 1), generator=draw)
        meant = functional.normalize(said[chosen, 0] * (1 - mixed) + said[chosen, 1] * mixed, dim=1)
        loss = info_nce(linear(functional.dropout(pictures[chosen], DROPPED)), meant, numbers[chosen])
        which = torch.randint(CLASSES, (at_once,), generator=draw)
        loss = loss + info_nce(linear(classes[which]), class_meanings[which], which)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    weight = linear.weight.detach().numpy() / spread
    return weight, linear.bias.detach().numpy() - weight @ centre


def info_nce(pictures: torch.Tensor, meanings: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The mean of both ways' cross-entropies; (n, 384) each, `meanings` at unit length. Others with a pair's own number
    are no wrong answer to it.
    """
    logits = functional.normalize(pictures, dim=1) @ meanings.T / TEMPERATURE
    same = (numbers[:, None] == numbers[None]) & ~torch.eye(len(numbers), dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    own = torch.arange(len(numbers))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def written(parts: Parts) -> bytes:
    """A safetensors file of float16, `Parts.of`'s inverse but for the rounding."""
    tensors = {name: value.astype(np.float16) for name, value in vars(parts).items() if name != "kinds"}
    return safetensors.numpy.save(tensors | {"kinds": parts.kinds.astype(np.int16)})


def _unit(rows: Rows) -> Rows:
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
