"""The problems of the documentation's pages: K-FAC beside Adam.

A page's code defines the problem: ``make_params``, ``tagged``, ``next_batch``,
``score`` and the first batch. Each optimiser is trained at every setting of its grid
with one seed; the setting with the lowest final score is trained with the other seeds.
A final score is the mean over the last tenth of the steps.

``python -m tests.acceptance.pages [page ...]`` writes ``results/pages.json``.
"""

import argparse
import itertools
import json
import re
import time
from pathlib import Path

import jax
import numpy as np
import optax

import kfac_jax_lite as kfac

ROOT = Path(__file__).parents[2]
OUT = ROOT / "experiments" / "benchmarks" / "results" / "pages.json"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PAGES = {
    # Steps, name of the first batch, what is measured.
    "variational-monte-carlo": (200, "walkers", "variance of local energies"),
    "pinn": (300, "batch", "loss"),
    "policy-gradients": (400, "batch", "expected reward that is missed"),
    "mixture-of-experts": (200, "batch", "loss of a batch before its step"),
}
RATES = {"Adam": (1e-3, 3e-3, 1e-2, 3e-2), "K-FAC": (0.03, 0.1, 0.3)}
DAMPINGS = {"pinn": ("adaptive",)}
SEEDS = 3


def namespace_of(page):
    """What the page's code leaves behind, after the quickstart's."""
    names = {"__name__": "docs"}
    readme = (ROOT / "README.md").read_text()
    text = (ROOT / "docs" / f"{page}.md").read_text()
    exec(FENCE.findall(readme)[0], names)
    for code in FENCE.findall(text):
        exec(code, names)
    return names


def trainer(problem, batch, name, steps, adaptive):
    """``(seed, rate, damping)`` to the scores before every step, compiled once."""
    tagged = problem["tagged"]

    def transformation(rate, damping):
        if name == "Adam":
            return optax.adam(lambda _: rate)
        own = kfac.damping.adaptive() if adaptive else lambda _: damping
        return kfac.kfac(tagged, lambda _: rate, damping=own)

    @jax.jit
    def run(params, keys, rate, damping):
        tx = transformation(rate, damping)

        def step(carry, key):
            params, state, batch = carry
            batch = problem["next_batch"](key, params, batch)
            found = problem["score"](params, batch)
            args = batch if isinstance(batch, tuple) else (batch,)
            if name == "Adam":
                grads, more = jax.grad(tagged.loss_fn)(params, *args), {}
            else:
                _, grads, statistics = tagged.value_and_grad(
                    params, *args, opt_state=state
                )
                more = {"statistics": statistics}
            updates, state = tx.update(grads, state, params, **more)
            return (optax.apply_updates(params, updates), state, batch), found

        return jax.lax.scan(step, (params, tx.init(params), batch), keys)[1]

    def scores(seed, rate, damping):
        keys = jax.random.split(jax.random.key(100 + seed), steps)
        found = run(problem["make_params"](seed), keys, rate, damping)
        return np.asarray(found, np.float64)

    return scores


def final(scores):
    """The mean over the last tenth; infinite where a number is not finite."""
    tail = scores[-max(len(scores) // 10, 1) :].mean()
    return float(tail) if np.isfinite(tail) else float("inf")


def compared(page):
    """The record of one page."""
    steps, batch, measure = PAGES[page]
    problem = namespace_of(page)
    record = {"steps": steps, "measure": measure, "seeds": SEEDS, "optimisers": {}}
    curves = {}
    for name, rates in RATES.items():
        dampings = DAMPINGS.get(page, (1e-3, 1e-2)) if name == "K-FAC" else (None,)
        adaptive = dampings == ("adaptive",)
        run = trainer(problem, problem[batch], name, steps, adaptive)
        number = lambda damping: damping if isinstance(damping, float) else 0.0  # noqa: E731
        tried = []
        for rate, damping in itertools.product(rates, dampings):
            scores = run(0, rate, number(damping))
            tried.append((final(scores), len(tried), rate, damping, scores))
            print(page, name, rate, damping, tried[-1][0], flush=True)
        _, _, rate, damping, scores = min(tried)
        more = [run(seed, rate, number(damping)) for seed in range(1, SEEDS)]
        curves[name] = [scores, *more]
        record["optimisers"][name] = {
            "learning_rate": rate,
            "damping": damping,
            "final": [final(c) for c in curves[name]],
        }
    goals = [final(c) for c in curves["Adam"]]
    for name, own in curves.items():
        reached = [first(c, goal) for c, goal in zip(own, goals, strict=True)]
        record["optimisers"][name]["steps_to_adams_final"] = reached
    return record


def first(scores, goal):
    """The first step whose mean over ten steps is at most the goal; None: never."""
    smooth = np.convolve(scores, np.ones(10) / 10, "valid")
    below = np.flatnonzero(smooth <= goal)
    return int(below[0]) + 10 if len(below) else None


def table(record):
    """The record as Markdown."""
    lines = [
        f"| {record['steps']} steps | learning rate | damping | {record['measure']} | "
        "steps to Adam's |",
        "|---|---|---|---|---|",
    ]
    for name, own in record["optimisers"].items():
        scores = ", ".join(f"{x:.2g}" for x in own["final"])
        steps = ", ".join(
            "–" if s is None else str(s) for s in own["steps_to_adams_final"]
        )
        damping = own["damping"] or "–"
        lines.append(
            f"| {name} | {own['learning_rate']:g} | {damping} | {scores} | {steps} |"
        )
    return "\n".join(lines)


def main():
    """Runs pages, writes results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", default=list(PAGES))

    options = parser.parse_args()
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    for page in options.pages:
        begin = time.time()
        found[page] = compared(page)
        print(f"{page}: {time.time() - begin:.0f} s\n{table(found[page])}", flush=True)
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
