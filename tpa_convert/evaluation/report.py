"""What was gained and lost: the source beside the models made from it, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Unit = Literal["perplexity", "percent", "points", "nats", "bytes", "numbers", "tokens/s", "score"]

DECIMALS: dict[Unit, int] = {
    "perplexity": 2,
    "percent": 1,
    "points": 2,
    "nats": 3,
    "bytes": 0,
    "numbers": 0,
    "tokens/s": 1,
    "score": 3,
}
NEUTRAL = 0.01  # a ratio this close to 1 is neither better nor worse


@dataclass(frozen=True)
class Row:
    """One metric of all models.

    Attributes:
        section: heading under which the row stands.
        name: of the metric.
        unit: percent values are 0 to 100.
        values: by model; None where the metric has no meaning (the source's agreement with itself).
        higher_is_better: None if neither is.
        recovers: whether the ratio to the source is a quality that can be recovered.
        margins: half of the 95 % confidence interval, of the models that have one;
            shown instead of the ratio.
    """

    section: str
    name: str
    unit: Unit
    values: dict[str, float | None]
    higher_is_better: bool | None
    recovers: bool = False
    margins: dict[str, float] = field(default_factory=dict)

    def with_columns(self, names: Iterable[str]) -> Row:
        """The same metric with a column for each of these models, empty where it has no value."""
        return replace(self, values={name: self.values.get(name) for name in names})

    def ratio(self, model: str) -> float | None:
        """The model's value divided by the source's."""
        source, value = next(iter(self.values.values())), self.values[model]
        return None if value is None or not source else value / source

    def recovery(self, model: str) -> float | None:
        """Share of the source's quality in percent: 100 x model / source where higher is better
        (accuracy), 100 x source / model where lower is better (perplexity)."""
        ratio = self.ratio(model)
        if ratio is None or not self.recovers:
            return None
        if self.higher_is_better:
            return 100 * ratio
        return 100 / ratio if ratio else None


@dataclass(frozen=True)
class EvaluationReport:
    """Results of `evaluate`; prints as a table (`rich.print(report)`).

    Attributes:
        models: names of the columns; the first is the source.
        rows: the metrics.
        prompt: of the samples, None without them.
        samples: greedy continuation of the prompt by each model.
        settings: what was run: block length, limits, hardware, ...
    """

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    prompt: str | None = None
    samples: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; each row also holds `ratio` and `recovery` by model (without the source)."""
        others = self.models[1:]
        rows = [
            {
                **asdict(row),
                "ratio": {name: row.ratio(name) for name in others},
                "recovery": {name: row.recovery(name) for name in others},
            }
            for row in self.rows
        ]
        return {**asdict(self), "models": list(self.models), "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationReport:
        """The report that `to_json` wrote."""
        derived = ("ratio", "recovery")
        rows = [Row(**{k: v for k, v in row.items() if k not in derived}) for row in data["rows"]]
        return cls(**{**data, "models": tuple(data["models"]), "rows": tuple(rows)})

    @property
    def header(self) -> list[str]:
        """What stands over the columns of the table; nothing over the first."""
        return self._header(self.models)

    @property
    def sections(self) -> dict[str, list[list[str]]]:
        """The table as text: for each section its rows, names first."""
        found: dict[str, list[list[str]]] = {}
        for row in self.rows:
            cells = map(str, self._cells(row, self.models))
            found.setdefault(row.section, []).append([row.name, *cells])
        return found

    @property
    def notes(self) -> list[str]:
        """What stands under the table."""
        return self._notes()

    def to_markdown(self) -> str:
        """The table in Markdown, for a model card."""
        columns = len(self.header) - 1
        lines = [f"| {' | '.join(self.header)} |", f"|---{'|--:' * columns}|"]
        for section, rows in self.sections.items():
            lines.append(f"| **{section}** {'| ' * columns}|")
            lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for i, table in enumerate(self._tables(console, options)):
            if i:
                yield Text()
            yield table
        if self._notes():
            yield Text()
        for note in self._notes():
            yield Text(note, style="dim")
        if self.samples:
            yield Text()
            yield self._sample_table()

    # --------------------------------------------------------------------------- rendering

    def _tables(self, console: Console, options: ConsoleOptions) -> list[Table]:
        """One table, or several of fewer models, the source in each, where one is too wide."""
        source, *others = self.models
        tables = [self._table(self.models)]
        for size in range(len(others) - 1, 0, -1):
            widths = [console.measure(table, options=options).maximum for table in tables]
            if max(widths) < options.max_width:
                break
            parts = [others[start : start + size] for start in range(0, len(others), size)]
            tables = [self._table((source, *part)) for part in parts]
        return tables

    def _header(self, models: Sequence[str]) -> list[str]:
        columns = ["", models[0]]
        for name in models[1:]:
            columns += [name, "ratio", *(["recovery"] if self._shows_recovery else [])]
        return columns

    @property
    def _shows_recovery(self) -> bool:
        """With more than two models beside the source the columns would not fit a terminal."""
        return 1 < len(self.models) <= 3 and any(row.recovers for row in self.rows)

    def _cells(self, row: Row, models: Sequence[str]) -> Iterator[Text]:
        """One cell for the source, two or three for every other model."""
        for name in models:
            yield Text(format_value(row.values[name], row.unit))
            if name == self.models[0]:
                continue
            ratio, recovery = row.ratio(name), row.recovery(name)
            style = _style(ratio, row.higher_is_better)
            if name in row.margins:  # such rows have no ratio, and the space beside them is free
                yield Text(f"± {format_value(row.margins[name], row.unit)}")
            else:
                yield Text("" if ratio is None else format_ratio(ratio, row.unit), style)
            if self._shows_recovery:
                yield Text("" if recovery is None else f"{recovery:.1f} %", style)

    def _table(self, models: Sequence[str]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for index, column in enumerate(self._header(models)):
            derived = column in ("ratio", "recovery")
            table.add_column(
                Text(column, style="dim" if derived else "bold"),
                justify="left" if index == 0 else "right",
                no_wrap=index > 0,
            )
        section = None
        for row in self.rows:
            if row.section != section:
                if section is not None:
                    table.add_row()
                section = row.section
                table.add_row(Text(section, style="bold"))
            table.add_row(Text(f"  {row.name}"), *self._cells(row, models))
        return table

    def _sample_table(self) -> Table:
        table = Table(
            box=None,
            pad_edge=False,
            padding=(0, 2, 1, 0),
            show_header=False,
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("prompt", Text(self.prompt or "", style="italic"))
        for name, sample in self.samples.items():
            table.add_row(Text(name), Text(" ".join(sample.split())))
        return table

    def _notes(self) -> list[str]:
        notes = list(self.settings.get("notes", ()))
        if self._shows_recovery:
            notes.append("recovery: source / model for perplexity, model / source for accuracy")
        return notes


def format_value(value: float | None, unit: Unit) -> str:
    """A number as the table shows it; a dash for None."""
    if value is None:
        return "–"
    if unit == "perplexity" and value >= 10_000:
        return f"{value:,.0f}" if value < 1e9 else f"{value:.1e}"
    decimals = DECIMALS[unit]
    if unit == "numbers" and value != round(value):
        decimals = 1
    return f"{value:,.{decimals}f}"


def format_ratio(ratio: float, unit: Unit) -> str:
    """The share of the source in percent for the cache, otherwise a factor: ×1.29, ×17.7, ×703."""
    if unit in ("bytes", "numbers"):
        return f"{100 * ratio:.1f} %"
    decimals = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"×{ratio:,.{decimals}f}" if ratio < 1e6 else f"×{ratio:.1e}"


def _style(ratio: float | None, higher_is_better: bool | None) -> str:
    if ratio is None or higher_is_better is None or abs(ratio - 1) < NEUTRAL:
        return ""
    return "green" if (ratio > 1) == higher_is_better else "red"
