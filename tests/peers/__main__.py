"""Optax's and flax's own tests with K-FAC in place of their optimisers.

    python -m tests.peers --out runs/peers.json

Every test file runs up to three times, each in a process of its own: as it is
(``theirs``), with another optimiser of optax in the place of the one that a test names
(``control``), and with K-FAC there (``ours``). Where the tests take a list of
optimisers, Adam alone is the control. A test that fails with ours and with the control
is about the optimiser it names: its numbers, the fields of its state. One that fails
with ours alone is looked at, and has its reason in ``reasons.py`` or is a fault of
ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.peers import sources
from tests.peers.places import FILES, File
from tests.peers.reasons import reason

# Compiling takes far longer than running; kernels need not be fast.
FLAGS = (
    "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
PATIENCE = 3600


def records(root: Path, file: File, variant: str, folder: Path) -> dict:
    """What became of a file's tests with a variant in place."""
    result = folder / f"{file.peer}_{Path(file.path).stem}_{variant}.json"
    command = [sys.executable, "-m", "tests.peers.child", root, file.path, variant]
    done = subprocess.run(
        [*map(str, command), str(result)],
        env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode or not result.exists():
        lines = done.stderr.strip().splitlines()[-3:]
        return {"collection": {"outcome": "failed", "why": " ".join(lines)}}
    return json.loads(result.read_text())


def verdict(name: str, found: dict[str, dict]) -> str:
    """What a test of ours comes to: passed, skipped, and so on."""
    ours = found["ours"][name]
    if ours["outcome"] != "failed":
        return "untouched" if not ours.get("used") else ours["outcome"]
    theirs = found.get("theirs", {}).get(name, {})
    if theirs.get("outcome") == "failed":
        return "fails as it is"
    if reason(name):
        return "reason known"
    control = found.get("control", {}).get(name, {})
    if control.get("outcome") == "failed":
        return "control fails too"
    return "ours fails"


def compared(found: dict[str, dict]) -> dict[str, dict]:
    """Verdicts of a file's tests, with what failing ones said."""
    rows = {}
    for name, record in found["ours"].items():
        rows[name] = {"verdict": verdict(name, found), "why": record["why"]}
        if rows[name]["verdict"] == "reason known":
            rows[name]["reason"] = reason(name)
        for other in ("theirs", "control"):
            if other in found:
                seen = found[other].get(name, {"outcome": "not there"})
                rows[name][other] = seen["outcome"]
    return rows


def measure(files: list[File], folder: Path) -> dict[str, dict]:
    """Runs files and compares variants.

    Raises:
        sources.Unavailable: their tests cannot be had.
    """
    roots = {peer: sources.unpacked(peer, folder) for peer in {f.peer for f in files}}
    result = {}
    for file in files:
        found = {
            variant: records(roots[file.peer], file, variant, folder)
            for variant in file.variants
        }
        rows = compared(found)
        counts = counted(rows)
        result[f"{file.peer}: {file.path}"] = {
            "counts": counts,
            "left out": file.why,
            "tests": rows,
        }
        print(file.path, counts, flush=True)
        for name, row in rows.items():
            if row["verdict"] == "ours fails":
                print("   ", name, row["why"], flush=True)
    return result


def counted(rows: dict[str, dict]) -> dict[str, int]:
    """How many tests have each verdict."""
    verdicts = [row["verdict"] for row in rows.values()]
    return {v: verdicts.count(v) for v in sorted(set(verdicts))}


def main() -> int:
    """Runs the command line; 1 if a test fails with ours and nobody knows why."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", nargs="*", default=[], help="parts of paths")
    parser.add_argument("--sources", type=Path, help="folder that keeps the archives")
    parser.add_argument("--out", type=Path, default=Path("runs/peers.json"))
    args = parser.parse_args()
    chosen = [
        f for f in FILES if not args.files or any(p in f.path for p in args.files)
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(chosen, args.sources or Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    bad = sum(r["counts"].get("ours fails", 0) for r in result.values())
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
