"""Data folders that earlier versions of the project wrote are read by this one.

`golden/schema_0003.tar.gz` was made by the version before API keys: a collection of 23 pictures (seeds 0 to 22) in a
space `image` (`pixels`, size 8) and a space `v` of three numbers, with texts and payloads, calibrated.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engram import Client
from service.storage.database import Database

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.tar.gz"))


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name.partition(".")[0])
def test_a_folder_of_an_earlier_version_is_read(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "memories"
    with tarfile.open(golden) as archive:
        archive.extractall(folder, filter="data")
    with Client(path=folder) as client:
        pictures = client.collection("pictures")
        info = pictures.info()
        assert (info.count, info.version, info.calibration.state) == (23, 2, "current")
        found = pictures.recall(image=png(3))
        assert (found.verdict, found.matches[0].id, found.matches[0].text) == ("known", "p3", "picture 3")
        rows = np.random.default_rng(7).standard_normal((24, 3))
        assert pictures.recall(vectors={"v": rows[5].tolist()}, gate=False).matches[0].id == "p5"
        memory = pictures.get("p7")
        assert (memory.text, memory.payload) == ("picture 7", {"n": 7, "tags": ["a"]})
        with Image.open(io.BytesIO(pictures.content("p7"))) as kept, Image.open(io.BytesIO(png(7))) as made:
            assert np.array_equal(np.asarray(kept), np.asarray(made))
        assert pictures.count({"must": [{"key": "tags", "match": "b"}]}) == 7
        pictures.store([{"id": "p23", "image": png(23)}])
        assert pictures.info().version == 3
    Database.open(folder / "engram.db").close()
