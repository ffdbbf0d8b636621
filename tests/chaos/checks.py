"""Figures of a run and what was demanded of them: each is printed and asserted."""

from dataclasses import dataclass, field


@dataclass
class Checks:
    """A list of named figures with verdicts."""

    rows: list[tuple[bool, str]] = field(default_factory=list[tuple[bool, str]])

    def at_least(self, name: str, figure: int, minimum: int) -> None:
        """Demands a figure of at least `minimum`."""
        self._add(figure >= minimum, f"{name}: {figure} (at least {minimum})")

    def equal(self, name: str, figure: object, expected: object) -> None:
        """Demands an exact figure."""
        self._add(figure == expected, f"{name}: {figure} (expected {expected})")

    def holds(self, name: str, truth: bool, remark: str = "") -> None:
        """Demands a fact."""
        self._add(truth, f"{name}{': ' if remark else ''}{remark}")

    def _add(self, good: bool, text: str) -> None:
        self.rows.append((good, text))
        print(f"  {'ok    ' if good else 'FAILED'} {text}", flush=True)

    def good(self) -> bool:
        """Whether all hold."""
        return all(good for good, _ in self.rows)

    def text(self) -> str:
        """The last line of a run."""
        passed = sum(good for good, _ in self.rows)
        return f"{passed} passed, {len(self.rows) - passed} failed"
