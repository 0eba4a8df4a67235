"""Gates: what the verdicts of one modality rest on, how a cue is scored by one, and how one is kept.

A gate works in its modality's own space: the blocks that the cue fills, scaled so that a dot product of two rows is
their score. There the interaction matrix is the bank (each cue's nearest rows), prototypes of it, or a learned matrix;
log S is taken at the cue, or along the path that the gate's own dynamics takes from it (RecLag, eq. 12), whatever a
request asks of the recall's.

Rules:
- Nothing of a gate depends on the cues that set its threshold but the threshold itself.
- What callers supplied (known cues, negatives) is kept with the gate, so that a recalibration uses it again.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.app.cues import CueBlocks, stack, whole_state
from service.app.encoding import Vectors
from service.app.gate_schemas import CalibrationRecord, LearnedSpec, LearningRecord, PrototypesSpec
from service.app.live import LiveCollection, spaces_of
from service.bank import View
from service.core.gate import boosted, follow, log_mass, prototypes
from service.core.interaction import learning
from service.errors import CalibrationRefused

MARGIN_SHARE = 0.95  # share of the declared cues whose own memory auto β must settle on
SUPPORT = 64  # rows whose mass the gate sums, in calibration and in recall alike
PATH_STEPS = 8  # steps of the gate's own dynamics: it is nearly always at rest after one or two
PATH_VALUES_MAX = 4 * 2**20  # values (16 MB) of rows gathered at once to walk from
INTERACTION_ROWS_MAX = 20_000  # memories that a matrix is made from: five for each of the most prototypes,
INTERACTION_VALUES_MAX = 2**26  # and 256 MB of them
HELD_OUT_SHARE = 0.1  # of the memories that a matrix is learned from, to stop by
LEARN_S_MAX = 60.0  # a matrix that is not learned by then is taken as far as it has come
# Matrices are made the same each time. Not a seed that data may have been made with: noise equal to the stored vectors
# is no noise.
SEED = 0xE17A_CA1B_0C3D


@dataclass(frozen=True, eq=False)
class SuppliedCues:
    """Cues of one modality that a caller sent to calibrate with: space → (n, dimension). `ids`: the memories that known
    cues came from; none for negatives.
    """

    vectors: Vectors
    ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, cues: Sequence[CueBlocks], ids: Sequence[str] = ()) -> SuppliedCues:
        return cls({name: block.numpy() for name, block in stack(cues).items()}, tuple(ids))

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))

    def tensors(self, rows: slice | Sequence[int] = slice(None)) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(block[rows])) for name, block in self.vectors.items()}

    def packed(self) -> dict[str, Any]:
        return {"ids": list(self.ids), "vectors": {name: _pack(block) for name, block in self.vectors.items()}}

    @classmethod
    def unpacked(cls, live: LiveCollection, packed: Mapping[str, Any]) -> SuppliedCues:
        blocks = {name: _unpack(block, live.spaces[name].dimension) for name, block in packed["vectors"].items()}
        return cls(blocks, tuple(packed["ids"]))


@dataclass(frozen=True, eq=False)
class Gate:
    """A calibration record with what it stands on, which is kept but not shown.

    interaction: the matrix, (memories, d) in the gate's space; None is the bank. opposed: O, the negatives that the
    score is boosted with, (negatives, d), over a background. known, negatives: what callers supplied.
    """

    record: CalibrationRecord
    interaction: Tensor | None = None
    opposed: Tensor | None = None
    log_background: float = -math.inf
    known: SuppliedCues | None = None
    negatives: SuppliedCues | None = None

    @property
    def plain(self) -> bool:
        """Whether the score is the mass of the bank's nearest rows at the cue, and no more."""
        return self.interaction is None and self.opposed is None and self.record.when == "cue"

    def packed(self) -> dict[str, Any]:
        """As JSON, for storage."""
        return {
            **self.record.model_dump(mode="json"),
            "matrix": None if self.interaction is None else _pack(self.interaction.numpy()),
            "known_cues": None if self.known is None else self.known.packed(),
            "negative_cues": None if self.negatives is None else self.negatives.packed(),
        }

    @classmethod
    def unpacked(cls, live: LiveCollection, packed: Mapping[str, Any]) -> Gate:
        record = CalibrationRecord.model_validate(packed)
        spaces = spaces_of(record.modality)
        matrix = packed.get("matrix") or packed.get("prototypes")  # the former name of it
        dimension = sum(live.spaces[name].dimension for name in spaces)
        known, negatives = (
            SuppliedCues.unpacked(live, kept) if (kept := packed.get(name)) else None
            for name in ("known_cues", "negative_cues")
        )
        gate = cls(
            record,
            None if matrix is None else torch.from_numpy(_unpack(matrix, dimension)),
            known=known,
            negatives=negatives,
        )
        against = record.negatives
        if against is None or against.log_background is None:
            return gate
        return gate.boosted(live, against.boosting, against.log_background)

    def boosted(self, live: LiveCollection, boosting: int, log_background: float) -> Gate:
        """With the first `boosting` of its negatives in the score."""
        assert self.negatives is not None
        opposed = in_gate_space(live, self.negatives.tensors(slice(boosting)))
        return replace(self, opposed=opposed, log_background=log_background)

    @property
    def log_against(self) -> float:
        """log(N_o + b): what the score is less by at the origin."""
        return 0.0 if self.opposed is None else float(np.logaddexp(math.log(len(self.opposed)), self.log_background))


def in_gate_space(live: LiveCollection, cue: Mapping[str, Tensor]) -> Tensor:
    """Cues as rows of their modality's space, (batch, d)."""
    return weighted(live, whole_state(live, cue)[0], tuple(cue))


def weighted(live: LiveCollection, patterns: Tensor, spaces: Sequence[str]) -> Tensor:
    """The blocks of `spaces` out of (…, d) normalised patterns, scaled so that a dot product of two rows is their
    score.
    """
    total = sum(live.weights_of(spaces).values())
    parts = zip(live.spaces.values(), torch.split(patterns, list(live.blocks.widths), dim=-1), strict=True)
    return torch.cat([part * math.sqrt(s.weight / total) for s, part in parts if s.name in spaces], dim=-1)


def log_masses(
    live: LiveCollection, gate: Gate, view: View, cue: Mapping[str, Tensor], rows: Tensor, similarities: Tensor
) -> Tensor:
    """log S at the states the gate looks at, (batch, times) float64, less log S_O where it knows negatives. A cue's
    least is its score.

    rows, similarities: each cue's nearest `SUPPORT` rows of the bank and their scores, -1 and -∞ padded.
    """
    beta = gate.record.gate_beta
    assert beta is not None  # every record that has come to scoring has one
    on_path = gate.record.when == "path"
    if gate.interaction is None and gate.opposed is None and not on_path:
        return log_mass(similarities, beta).unsqueeze(-1)
    state = in_gate_space(live, cue)
    if gate.interaction is None and not on_path:
        assert gate.opposed is not None
        return boosted(log_mass(similarities, beta), state @ gate.opposed.T, beta, gate.log_background).unsqueeze(-1)
    steps = PATH_STEPS if on_path else 0
    if gate.interaction is not None:
        path = follow(
            gate.interaction, state, beta, steps_max=steps, negatives=gate.opposed, log_background=gate.log_background
        )
        paths = [path.log_masses]
    else:
        size = max(1, PATH_VALUES_MAX // (rows.shape[1] * live.layout.dimension))
        paths = [
            follow(
                weighted(live, view.gather(some), tuple(cue)), start, beta, steps_max=steps, valid=some >= 0,
                negatives=gate.opposed, log_background=gate.log_background,
            ).log_masses
            for some, start in zip(torch.split(rows, size), torch.split(state, size), strict=True)
        ]  # fmt: skip
    times = max(path.shape[1] for path in paths)  # a path at rest repeats its last value
    return torch.cat([torch.cat([path, path[:, -1:].expand(-1, times - path.shape[1])], dim=1) for path in paths])


def make_interaction(
    live: LiveCollection,
    view: View,
    spec: PrototypesSpec | LearnedSpec,
    spaces: Sequence[str],
    beta: float,
    beat: Callable[[], None],
    without: Tensor | None = None,
) -> tuple[Tensor, LearningRecord | None]:
    """The interaction matrix that `spec` asks for, of the memories in `spaces`; `without`: rows left out.

    `beat` is called now and then, and ends the work by raising. Raises CalibrationRefused where there are too few
    memories.
    """
    count = spec.prototypes if isinstance(spec, PrototypesSpec) else spec.learned
    most = min(INTERACTION_ROWS_MAX, INTERACTION_VALUES_MAX // live.layout.dimension)
    rows = view.sample(most, SEED)
    rows = rows[~view.lacking(list(spaces), rows)]
    if without is not None:
        rows = rows[~torch.isin(rows, without)]
    learned = isinstance(spec, LearnedSpec)
    needed = math.ceil(count / (1.0 - HELD_OUT_SHARE)) if learned else count
    if rows.shape[0] < needed:
        what = f"a matrix of {count} learned memories needs" if learned else f"{count} prototypes need"
        bound = f", of which {most} at most are used" if view.count > most else ""
        raise CalibrationRefused(
            f"{what} n >= {needed} memories that fill {'+'.join(spaces)}, has {rows.shape[0]}{bound}"
        )
    patterns = weighted(live, view.gather(rows[None])[0], spaces)
    beat()
    if not learned:
        return prototypes(patterns, count, SEED).float(), None
    began = time.monotonic()
    for best in learning(patterns, count, beta, held_out_share=HELD_OUT_SHARE, seed=SEED):
        reached = best
        beat()
        if time.monotonic() - began > LEARN_S_MAX:
            break
    record = LearningRecord(
        patterns=rows.shape[0], rounds=len(reached.curve) - 1, best_round=reached.best_round,
        seconds=round(time.monotonic() - began, 2), log_likelihood=list(reached.held_out_curve),
    )  # fmt: skip
    return reached.matrix.float(), record


def _pack(values: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def _unpack(packed: str, dimension: int) -> NDArray[np.float32]:
    return np.frombuffer(bytearray(base64.b64decode(packed)), dtype="<f4").reshape(-1, dimension)
