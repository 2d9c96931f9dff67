"""What papers report for the presets that carry their settings, beside what came out here."""

from __future__ import annotations

from dataclasses import dataclass

from eval.report.words import Record, measured


@dataclass(frozen=True)
class Published:
    """One figure of a paper: the RIR that it reports for ``scenario``."""

    scenario: str
    rir: float
    what: str
    source: str


PUBLISHED = {
    "kappa_paper_house_price": Published("house_price", 356.20, "RIR", "arXiv 2505.23760 §5.1"),
    "kappa_paper_mnist": Published(
        "mnist_pairs", 70.04, "mean RIR of 90 pairs", "arXiv 2505.23760 §5.1"
    ),
}


def published(record: Record) -> str | None:
    """A sentence: what was published with these settings, what came out, and why they differ; None:
    nothing was.
    """
    paper = PUBLISHED.get(record["immunizer"])
    if paper is None or record["scenario"] != paper.scenario:
        return None
    told = f"With these settings the paper reports {paper.what} {paper.rir:g} ({paper.source})"
    rir = record["metrics"].get("rir")
    if rir is not None and rir["value"] is not None:
        return f"{told}; here it is {measured(rir)}."
    if record["status"] != "diverged":
        return f"{told}; this run did not measure it."
    return (
        f"{told}; here its plain steps diverge, since η·λ_P is far beyond the stable step "
        "for H = XᵀX on these data. "
        "The paper does not say how H was scaled; presets without `paper` in their name "
        "divide it by its largest "
        "eigenvalue."
    )
