"""What the demo says in the terminal: thresholds, one block per cue, and the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engram.demo.cues import Cue, Trial
from engram.recalled import COLOURS, energies
from engram.replies import CollectionInfo, Recall

ACCEPTED = ("known", "ambiguous")


@dataclass(frozen=True)
class Shown:
    """A cue with its answer."""

    cue: Cue
    recall: Recall

    @property
    def right(self) -> bool:
        """A stored cue is right when its own memory comes first and is not refused; a stranger when it is refused."""
        if self.cue.own is None:
            return self.recall.verdict == "unknown"
        return self.recall.verdict in ACCEPTED and self.recall.matches[0].id == self.cue.own


@dataclass(frozen=True)
class Tally:
    """One kind of cue, counted. A stranger's every acceptance is false; a stored one's every refusal is."""

    kind: str
    collection: str
    modality: str | None
    stranger: bool
    declared: bool
    cues: int
    first: int
    accepted: int

    @property
    def false(self) -> int:
        return self.accepted if self.stranger else self.cues - self.accepted


def tally(trial: Trial, recalls: Sequence[Recall]) -> Tally:
    pairs = list(zip(trial.cues, recalls, strict=True))
    return Tally(
        kind=trial.kind,
        collection=trial.cues[0].collection,
        modality=recalls[0].gate.modality if recalls[0].gate else None,
        stranger=trial.cues[0].own is None,
        declared=trial.declared,
        cues=len(pairs),
        first=sum(bool(recall.matches) and recall.matches[0].id == cue.own for cue, recall in pairs),
        accepted=sum(recall.verdict in ACCEPTED for recall in recalls),
    )


def print_calibration(console: Console, info: CollectionInfo) -> None:
    console.print(f"\n[bold]{info.name}[/] · {info.count:,} memories · cues declared: {', '.join(info.corruptions)}")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("cue fills", "cues made", "own first", "threshold", "lets in its own", "lets in left-out"):
        table.add_column(heading, justify="left" if heading == "cue fills" else "right")
    for record in info.calibration.modalities:
        threshold = f"log S > {record.log_lambda:.2f}" if record.log_lambda is not None else f"none: {record.refused}"
        strangers = "" if record.stranger_accept_rate is None else f"{record.stranger_accept_rate:.1%}"
        table.add_row(
            record.modality,
            str(record.cues),
            f"{record.first_share:.0%}",
            threshold,
            f"{record.target_tpr:.0%}",
            strangers,
        )
    console.print(table)


def explain_calibration(console: Console) -> None:
    console.print(
        "Each threshold is set to let in that share of cues made from stored memories by the declared kinds.\nThe last "
        "column is its price: the share of the same cues let in with their own memory left out, the nearest strangers.",
        style="dim",
    )


def print_shown(console: Console, shown: Shown) -> None:
    cue, recall = shown.cue, shown.recall
    mark = "[green]right[/]" if shown.right else "[red]wrong[/]"
    what = (
        f"“{cue.text}”" if cue.text else cue.title if cue.own is None else f"{cue.collection} · {cue.own}, {cue.title}"
    )
    console.print(f"\n[bold]{what}[/]  →  [bold {COLOURS[recall.verdict]}]{recall.verdict}[/]  {mark}")
    grid = Table.grid(padding=(0, 2))
    matches = " · ".join(
        f"{match.id} {match.weight:.3f} (similarity {match.similarity:.2f})" for match in recall.matches
    )
    grid.add_row("  matches", matches)
    if recall.recall is not None:
        dynamics = recall.recall
        grid.add_row(
            "  energy",
            f"{energies(dynamics.energy)}  ({dynamics.outcome}, steps {dynamics.steps}, β {dynamics.beta:.1f})",
        )
    if recall.gate is not None:
        gate = recall.gate
        relation = "over" if gate.score > gate.threshold else "not over"
        grid.add_row("  gate", f"log S {gate.score:.2f}, {relation} {gate.threshold:.2f} ({gate.modality})")
    times = " · ".join(f"{stage} {ms:.1f}" for stage, ms in recall.timings_ms.items())
    grid.add_row("  time, ms", times)
    for warning in recall.warnings:
        grid.add_row("  warning", Text(warning))
    console.print(grid)


def print_tallies(console: Console, tallies: Sequence[Tally]) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("cues")
    for heading in ("how many", "own first", "accepted", "false rejects", "false accepts"):
        table.add_column(heading, justify="right")
    for t in tallies:
        rejects, accepts = ("", str(t.false)) if t.stranger else (str(t.false), "")
        kind = t.kind if t.declared or t.stranger else f"{t.kind} (not declared)"
        table.add_row(kind, str(t.cues), "" if t.stranger else str(t.first), str(t.accepted), rejects, accepts)
    console.print(table)


def summary(tallies: Sequence[Tally]) -> list[str]:
    """The counts in a few sentences."""
    declared = [t for t in tallies if not t.stranger and t.declared]
    other = [t for t in tallies if not t.stranger and not t.declared]
    strangers = [t for t in tallies if t.stranger]
    return [
        f"{_sum(declared)} cues of the declared kinds: own memory first in {sum(t.first for t in declared)}, "
        f"{sum(t.false for t in declared)} falsely rejected.",
        f"{_sum(other)} sentences in other words, a kind never declared: own memory first in "
        f"{sum(t.first for t in other)}, {sum(t.false for t in other)} falsely rejected.",
        f"{_sum(strangers)} cues of things never stored: {sum(t.false for t in strangers)} falsely accepted "
        f"({', '.join(f'{t.kind} {t.false} of {t.cues}' for t in strangers if t.false) or 'none'}).",
    ]


def _sum(tallies: Sequence[Tally]) -> int:
    return sum(t.cues for t in tallies)
