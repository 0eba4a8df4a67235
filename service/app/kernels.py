"""Kernels: train one for a space, try it on held-out cues against what is there, and swap it in where it is better.

    cues for the trial ─▶ cues to train on ─▶ train (core.kernel) ─▶ trial ─▶ kept: calibrate under it, swap │ dropped

Rules:
- The trial's cues are made apart from those trained on, and judged by the bank's own search. A kernel stays only if the
  choice among all comparisons finds more memories with it than without; its record stays either way.
- Nothing of a recall changes before the swap, and then all at once: kernel, choices and thresholds.
- Cancelled or failed, a training leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from service.app.calibrate import calibrate_collection
from service.app.comparison import ActiveKernel
from service.app.gates import SEED
from service.app.kernel_schemas import KernelInfo, KernelList, KernelRecord, LossPoint, TrainKernel
from service.app.kernel_trial import MEMORIES_MIN, VALUES_MAX, make_lesson, make_trial, source_of
from service.app.known_cues import TARGET, Supplied
from service.app.live import LiveCollection, Space
from service.app.resources import CALIBRATE_JOB, KERNEL_JOB, Resources
from service.bank.bank import KERNELS_MAX
from service.core.kernel import Progress, Training, train, whitening
from service.core.similarity import Kernel
from service.encoders.corruption import Corruption
from service.errors import EncodersChanged, KernelNotFound, LearnedElsewhere, TooBusy, TrainingRefused, UnknownSpace
from service.storage.jobs import Job
from service.storage.learned import KernelPut

MEMORIES_MAX = 20_000
DIMENSION_MAX = 16_384  # W of 512 rows takes 32 MB there, and a step of training some seconds
CURVE_POINTS_MAX = 400
RETIRE_WAIT_S = 5.0  # for a calibration to end
WHITENING_RIDGE = 0.1


def enqueue_kernel(resources: Resources, live: LiveCollection, request: TrainKernel) -> str:
    """Check a training and commit its job; its id. Raises `UnknownSpace`, `TrainingRefused`."""
    space = _space(live, request)
    if live.similarity != "cosine":
        raise TrainingRefused(f"a kernel compares directions; {live.name} compares by {live.similarity}")
    if space.dimension > DIMENSION_MAX:
        raise TrainingRefused(
            f"space {space.name} has {space.dimension} values; a kernel takes at most {DIMENSION_MAX}"
        )
    _corruptions(live, space, request)
    if len(live.view().kernels) > KERNELS_MAX - 2:  # one on trial, and whitening beside it
        raise TrainingRefused(
            f"{live.name} has kernels in {len(live.learned.kernels)} spaces, which is as many as it can; retire one"
        )
    payload = {"kernel": request.model_copy(update={"space": space.name}).model_dump(mode="json")}
    return resources.enqueue(KERNEL_JOB, live.id, payload=payload)[0]


def run_kernel_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Train, try, and keep or drop. Raises `TrainingRefused` where there is too little to train on."""
    assert job.collection_id is not None
    live = resources.live_by_id(job.collection_id)
    live.catch_up()  # with what another server stored before it asked for this
    request = TrainKernel.model_validate(job.payload["kernel"])
    space = _space(live, request)
    kinds = _corruptions(live, space, request)
    view = live.view()
    rows = view.sample(min(MEMORIES_MAX, VALUES_MAX // space.dimension), SEED)
    rows = rows[~view.lacking([space.name], rows)]
    if len(rows) < MEMORIES_MIN:
        raise TrainingRefused(
            f"a kernel needs n >= {MEMORIES_MIN} memories that fill the space {space.name}, has {len(rows)}"
        )
    trial = make_trial(resources, live, view, space, kinds, rows, lambda share: beat(0.1 * share))
    if request.objective == "cues" and not trial.groups:
        raise TrainingRefused(f"no cue for the space {space.name} could be made: its memories have no originals")
    lesson = make_lesson(
        resources, live, view, space, request, kinds, rows, trial, lambda share: beat(0.1 + 0.2 * share)
    )
    course = _Course(request.time_limit_s, request.steps_max, lambda share: beat(0.3 + 0.5 * share))
    training = Training(
        objective=request.objective, start=request.start, steps_max=request.steps_max, batch=request.batch,
        learning_rate=request.learning_rate, seed=request.seed,
    )  # fmt: skip
    last = course.follow(train(lesson.patterns, training, lesson.draw))
    kernel = Kernel(last.weight)
    white = Kernel(whitening(lesson.patterns, WHITENING_RIDGE))
    with _tried(live, space, kernel), _tried(live, space, white):
        before = _in_use(live)
        verdict = trial.judge(
            live, live.view(), before, before | {space.name: kernel}, white, lambda: beat(0.8)
        )  # fmt: skip
        record = KernelRecord(
            space=space.name, objective=request.objective, start=request.start, memories=len(lesson.patterns),
            cues=lesson.cues, corruptions=[kind.describe() for kind in kinds], steps=last.step,
            best_step=last.best_step, stopped=course.stopped, seconds=round(course.seconds, 1), curve=course.curve(),
            trial=verdict.table, kept=verdict.better, why=verdict.why,
        )  # fmt: skip
        if record.kept:
            _swap_in(resources, live, kernel, record, lambda share: beat(0.8 + 0.2 * share))
        else:
            beat(1.0)  # the last look at whether the job is still wanted
            resources.repository.put_kernel(
                live.id, space.name, request.objective, last.weight.numpy(), record.model_dump(mode="json"), False
            )
    return record.model_dump(mode="json")


def listed(resources: Resources, live: LiveCollection) -> KernelList:
    """Every kernel on record, by space and number."""
    infos = [
        KernelInfo(
            id=f"{stored.space}-{stored.number}", space=stored.space, status=stored.status, rank=stored.rows,
            dimension=stored.dimension, created_at=stored.created_at.isoformat(),
            record=KernelRecord.model_validate(stored.record),
        )
        for stored in resources.repository.get_kernels(live.id)
    ]  # fmt: skip
    return KernelList(kernels=infos)


def retire(resources: Resources, live: LiveCollection, kernel_id: str) -> None:
    """Go on without a kernel: cues are compared as they were before it. Raises `KernelNotFound`."""
    if not live.learning.acquire(timeout=RETIRE_WAIT_S):
        raise TooBusy(f"{live.name} is being calibrated or re-encoded; its kernels change after that", retry_after_s=10)
    try:
        while True:
            _check_current(resources, live)
            at, active = live.revision, live.learned.by_id(kernel_id)
            if active is None:
                raise KernelNotFound(f"no kernel {kernel_id} is in use in {live.name}")
            follow = partial(live.without_kernel, active.space)
            try:
                resources.repository.retire_kernel(live.id, active.space, follow, at)
                break
            except LearnedElsewhere:
                resources.look()
    finally:
        live.learning.release()
    if live.learned.kernels:
        resources.enqueue(CALIBRATE_JOB, live.id)  # modalities with another space's kernel choose anew


def _swap_in(
    resources: Resources, live: LiveCollection, kernel: Kernel, record: KernelRecord,
    progress: Callable[[float], None],
) -> None:  # fmt: skip
    while True:
        try:
            _swap_at(resources, live, kernel, record, progress)
            return
        except LearnedElsewhere:
            resources.look()


def _swap_at(
    resources: Resources, live: LiveCollection, kernel: Kernel, record: KernelRecord,
    progress: Callable[[float], None],
) -> None:  # fmt: skip
    """Raises `LearnedElsewhere`: it is to be calibrated again, under what has changed."""
    while not live.learning.acquire(timeout=1.0):
        progress(0.0)  # a calibration under way takes its time; the lease is kept meanwhile
    # Held, so that no calibration under the former kernels ends after the swap, and none is retired meanwhile.
    try:
        _check_current(resources, live)
        at = live.revision
        kernels = _in_use(live) | {record.space: kernel}
        calibration = calibrate_collection(live, resources, kernels, progress, Supplied.before(live))
        progress(1.0)  # the last look at whether the job is still wanted

        def then(put: KernelPut) -> None:
            active = dict(live.learned.kernels) | {record.space: ActiveKernel(record.space, put.number, kernel)}
            live.follow(None, [], put.version)
            live.revision = put.revision
            calibration.learned(live, active)

        resources.repository.put_kernel(
            live.id, record.space, record.objective, kernel.weight.numpy(), record.model_dump(mode="json"), True,
            gates=calibration.packed(), then=then, at=at,
        )  # fmt: skip
    finally:
        live.learning.release()


def _check_current(resources: Resources, live: LiveCollection) -> None:
    """To be asked while its `learning` is held, under which encoders change. Raises `EncodersChanged`."""
    if resources.live_by_id(live.id) is not live:
        raise EncodersChanged(f"an encoder of {live.name} has changed meanwhile; start again")


def _in_use(live: LiveCollection) -> dict[str, Kernel]:
    return {name: active.kernel for name, active in live.learned.kernels.items()}


@contextmanager
def _tried(live: LiveCollection, space: Space, kernel: Kernel) -> Iterator[None]:
    """The bank knows the kernel meanwhile; and afterwards, if it has become active."""
    live.bank.add_kernel(space.name, kernel)
    try:
        yield
    finally:
        if all(active.kernel is not kernel for active in live.learned.kernels.values()):
            live.bank.drop_kernel(kernel)


def _space(live: LiveCollection, request: TrainKernel) -> Space:
    name = request.space or next(iter(live.spaces))
    if name not in live.spaces:
        raise UnknownSpace(f"collection {live.name} has no space {name}; it has {', '.join(live.spaces)}")
    return live.spaces[name]


def _corruptions(live: LiveCollection, space: Space, request: TrainKernel) -> list[Corruption]:
    """Those that apply to what the space is made from."""
    kinds = request.corruptions or live.corruptions
    applying = [kind for kind in kinds if TARGET[source_of(space)] in kind.applies_to]
    if not applying:
        names = ", ".join(kind.kind for kind in kinds)
        raise TrainingRefused(
            f"space {space.name} is made from {source_of(space)}, and none of {names} applies to these"
        )
    return applying


class _Course:
    """A training as it goes: the time it may take, and its curve."""

    def __init__(self, time_limit_s: float, steps_max: int, progress: Callable[[float], None]) -> None:
        self._limit, self._steps, self._progress = time_limit_s, steps_max, progress
        self._points: list[LossPoint] = []
        self.stopped: Literal["steps", "patience", "time"] = "patience"
        self.seconds = 0.0

    def follow(self, evaluations: Iterator[Progress]) -> Progress:
        began = time.monotonic()
        for evaluation in evaluations:
            loss = None if evaluation.step == 0 else evaluation.loss
            self._points.append(LossPoint(step=evaluation.step, loss=loss, held_out=evaluation.held_out))
            self.seconds = time.monotonic() - began
            self._progress(min(1.0, max(self.seconds / self._limit, evaluation.step / self._steps)))
            if evaluation.step == self._steps:
                self.stopped = "steps"
            elif self.seconds > self._limit:
                self.stopped = "time"
                break
        return evaluation

    def curve(self) -> list[LossPoint]:
        """The points, evenly thinned to `CURVE_POINTS_MAX`, the last one among them."""
        every = -(-len(self._points) // CURVE_POINTS_MAX)
        return self._points[::-1][::every][::-1]
