"""Dense recall of many cues at many β: the engine's dynamics, with what they share worked out once.

Strategy: the scores of a step are ⟨ξ, x⟩ for dot, 2⟨ξ, x⟩ - ‖ξ‖² for L2 (-‖ξ - x‖² but for ‖x‖², which all rows share)
and ⟨ξ, x⟩/‖ξ‖ for cosine: one matrix product for all three, and at the cue for every β. A state that has come to lie
on one memory is scored once for all the cues and β that reached it. All that follows is the engine's own: `separate`,
`association`, `softmax_bound`. `retrieve`, asked one β at a time, gives the same (tests/papers), in some fifty times
the time at 60,000 memories.

Rules:
- All rows take part. Where `softmax_bound` certifies that the rows after the best few have at most `MASS` together,
  which float32 would lose in the sum, the mean is taken of the best few.
- A cue has settled as in `retrieve`: a whole step leads nowhere, to a relative `EPS`.
- What is recalled is read out once at the end, Σ p_μ v_μ over the memories' values, p at the settled state: the stored
  patterns as they are (under cosine the dynamics itself runs on unit rows), or what is to be drawn of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.core.certificate import softmax_bound
from service.core.names import Similarity
from service.core.separation import separate
from service.core.update import association

MASS = 1e-7
EPS = 1e-4

# So many steps at most; what moves after these is a mean of many memories. (HEN's number is lost from its text.)
STEPS_MAX = 10

# Supports that are tried before all rows are taken.
_SUPPORTS = (4, 64)

# Values of scores, or of gathered patterns, held at once: 128 MB of float32.
_VALUES_AT_ONCE = 2**25


@dataclass(frozen=True, eq=False)
class Bank:
    """Stored patterns (n, d) float32 as the encoder gave them; ‖ξ‖² and ‖ξ‖ of each, (n,)."""

    patterns: Tensor
    squares: Tensor
    norms: Tensor

    @classmethod
    def of(cls, patterns: Tensor) -> Bank:
        """The bank of these patterns."""
        squares = patterns.double().square().sum(-1)
        return cls(patterns, squares.float(), squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny).float())

    def __len__(self) -> int:
        return len(self.patterns)

    def first(self, rows: int) -> Bank:
        """The bank of the first so many memories."""
        return Bank(self.patterns[:rows], self.squares[:rows], self.norms[:rows])

    def products(self, states: Tensor) -> Tensor:
        """⟨ξ, x⟩ of every state (b, d) with every row, (b, n)."""
        products: Tensor = states @ self.patterns.T
        return products

    def scores(self, products: Tensor, similarity: Similarity) -> Tensor:
        """From ⟨ξ, x⟩ (b, n) to what ranks rows and is multiplied by β: K(ξ, x) up to a term that all rows share."""
        match similarity:
            case "dot":
                return products
            case "cosine":
                cosines: Tensor = products / self.norms
                return cosines
            case "neg_l2":
                return 2 * products - self.squares


def first_scores(bank: Bank, products: Tensor, cues: Tensor, similarity: Similarity) -> Tensor:
    """K at the cue, up to a term that all rows share: cosine takes the cue's norm too."""
    scored = bank.scores(products, similarity)
    if similarity != "cosine":
        return scored
    lengths: Tensor = torch.linalg.vector_norm(cues, dim=-1, keepdim=True)
    return scored / lengths.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class Settled:
    """What every β reached from every cue.

    first: (cues,) the row of largest score at the cue. heaviest, weight: (betas, cues) the row of largest weight at the
    settled state, and that weight. nearest: (betas, cues) the row nearest to the settled state. recalled: (betas,
    pictures, k) the read-out for the first so many cues. trail: (times, betas, pictures, k) what is read out at the
    cue and after each step, if asked for.
    """

    first: Tensor
    heaviest: Tensor
    weight: Tensor
    nearest: Tensor
    recalled: Tensor
    trail: Tensor | None


def settle(
    bank: Bank,
    scored: Tensor,
    cues: Tensor,
    betas: Sequence[float],
    similarity: Similarity,
    *,
    pictures: int,
    values: Tensor | None = None,
    steps_max: int = STEPS_MAX,
    trail: bool = False,
) -> Settled:
    """`scored` (cues, n) are `first_scores` of the cues (cues, d). `pictures`: how many of the cues are read out.
    `values` (n, k): what is read out; the patterns if not given.
    """
    count, width = cues.shape
    values = bank.patterns if values is None else values
    beta = torch.tensor(betas, dtype=torch.float32).repeat_interleave(count)
    scale = 1 / bank.norms if similarity == "cosine" else None
    state = (cues if scale is None else torch.nn.functional.normalize(cues, dim=-1)).repeat(len(betas), 1)
    wanted = torch.arange(count).repeat(len(betas)) < pictures

    heaviest = torch.zeros(len(beta), dtype=torch.int64)
    weight, nearest = torch.zeros(len(beta)), heaviest.clone()
    recalled = torch.zeros(len(beta), values.shape[1])
    on = torch.full((len(beta),), -1)  # the memory that a state lies on, if on one
    moving = torch.arange(len(beta))
    trails: list[Tensor] = []
    for step in range(steps_max + 1):
        whole = torch.zeros(len(moving), width)
        reached = torch.full((len(moving),), -1)
        at_rest = torch.zeros(len(moving), dtype=torch.bool)
        for some, lines, scores in _scored(bank, scored if step == 0 else None, state, on, moving, similarity):
            pairs = moving[some]
            best = scores.topk(min(max(_SUPPORTS), len(bank)), dim=-1)
            whole[some], weight[pairs] = _associated(bank.patterns, scores, best, lines, beta[pairs], scale)
            heaviest[pairs], nearest[pairs] = best.indices[lines, 0], _nearest(bank, scores, similarity)[lines]
            reached[some] = torch.where(weight[pairs] >= 1 - MASS, heaviest[pairs], -1)
            at_rest[some] = _at_rest(state[pairs], whole[some])
            # What is read out costs a step, so it is where the dynamics ends, unless every step is asked for.
            ended = wanted[pairs] & (at_rest[some] | (step == steps_max) | trail)
            recalled[pairs[ended]], _ = _associated(values, scores, best, lines[ended], beta[pairs[ended]], None)
        if trail:
            trails.append(recalled.clone())
        if step == steps_max:
            break
        state[moving], on[moving] = whole, reached
        moving = moving[~at_rest]
        if not len(moving) and not trail:
            break
    shape = (len(betas), count)
    keep = wanted.reshape(shape)[0]
    drawn = recalled.reshape(*shape, -1)[:, keep]
    return Settled(
        first=scored.argmax(-1),
        heaviest=heaviest.reshape(shape),
        weight=weight.reshape(shape),
        nearest=nearest.reshape(shape),
        recalled=drawn,
        trail=torch.stack([each.reshape(*shape, -1)[:, keep] for each in trails]) if trail else None,
    )


def _scored(
    bank: Bank, scored: Tensor | None, state: Tensor, on: Tensor, moving: Tensor, similarity: Similarity
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """In portions: places in `moving` (m,), the line of each (m,), and the lines' scores (lines, n). Each distinct
    state is scored once; at the cue (`scored`) a line is a cue.
    """
    if scored is not None:
        yield torch.arange(len(moving)), moving % len(scored), scored
        return
    lies = on[moving]
    held, line = torch.unique(torch.where(lies >= 0, lies, -1 - torch.arange(len(lies))), return_inverse=True)
    portion = max(1, _VALUES_AT_ONCE // len(bank))
    for start in range(0, len(held), portion):
        some = torch.nonzero((line >= start) & (line < start + portion))[:, 0]
        lines = line[some] - start
        one = torch.zeros(int(lines.max()) + 1, dtype=torch.int64).scatter_(0, lines, some)
        yield some, lines, bank.scores(bank.products(state[moving[one]]), similarity)


def _associated(
    values: Tensor, scores: Tensor, best: torch.return_types.topk, lines: Tensor, beta: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(m, k) Σ p v and (m,) the largest p, of pairs of a line of scores and a β. best: each line's best scores. `scale`
    (n,): what the values are multiplied by, if anything.
    """
    rows, width = scores.shape[1], values.shape[1]
    mean, weight = torch.empty(len(lines), width), torch.empty(len(lines))
    left = torch.arange(len(lines))
    for support in (each for each in _SUPPORTS if each < rows):
        lost, _ = softmax_bound(best.values[lines[left], :support], rows, beta[left], 1.0)
        for some in torch.split(left[lost <= MASS], max(1, _VALUES_AT_ONCE // (support * width))):
            chosen = best.indices[lines[some], :support]
            p = separate("softmax", beta[some, None] * best.values[lines[some], :support])
            weight[some] = p.amax(-1)
            mean[some] = association(values[chosen], p if scale is None else p * scale[chosen])
        left = left[lost > MASS]
    for some in torch.split(left, max(1, _VALUES_AT_ONCE // rows)):
        p = separate("softmax", beta[some, None] * scores[lines[some]])
        weight[some] = p.amax(-1)
        mean[some] = association(values, p if scale is None else p * scale)
    return mean, weight


def _at_rest(state: Tensor, whole: Tensor) -> Tensor:
    """Whether a whole step leads nowhere, as `retrieve` has it."""
    residual: Tensor = torch.linalg.vector_norm(whole - state, dim=-1)
    size: Tensor = torch.linalg.vector_norm(whole, dim=-1)
    return residual <= EPS * size


def _nearest(bank: Bank, scores: Tensor, similarity: Similarity) -> Tensor:
    """The row nearest to each scored state: under L2 that of largest score; under cosine too, whose rows are unit."""
    return (bank.squares - 2 * scores).argmin(-1) if similarity == "dot" else scores.argmax(-1)
