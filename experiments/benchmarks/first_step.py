"""What the first step costs: tracing, lowering and compiling, and what is compiled.

    python -m experiments.benchmarks.first_step --models mlp transformer --rounds 3

Programs are compiled from shapes alone; nothing is executed, so that networks of any
size can be asked for. All are compiled in one process and in turns, JAX's caches
cleared before each. XLA compiles equal kernels once: beside the fusions of a program
stand the different ones among them, which is what costs. ``--sources`` says which
functions of this package most of our kernels come from.
"""

import collections
import dataclasses
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
import optax.contrib

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    begin,
    in_turns,
    parse,
    quartiles,
    ratios,
    spread,
    text_table,
    write_json,
)
from experiments.errors import ConfigError
from experiments.models.architectures import (
    ARCHITECTURES,
    GPT,
    SMALL,
    Architecture,
    Problem,
    classifier,
    language_model,
)
from experiments.progress import ended

RATE, MOMENTUM = 0.05, 0.9
BASELINE, OURS = "AdamW", "ours"
PACKAGE = "kfac_jax_lite/"


class GroupNormNet(nn.Module):
    """Three convolutions with group normalisation, for small images."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            x = nn.Conv(channels, (3, 3), (stride, stride), use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(4)(x))
        return nn.Dense(10)(x.mean((1, 2)))


MODELS = {
    **SMALL,
    "group_norm": Architecture(
        "convolutions with group norm", GroupNormNet, classifier, (128, 32, 32, 3)
    ),
    "transformer": Architecture(
        "two-layer transformer",
        lambda: GPT(depth=2, width=64, heads=4, vocabulary=65, context=64),
        language_model,
        (32, 64),
    ),
    **ARCHITECTURES,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles the first step of SGD, AdamW, Muon and this package."""

    models: tuple[str, ...] = (*SMALL, "group_norm", "transformer")
    """Networks: mlp, autoencoder, lenet5, resnet, group_norm, transformer, resnet50,
    resnet152, vit_b16, mixer_b16, gpt2_small, gpt2_xl (also with _scan), lstm."""
    rounds: int = 3
    """Compilations of each program."""
    sources: int = 15
    """Functions of this package to name, by the kernels that come from them."""
    out: Path = OUT
    """Folder of the result."""


def steps(problem: Problem) -> dict[str, Callable[[], tuple[Callable[..., Any], Any]]]:
    """For every optimiser, what makes its step and the shapes of its state."""

    def first_order(tx: optax.GradientTransformation):
        value_and_grad = jax.value_and_grad(problem.loss, has_aux=problem.has_aux)

        def step(params: Any, state: Any, *batch: Any):
            value, grads = value_and_grad(params, *batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return step, jax.eval_shape(tx.init, problem.params)

    def second_order(fisher: str = "empirical", **options: Any):
        tagged = kfac.tag(
            problem.loss,
            problem.params,
            *problem.args,
            fisher=fisher,
            has_aux=problem.has_aux,
        )
        tx = kfac.kfac(tagged.layers, RATE, **options)

        def step(params: Any, state: Any, key: Any, *batch: Any):
            value, grads, statistics = tagged.value_and_grad(
                params, *batch, opt_state=state, key=key
            )
            updates, state = tx.update(grads, state, params, statistics=statistics)
            return optax.apply_updates(params, updates), state, value

        state = jax.eval_shape(tx.init, problem.params)
        key = jax.random.key(0)
        return (lambda p, s, *batch: step(p, s, key, *batch)), state

    return {
        "SGD + momentum": lambda: first_order(optax.sgd(RATE, MOMENTUM)),
        BASELINE: lambda: first_order(optax.adamw(1e-3)),
        "Muon": lambda: first_order(optax.contrib.muon(0.02)),
        OURS: second_order,
        f"{OURS}, adaptive damping": lambda: second_order(
            damping=kfac.damping.adaptive()
        ),
        f"{OURS}, sampled Fisher": lambda: second_order("mc"),
    }


class Peak(threading.Thread):
    """The most memory that the process had while this ran, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = resident(), threading.Event()

    def run(self) -> None:
        """Looks 50 times a second."""
        while not self.stop.wait(0.02):
            self.most = max(self.most, resident())

    def __enter__(self) -> "Peak":
        """Starts looking."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops looking."""
        self.stop.set()
        self.join()


def resident() -> int:
    """Memory of this process in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def compiled(
    make: Callable[[], tuple[Callable[..., Any], Any]], problem: Problem
) -> dict[str, Any]:
    """Seconds of one compilation, and what came of it."""
    jax.clear_caches()
    before = resident()
    with Peak() as peak:
        times = [time.perf_counter()]
        step, state = make()
        times.append(time.perf_counter())
        traced = jax.jit(step).trace(problem.params, state, *problem.args)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        program = lowered.compile()
        times.append(time.perf_counter())
    tag, trace, lower, compiling = (b - a for a, b in itertools.pairwise(times))
    text = program.as_text() or ""
    memory = program.memory_analysis()
    return {
        "seconds": times[-1] - times[0],
        "tag_seconds": tag,
        "trace_seconds": trace,
        "lower_seconds": lower,
        "compile_seconds": compiling,
        "memory_bytes": peak.most - before,
        "code_bytes": getattr(memory, "generated_code_size_in_bytes", None),
        **count(text),
        "sources": dict(sources(text)),
    }


def count(text: str) -> dict[str, int]:
    """What a compiled program is made of: fusions, calls, loops and branches."""
    bodies = {
        name: re.sub(r"%[\w.-]+|metadata=\{[^}]*\}|\.\d+", "", body)
        for name, body in re.findall(
            r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S
        )
    }
    called = re.findall(r" fusion\(.*?calls=%?([\w.-]+)", text)
    return {
        "fusions": len(called),
        "different_fusions": len({bodies.get(name, name) for name in called}),
        "custom_calls": len(re.findall(r" custom-call\(", text)),
        "loops": len(re.findall(r" while\(", text)),
        "branches": len(re.findall(r" conditional\(", text)),
        "lines": text.count("\n"),
    }


def sources(text: str) -> collections.Counter[str]:
    """Which functions of this package fusions come from, by their stack frames."""
    tables: dict[str, dict[int, str]] = {}
    section = ""
    for line in text.splitlines():
        if re.fullmatch(r"\w+", line):
            section = line
        elif found := re.match(r"(\d+) (.*)", line):
            tables.setdefault(section, {})[int(found[1])] = found[2].strip('"')
    files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})

    def field(entry: str, name: str) -> int:
        found = re.search(rf"{name}=(\d+)", entry)
        return int(found[1]) if found else 0

    def frames(number: int) -> Iterator[str]:
        seen: set[int] = set()
        while number and number not in seen:
            seen.add(number)
            frame = tables.get("StackFrames", {}).get(number, "")
            place = tables.get("FileLocations", {}).get(
                field(frame, "file_location_id"), ""
            )
            path = files.get(field(place, "file_name_id"), "")
            if PACKAGE in path:
                function = functions.get(field(place, "function_name_id"), "")
                yield f"{path.rsplit(PACKAGE, 1)[1]}:{function.rsplit('.', 1)[-1]}"
            number = field(frame, "parent_frame_id")

    counts: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if " fusion(" in line:
            own = re.search(r"stack_frame_id=(\d+)", line)
            counts[next(frames(int(own[1])) if own else iter(()), "the network")] += 1
    return counts


def summarise(samples: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median of every figure, and ratios to AdamW's, compilation by compilation."""
    rows = {}
    for name, runs in samples.items():
        row = {
            k: quartiles([run[k] for run in runs])[1]
            for k, value in runs[0].items()
            if isinstance(value, (int, float))
        }
        pairs = [[r["seconds"] for r in each] for each in (runs, samples[BASELINE])]
        row |= {"ratio_quartiles": ratios(*pairs), "sources": runs[0]["sources"]}
        rows[name] = row
    return rows


def show(rows: dict[str, dict[str, Any]]) -> str:
    """The table of a network."""
    header = (
        "optimiser", "first call s", "ratio", "quartiles", "trace", "lower", "compile",
        "fusions", "different", "loops", "branches", "calls", "code MB", "memory MB",
    )  # fmt: skip
    table = []
    for name, row in rows.items():
        code = row.get("code_bytes")
        table.append(
            (
                name,
                row["seconds"],
                row["ratio_quartiles"][1],
                spread(row["ratio_quartiles"]),
                *(row[f"{part}_seconds"] for part in ("trace", "lower", "compile")),
                *(int(row[k]) for k in ("fusions", "different_fusions", "loops")),
                *(int(row[k]) for k in ("branches", "custom_calls")),
                None if code is None else code / 1e6,
                row["memory_bytes"] / 1e6,
            )
        )
    return text_table(header, table)


def benchmark(name: str, config: Config) -> dict[str, Any]:
    """Compiles all programs of a network, in turns."""
    problem = MODELS[name].make()
    calls = {
        title: lambda make=make: compiled(make, problem)
        for title, make in steps(problem).items()
    }
    rows = summarise(in_turns(calls, config.rounds, warm_up=1))
    print(f"\n{MODELS[name].title}, {config.rounds} rounds\n{show(rows)}", flush=True)
    found = collections.Counter(rows[OURS]["sources"]).most_common(config.sources)
    print("\n".join(f"  {n:4} {source}" for source, n in found), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles the networks asked for and writes ``first_step.json``."""
    config = parse(Config, argv, "first_step")
    unknown = set(config.models) - set(MODELS)
    if unknown:
        raise ConfigError(
            f"unknown models {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}."
        )
    result = begin(config, models={})
    for name in config.models:
        result["models"][name] = benchmark(name, config)
        write_json(config.out / "first_step.json", result)
    print(f"\nWritten to {config.out / 'first_step.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(lambda: main() and 0))
