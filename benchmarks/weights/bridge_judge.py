"""How well the bridge finds pictures by their captions, and pictures by a part of them: `python -m
benchmarks.weights.bridge_judge` prints it for the weights that are shipped.

A caption's rank is how many pictures are nearer to it than the nearest one that has this caption. `former` is the
bridge as it was before its second version: ConSE of ten classes, "a photo of a ...", of the recipe's central crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.data import MissingData
from benchmarks.weights import captioned, data
from service.encoders.bridge import SHIPPED, Eyes, Parts, imagenet_classes
from service.encoders.minilm import MiniLM
from service.encoders.protocol import Picture

IN = (1, 5, 10)

HEADING = (
    "# The bridge: pictures by their captions, and by a part of themselves",
    "",
    "By `python -m benchmarks.weights bridge`, or `.bridge_judge` for the shipped weights. No caption is stored;",
    "nothing was trained on any of these. Constants were chosen on GCompris's photographs, the demo's and the held-out",
    "drawings: Tux Paint's photographs are the ones to quote. The classes' words were written after these sets had",
    "been sorted by eye.",
    "",
)

Rows = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sight:
    """A set of pictures as the network sees it: captions (n), features (n, 1280), probabilities (n, 1000)."""

    name: str
    captions: Sequence[str]
    features: Rows
    probabilities: Rows
    cropped: Rows
    """(n, 1000): the probabilities of the central crop."""


def main() -> None:
    """Prints the report for the weights that are shipped."""
    print(report(Eyes("cpu"), MiniLM(1), Parts.of(SHIPPED.read())))


def report(eyes: Eyes, text: MiniLM, parts: Parts) -> str:
    """Markdown: both tables; a set that is not on this machine is named with what to install."""
    sets: list[tuple[str, Callable[[], list[captioned.Captioned]]]] = [
        ("Tux Paint's photographs", captioned.stamps),
        ("the same and the drawings among them", lambda: captioned.stamps(drawn=True)),
        ("GCompris's photographs", captioned.gcompris),
        ("the demo's photographs, by caption", lambda: captioned.demo(paraphrased=False)),
        ("the demo's photographs, in other words", lambda: captioned.demo(paraphrased=True)),
        ("drawings and emoji held out", held_out),
    ]
    sights, missing, by_part = [], [], []
    for name, read in sets:
        try:
            pictures = read()
        except MissingData as error:
            missing.append(str(error))
            continue
        sight = seen(eyes, f"{name} ({len(pictures)})", pictures)
        sights.append(sight)
        if "drawings" not in name and "other words" not in name:  # once for each photograph
            by_part += parted(eyes, text, parts, sight, pictures)
    former = text.encode([f"a photo of a {name}" for name in imagenet_classes()]).vectors
    lines = [*HEADING, "| pictures | by | first | in five | in ten |", "|---|---|---|---|---|"]
    for sight in sights:
        for way, scores in ways(text, parts, former, sight).items():
            found = hits(scores, sight.captions)
            lines.append(f"| {sight.name} | {way} | " + " | ".join(f"{each:.2f}" for each in found) + " |")
    lines += ["", "| cue | former | bridge |", "|---|---|---|", *by_part, "", *missing]
    return "\n".join(lines).strip() + "\n"


def held_out() -> list[captioned.Captioned]:
    """The drawings and emoji that are never trained on, by their titles."""
    drawings = (*data.noto(), *data.fluent(), *data.openclipart())
    judged = [each for each in drawings if data.held_out(each.title)]
    return [captioned.Captioned(each.source, each.title, np.asarray(each.picture())) for each in judged]


def seen(eyes: Eyes, name: str, pictures: Sequence[captioned.Captioned]) -> Sight:
    """The network's sight of photographs, whole and cropped."""
    features, probabilities = eyes.look([Picture(each.pixels) for each in pictures])
    cropped = eyes.look([Picture(crop(each.pixels)) for each in pictures])[1]
    return Sight(name, [each.caption for each in pictures], features, probabilities, cropped)


def ways(text: MiniLM, parts: Parts, former: Rows, sight: Sight) -> dict[str, Rows]:
    """(captions, pictures) inner products by each part alone, and by all of the bridge."""
    said = text.encode(sight.captions).vectors
    scores = {"former": said @ former_vectors(sight.cropped, former).T}
    scores["classes alone"] = parts.evoked(said) @ np.sqrt(sight.probabilities).T
    scores["ConSE alone"] = said @ parts.conse(sight.probabilities).T
    scores["projection alone"] = said @ parts.projected(sight.features).T
    named = replace(parts, classes=former, kinds=np.empty((0, 2), dtype=np.int64))
    for way, each in (("bridge, without the classes' words", named), ("**bridge**", parts)):
        scores[way] = each.text_vectors(said) @ each.image_vectors(sight.features, sight.probabilities).T
    return scores


def hits(scores: Rows, captions: Sequence[str]) -> tuple[float, ...]:
    """The shares of captions whose picture is first, among five and among ten."""
    ranks = np.empty(len(captions), dtype=np.int64)
    for row, caption in enumerate(captions):
        right = np.array([other == caption for other in captions])
        ranks[row] = (scores[row] > scores[row][right].max()).sum()
    return tuple(float((ranks < count).mean()) for count in IN)


def parted(eyes: Eyes, text: MiniLM, parts: Parts, sight: Sight, pictures: Sequence[captioned.Captioned]) -> list[str]:
    """Rows of the second table: how many pictures are the nearest to their own left half, and to their own window."""
    prompts = text.encode([f"a photo of a {name}" for name in imagenet_classes()]).vectors
    now = parts.image_vectors(sight.features, sight.probabilities)
    then = former_vectors(sight.cropped, prompts)
    lines = []
    for what, cut in (("left half", left_half), ("middle window of 30%", window)):
        pieces = [cut(each.pixels) for each in pictures]
        features, probabilities = eyes.look([Picture(each) for each in pieces])
        cropped = eyes.look([Picture(crop(each)) for each in pieces])[1]
        own = np.arange(len(pictures))
        before = (then @ former_vectors(cropped, prompts).T).argmax(axis=0) == own
        after = (now @ parts.image_vectors(features, probabilities).T).argmax(axis=0) == own
        lines.append(f"| {sight.name.split(',')[0]}: {what} | {before.sum()} | {after.sum()} of {len(own)} |")
    return lines


def former_vectors(probabilities: Rows, prompts: Rows) -> Rows:
    """(n, 1000) and (1000, 384) → (n, 384) at unit length."""
    kept = np.argpartition(-probabilities, 10, axis=1)[:, :10]
    rows = np.einsum("bk,bkd->bd", np.take_along_axis(probabilities, kept, axis=1), prompts[kept])
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def crop(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The recipe's square: the central 224/256 of the shorter side."""
    height, width = pixels.shape[:2]
    side = max(1, int(224 / 256 * min(height, width)))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return pixels[top : top + side, left : left + side]


def left_half(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What `visible_part` shows of a picture whose right half is masked."""
    return pixels[:, : (pixels.shape[1] + 1) // 2]


def window(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle 30% of the area, in the picture's proportions."""
    height, width = (max(1, round(extent * 0.3**0.5)) for extent in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


if __name__ == "__main__":
    main()
