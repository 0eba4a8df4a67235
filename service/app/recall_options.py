"""What a recall is asked: the request's options with the collection's defaults filled in, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.app.drawing import check_drawings
from service.app.filter_schemas import path_of
from service.app.live import LiveCollection
from service.app.schemas import RecallOptions, format_of, separation_of
from service.core.filter import Clause, Path
from service.core.names import Separation
from service.encoders.picture import PictureFormat
from service.errors import InvalidRequest, NotDecodable, UnknownKernel, UnknownSpace

REPLY_VALUES_MAX = 4 * 2**20  # numbers in one answer: as JSON some 50 MB
MATCH_VALUES = 8  # what a match without vectors counts for


@dataclass(frozen=True)
class Resolved:
    """Recall options with the collection's defaults filled in; hashable, so that equal requests share a batch."""

    limit: int
    offset: int
    filter: Clause | None
    exclude: frozenset[str]
    score_threshold: float | None
    group_by: Path | None
    group_size: int
    spaces: tuple[tuple[str, float], ...] | None
    support: int | Literal["dense"]
    exact: bool
    separation: Separation
    beta: float | Literal["auto"]
    update_steps_max: int
    step_size: float
    clamp_observed: bool
    kernel: str
    gate: bool
    certify: bool
    reconstruct: PictureFormat | None
    with_payload: bool
    with_text: bool
    with_vectors: bool
    trace: PictureFormat | None

    @property
    def reach(self) -> int:
        """Matches (or groups of them) up to the last one asked for, those passed over among them."""
        return self.offset + self.limit

    @property
    def chosen(self) -> dict[str, float] | None:
        return None if self.spaces is None else dict(self.spaces)


def resolve(live: LiveCollection, options: RecallOptions) -> Resolved:
    """Raises `UnknownSpace` and `NotDecodable` before any work is done."""
    default = live.config.recall
    for name in options.spaces or ():
        if name not in live.spaces:
            raise UnknownSpace(f"collection {live.name} has no space {name}; it has {', '.join(live.spaces)}")
    if (options.reconstruct or options.trace) and live.decoder is None:
        raise NotDecodable(f"collection {live.name} has no space whose encoder decodes; `pixels` does")
    return Resolved(
        limit=options.limit,
        offset=options.offset,
        filter=None if options.filter is None else options.filter.clause(),
        exclude=frozenset(options.exclude),
        score_threshold=options.score_threshold,
        group_by=None if options.group_by is None else path_of(options.group_by),
        group_size=options.group_size,
        spaces=None if options.spaces is None else tuple(sorted(options.spaces.items())),
        support=default.support if options.support is None else options.support,
        exact=options.exact,
        separation=separation_of(default.separation if options.separation is None else options.separation),
        beta=default.beta if options.beta is None else options.beta,
        update_steps_max=default.update_steps_max if options.update_steps_max is None else options.update_steps_max,
        step_size=default.step_size if options.step_size is None else options.step_size,
        clamp_observed=default.clamp_observed if options.clamp_observed is None else options.clamp_observed,
        kernel=_kernel(live, default.kernel if options.kernel is None else options.kernel),
        gate=options.gate,
        certify=options.certify,
        reconstruct=format_of(options.reconstruct),
        with_payload=options.with_payload,
        with_text=options.with_text,
        with_vectors=options.with_vectors,
        trace=format_of(options.trace),
    )


def _kernel(live: LiveCollection, asked: str) -> str:
    if asked not in ("auto", "none") and live.learned.by_id(asked) is None:
        active = ", ".join(kernel.id for kernel in live.learned.kernels.values()) or "none is"
        raise UnknownKernel(f"kernel is auto, none or the id of one in use ({active}), not {asked}")
    return asked


def check_size(live: LiveCollection, options: Resolved, cues: int) -> None:
    """Refuse a request whose answer would be too large to hold. Raises `InvalidRequest`, saying what fits."""
    matches = options.limit * options.group_size
    vectors = matches + 1 if options.with_vectors else 0  # the matches', and the state's
    most = REPLY_VALUES_MAX // (vectors * live.layout.dimension + matches * MATCH_VALUES)
    if cues > max(1, most):
        raise InvalidRequest(f"{cues} cues with {matches} matches each are too many at once; send at most {most}")
    pictures = (options.reconstruct is not None) + (options.update_steps_max + 1) * (options.trace is not None)
    check_drawings(live, cues * pictures)
