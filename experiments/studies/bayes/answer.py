"""The answer of the Bayesian study in words, made from its numbers."""

from experiments.studies.bayes.config import ADAM, Cell
from experiments.studies.bayes.results import (
    LEVEL,
    MARGIN,
    NATURAL,
    TITLES,
    Comparison,
    Results,
    comparisons,
    problems_of,
)

NAMES = ("accuracy", "nll", "ece")


def p_text(p: float | None) -> str:
    """A p-value in words."""
    if p is None:
        return "no p"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def wins(found: dict[str, Comparison]) -> bool:
    """Better NLL and ECE than Adam, significantly, at an accuracy that is no worse."""
    return (
        found["nll"].sign < 0
        and found["ece"].sign < 0
        and found["accuracy"].difference > -MARGIN
    )


def sentence(found: dict[str, Comparison]) -> str:
    """The differences of one method to Adam."""
    accuracy, nll, ece = (found[name] for name in NAMES)
    return (
        f"NLL {nll.difference:+.4f} ({p_text(nll.p)}), ECE {ece.difference:+.4f} "
        f"({p_text(ece.p)}), accuracy {100 * accuracy.difference:+.2f} points "
        f"({p_text(accuracy.p)})"
    )


def on_problem(results: Results, dataset: str, network: str) -> str:
    """What is to be said of a data set and a network."""
    where = f"On {dataset} with {network}"
    better, known = [], 0
    for method in NATURAL:
        cell = Cell(dataset, network, method)
        found = comparisons(results, cell, NAMES)
        if found is None:
            continue
        known += 1
        if wins(found):
            better.append((found["nll"].difference, TITLES[method], sentence(found)))
    if not known:
        return f"{where}, nothing can be compared with Adam yet."
    if not better:
        return (
            f"{where}, none of {known} methods has a significantly better NLL and ECE "
            f"than the tuned Adam at an accuracy no more than {100 * MARGIN:g} points "
            "below."
        )
    shown = "; ".join(f"{title}: {text}" for _, title, text in sorted(better))
    return (
        f"{where}, {len(better)} of {known} methods have a significantly better NLL "
        f"and ECE than the tuned Adam at an accuracy no more than {100 * MARGIN:g} "
        f"points below: {shown}."
    )


def answer(results: Results) -> str:
    """The answer in one paragraph."""
    parts = [on_problem(results, *problem) for problem in problems_of(results)]
    seeds = sorted(
        {len(r.runs) for c, r in results.items() if c.method in (ADAM, *NATURAL)}
    )
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    parts.append(
        f"Differences are those of means over {count} runs to Adam with decoupled "
        "weight decay, whose grid is no smaller than any other's; p-values are of "
        f"Welch's two-sided test, significant below {LEVEL:g}, each for itself: none "
        "is corrected for the number of comparisons. They hold for the "
        "hyper-parameters that the searches found."
    )
    return " ".join(parts)
