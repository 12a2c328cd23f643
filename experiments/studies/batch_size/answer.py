"""The answer of the batch-size study in words, made from its numbers."""

from typing import Any

from experiments.studies.batch_size.results import (
    SGD,
    TITLES,
    Results,
    best_other,
    leads,
    sizes_of,
)
from experiments.studies.batch_size.statistics import Estimate, estimate, slope


def percent(value: Estimate, signed: bool = False) -> str:
    """A share as points of a hundred with its interval."""
    mean = f"{100 * value.mean:{'+' if signed else ''}.2f}"
    return mean if value.half is None else f"{mean} ± {100 * value.half:.2f}"


def differences(results: Results, other: str) -> dict[int, Estimate]:
    """K-FAC less another optimiser, by batch size."""
    by_seed = leads(results, other)
    return {size: estimate(list(pairs.values())) for size, pairs in by_seed.items()}


def verdict(found: dict[int, Estimate], other: str) -> str:
    """One sentence on where K-FAC is better, worse, or neither."""
    said = {
        1: f"beats {other} at",
        -1: f"loses to {other} at",
        0: f"cannot be told apart from {other} at",
    }
    parts = []
    for sign, words in said.items():
        sizes = [size for size, e in found.items() if e.sign == sign]
        if sizes:
            shown = ", ".join(f"{s} ({percent(found[s], True)} points)" for s in sizes)
            parts.append(f"{words} batch {shown}")
    return f"K-FAC {'; it '.join(parts)}."


def growth(found: Estimate | None) -> str:
    """One sentence on how the lead over SGD changes with the batch."""
    if found is None:
        return "Whether the difference grows with the batch needs two batch sizes."
    shown = f"{percent(found, True)} points per doubling of the batch"
    if found.half is None:
        return f"Its difference to SGD changes by {shown}, from a single seed."
    if not found.sign:
        return (
            f"Its difference to SGD changes by {shown}: whether it grows or shrinks "
            "with the batch cannot be told at 95 %."
        )
    word = "grows" if found.sign > 0 else "falls"
    return f"Its difference to SGD {word} with the batch, by {shown}."


def answer(results: Results, config: dict[str, Any]) -> str:
    """The answer in one paragraph."""
    over_sgd = differences(results, SGD)
    if not over_sgd:
        return "K-FAC and SGD have no finished runs at a common batch size yet."
    trials = sorted({len(r.trials) for r in results.values()})
    seeds = sorted({len(r.seeds) for r in results.values()})
    sentences = [
        f"With {counts(trials, 'trial')} each, {counts(seeds, 'seed')} for the winners "
        f"and {config['epochs']} epochs at every batch size, "
        f"{verdict(over_sgd, 'SGD')}",
        growth(slope(leads(results, SGD))),
    ]
    against = {}
    for size in sizes_of(results):
        name = best_other(results, size)
        found = differences(results, name).get(size) if name else None
        if name and found:
            against[size] = found, name
    if any(name != SGD for _, name in against.values()):
        names = ", ".join(f"{TITLES[n]} at {size}" for size, (_, n) in against.items())
        best = {size: found for size, (found, _) in against.items()}
        words = "the best of the others"
        sentences.append(f"{verdict(best, words)} (The best others: {names}.)")
    sentences.append(
        "Differences are in points of test accuracy, paired by seed, with Student-t "
        "intervals at 95 %, each for itself: none is corrected for the number of "
        "comparisons. They hold for the hyper-parameters that the searches found; what "
        "another search would change is not in them."
    )
    return " ".join(sentences)


def counts(numbers: list[int], noun: str) -> str:
    """One number, or from the least to the greatest, and what is counted."""
    low, high = min(numbers), max(numbers)
    number = str(low) if low == high else f"{low} to {high}"
    return f"{number} {noun}{'s' * (high != 1)}"
