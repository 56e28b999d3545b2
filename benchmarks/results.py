"""The present state on one page: `python benchmarks/results.py` writes RESULTS.md from
results/*.json."""

from __future__ import annotations

from pathlib import Path

from common.results import results

PAGE = Path(__file__).with_name("RESULTS.md")


def page() -> str:
    """RESULTS.md."""
    head = (
        "<!-- Written by benchmarks/results.py from results/*.json. -->\n\n"
        "# Results\n\n"
        "The present state, one table a file of [results/](results/). Earlier states are in the\n"
        "dated [notes](notes/). Ratios are perplexities relative to the source's; KL is in nats a\n"
        "token; bytes count everything that is stored, as a share of 16 bits a number.\n\n"
    )
    return head + "\n".join(result.markdown() for result in results().values())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
