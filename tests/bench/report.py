"""Rows of the result: a ratio, its goal, the two figures behind it, how far the rounds lay apart."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

RESULTS = Path(__file__).resolve().parents[2] / "build" / "bench"


@dataclass(frozen=True)
class Row:
    """One row of the table; `spread` is (max - min) / median of the ratios of the single rounds."""

    id: str
    what: str
    unit: str
    ratio: float | None
    goal: float | None
    better: Literal["higher", "lower"]
    ours: float
    reference: float | None
    spread: float | None

    @property
    def verdict(self) -> str:
        """Whether the goal is reached; empty where there is none."""
        if self.goal is None or self.ratio is None:
            return ""
        reached = self.ratio >= self.goal if self.better == "higher" else self.ratio <= self.goal
        return "reached" if reached else "missed"

    def save(self) -> None:
        """Writes build/bench/ID.json."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.id}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def compare(
    row_id: str,
    what: str,
    unit: str,
    rounds: Sequence[tuple[float, float]],
    goal: float | None,
    better: Literal["higher", "lower"],
) -> Row:
    """Makes a row of (ours, reference) of each round: medians, and the ratio of the medians.

    Args: rounds: at least one pair; the two of a pair were measured one directly after the other.
    """
    ours = statistics.median(pair[0] for pair in rounds)
    reference = statistics.median(pair[1] for pair in rounds)
    ratios = [a / b for a, b in rounds]
    spread = (max(ratios) - min(ratios)) / statistics.median(ratios)
    return Row(row_id, what, unit, ours / reference, goal, better, ours, reference, spread)


def fact(row_id: str, what: str, unit: str, ours: float, goal: float | None = None) -> Row:
    """Makes a row without a reference: an amount of memory or disk. A goal is a limit on the amount itself."""
    return Row(row_id, what, unit, ours if goal is not None else None, goal, "lower", ours, None, None)


def table(rows: Sequence[Row]) -> str:
    """Lays the rows out as text."""

    def number(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    head = ["id", "what", "ours", "reference", "unit", "ratio", "goal", "spread", ""]
    lines = [head]
    for row in rows:
        sign = {"higher": "≥", "lower": "≤"}[row.better]
        lines.append(
            [
                row.id,
                row.what,
                number(row.ours),
                number(row.reference),
                row.unit,
                number(row.ratio) if row.reference is not None else "",
                f"{sign} {number(row.goal)}" if row.goal is not None else "",
                f"{row.spread:.0%}" if row.spread is not None else "",
                row.verdict,
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
