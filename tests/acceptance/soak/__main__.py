"""A long run of K-FAC with everything in it that may happen to a long run.

    python -m tests.acceptance.soak --steps 100000

Nine optimisers with other inverses, intervals and momentum take turns on one small
network: a Python loop of jitted steps with donated buffers. Learning rate (0 too),
damping and inverse interval change at random; batches are at random zeros, huge, or
have NaN and Inf in inputs, gradients or statistics; states are saved and restored. Step
counts begin just below 2²⁴, where float32 stops counting. A float64 oracle on the host
follows each optimiser (``oracle.py``). Looked for are drift of averages and
inverses, clocks that are off, numbers that are not finite, memory that grows, programs
compiled anew and steps that become slower.
"""

import collections
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import tyro

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    CompileCounter,
    machine,
    text_table,
    write_json,
)
from experiments.progress import ended
from tests.acceptance.soak import oracle
from tests.acceptance.soak.player import Player, players
from tests.acceptance.soak.verdict import Memory, verdicts

PROGRAM = "python -m tests.acceptance.soak"
SIZES, EXAMPLES = (8, 8, 4), 16
EVENTS = {
    "clean": 0.88,
    "zeros": 0.02,
    "large": 0.02,
    "overflow": 0.01,
    "nan": 0.02,
    "inf": 0.01,
    "huge_gradient": 0.01,
    "nan_gradient": 0.015,
    "nan_statistics": 0.015,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Soaks K-FAC."""

    steps: int = 100_000
    """Steps of all optimisers together."""
    segment: int = 100
    """Steps that an optimiser takes on average before the next has its turn."""
    check: int = 20
    """Steps between comparisons with the oracle."""
    orbax: int = 20
    """How many of the checkpoints are orbax's; the others are flax's."""
    first_count: int = 2**24 - 1000
    """Where step counts begin."""
    players: tuple[str, ...] = ()
    """Names of the optimisers, all by default."""
    seed: int = 0
    """Of batches, events and hyper-parameters."""
    out: Path = OUT
    """Folder of the result."""


# ---------------------------------------------------------------- network and batches


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    """Cross-entropy of a network with one hidden layer."""
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = kfac.categorical(hidden @ params["out"]["w"] + params["out"]["b"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def start(rng: np.random.Generator) -> Any:
    """First parameters."""

    def layer(n: int, m: int) -> dict[str, Any]:
        w = rng.normal(size=(n, m)) / math.sqrt(n)
        return {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(m, jnp.float32)}

    return {"hidden": layer(*SIZES[:2]), "out": layer(*SIZES[1:])}


def draw(rng: np.random.Generator, event: str) -> tuple[tuple, np.ndarray]:
    """A batch and what is added to a gradient and to a statistic."""
    x = rng.normal(size=(EXAMPLES, SIZES[0])).astype(np.float32)
    y = x[:, : SIZES[-1]].argmax(-1).astype(np.int32)
    factor = {"zeros": 0.0, "large": 1e3, "overflow": 1e25}.get(event, 1.0)
    x = x * np.float32(factor)
    if event in ("nan", "inf"):
        x[rng.integers(EXAMPLES), rng.integers(SIZES[0])] = np.float32(event)
    spoil = {
        "huge_gradient": (3e38, 0.0),
        "nan_gradient": (np.nan, 0.0),
        "nan_statistics": (0.0, np.nan),
    }
    return (x, y), np.array(spoil.get(event, (0.0, 0.0)), np.float32)


# ---------------------------------------------------------------------------- the run


class Soak:
    """The run."""

    def __init__(self, config: Config) -> None:
        """Tags the loss and makes the players."""
        self.config, self.rng = config, np.random.default_rng(config.seed)
        self.params = start(self.rng)
        batch, _ = draw(self.rng, "clean")
        tagged = kfac.tag(loss_fn, self.params, *batch)
        names = config.players or tuple(players())
        self.players = [
            Player(name, tagged, self.params, config.first_count) for name in names
        ]
        self.events: dict[str, int] = collections.Counter()
        self.compiled, self.restored = CompileCounter(), collections.Counter()
        self.memory = Memory()
        self.samples: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.done = 0

    def turn(self, player: Player, length: int, folder: Path | None) -> None:
        """An optimiser's turn: a checkpoint, then steps."""
        rng = self.rng
        rate = 0.0 if rng.random() < 0.1 else 10 ** rng.uniform(-3, -0.5)
        player.set(
            learning_rate=rate,
            damping=10 ** rng.uniform(-4, 1),
            inverse_interval=int(rng.choice([1, 2, 5, 20])),
        )
        if player.steps:
            self.params = player.restore(self.params, folder)
            self.restored["flax" if folder is None else "orbax"] += 1
        names, shares = list(EVENTS), np.array(list(EVENTS.values()))
        for event in rng.choice(names, length, p=shares / shares.sum()):
            if rng.random() < 0.02:
                player.set(damping=10 ** rng.uniform(-4, 1))
            self.events[event] += 1
            batch, spoil = draw(rng, event)
            watch = "nan" in event or event == "inf"
            begin = time.perf_counter()
            self.params, step = player.take(self.params, batch, spoil, watch)
            self.seconds.append(time.perf_counter() - begin)
            if event == "clean":
                self.losses.append(step.value)
            if player.steps % self.config.check == 0:
                player.check()
            self.done += 1

    def sample(self) -> None:
        """Notes errors, memory, speed and compilations since the last sample."""
        errors = oracle.largest([p.errors for p in self.players])
        for player in self.players:
            player.errors = {}
        record = {
            "step": self.done,
            "ms": 1e3 * statistics.median(self.seconds),
            "fast_ms": 1e3 * float(np.quantile(self.seconds, 0.1)),
            "loss": statistics.median(self.losses),
            "compiled": self.compiled.count,
            **self.memory.now(),
            "errors": errors,
        }
        self.samples.append(record)
        self.seconds, self.losses = [], []
        head = " ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "errors")
        worst = " ".join(f"{k} {v:.1e}" for k, v in errors.items())
        bar = "#" * round(20 * self.done / self.config.steps)
        print(f"[{bar:<20}] {head} | {worst}", flush=True)

    def run(self) -> None:
        """All the turns."""
        config, rng = self.config, self.rng
        share = config.orbax * config.segment / max(config.steps, 1)
        due, every = 0, max(config.steps // 50, 1)
        with tempfile.TemporaryDirectory() as folder:
            order = [p for p in self.players for _ in range(2)]  # all compile first
            while self.done < config.steps:
                player = order.pop(0) if order else rng.choice(self.players)  # type: ignore
                first = player.steps == 0
                length = 5 if first else 1 + int(rng.exponential(config.segment))
                length = min(length, config.steps - self.done)
                orbax_now = rng.random() < share and not first
                where = Path(folder) / str(self.done) if orbax_now else None
                self.turn(player, length, where)
                if self.done >= due and not order:
                    self.sample()
                    due = self.done + every
            if self.seconds and self.losses:
                self.sample()

    def result(self, seconds: float) -> dict[str, Any]:
        """What came out, as JSON values."""
        records = {
            p.name: {
                "steps": p.steps,
                "refused": p.refused,
                "refreshes": p.oracle.refreshes,
                "inversions": p.oracle.inversions,
                "failures": p.failures.tolist(),
                "wrong": p.wrong + p.oracle.wrong,
            }
            for p in self.players
        }
        settings = dataclasses.asdict(self.config)
        settings.pop("out")
        return {
            "machine": machine(),
            "settings": settings,
            "seconds": seconds,
            "events": dict(self.events),
            "restored": dict(self.restored),
            "players": records,
            "verdicts": verdicts(self.samples, records),
            "samples": self.samples,
        }


def measure(config: Config) -> dict[str, Any]:
    """Runs the soak."""
    begin = time.perf_counter()
    soak = Soak(config)
    soak.run()
    return soak.result(time.perf_counter() - begin)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and writes ``soak.json``."""
    config = tyro.cli(Config, prog=PROGRAM, args=arguments)
    result = measure(config)
    write_json(config.out / "soak.json", result)
    rows = [
        (name, r["steps"], r["refused"], *map(sum, (r["refreshes"], r["inversions"])))
        for name, r in result["players"].items()
    ]
    print(
        text_table(("optimiser", "steps", "refused", "refreshes", "inversions"), rows)
    )
    found = result["verdicts"]
    judged = [(name, str(v["good"]), v["what"]) for name, v in found.items()]
    print(text_table(("verdict", "good", "what"), judged))
    return 0 if all(v["good"] for v in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(ended(main))
