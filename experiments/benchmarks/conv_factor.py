"""Time of a convolution's input factor: four ways to the same matrix.

    python -m experiments.benchmarks.conv_factor --shapes resnet8_32,lenet_2 --rounds 15

All ways are measured in one process, one call of each per round, in an order that
rotates. GFLOP/s are those of the product of all patches, whatever a way spares.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.common import (
    OUT,
    comma_list,
    machine,
    make_parser,
    positive_int,
    quartiles,
    settings,
    text_table,
    write_json,
)
from experiments.progress import ended
from kfac_jax_lite.factors import conv
from kfac_jax_lite.tagging.layers import ConvGeometry

# Batch, side, channels, side of the kernel, padding.
SHAPES = {
    "lenet_1": (128, 32, 3, 5, 0),
    "lenet_2": (128, 14, 6, 5, 0),
    "resnet8_first": (64, 32, 3, 3, 1),
    "resnet8_32": (64, 32, 16, 3, 1),
    "resnet8_16": (64, 16, 32, 3, 1),
    "resnet8_8": (64, 8, 64, 3, 1),
    "resnet50_1": (8, 56, 64, 3, 1),
    "resnet50_2": (8, 28, 128, 3, 1),
    "resnet50_3": (8, 14, 256, 3, 1),
    "resnet50_4": (8, 7, 512, 3, 1),
    "tiny": (4, 6, 2, 3, 1),
}
NAIVE, WHOLE, CHUNKS, SHIFTS = "conv patches", "im2col", "im2col in chunks", "shifts"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    default = ",".join(name for name in SHAPES if name != "tiny")
    add = parser.add_argument
    add("--shapes", type=comma_list(list(SHAPES)), default=default)
    add("--rounds", type=positive_int, default=15, help="timed calls of each way")
    add("--out", type=Path, default=OUT, help="folder of the result")
    return parser.parse_args(argv)


def geometry_of(shape: tuple[int, int, int, int, int]) -> ConvGeometry:
    """The geometry of a square convolution of stride 1, channels last."""
    batch, side, channels, kernel, pad = shape
    rows = side + 2 * pad - kernel + 1
    return ConvGeometry(
        lhs_spec=(0, 3, 1, 2),
        out_spec=(0, 3, 1, 2),
        kernel=(kernel, kernel),
        window_strides=(1, 1),
        padding=((pad, pad), (pad, pad)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        groups=1,
        rows=(batch, rows, rows),
        n_in=channels * kernel**2,
        n_out=1,
    )


def gram(geometry: ConvGeometry, x: jax.Array) -> jax.Array:
    """The product of all patches with themselves."""
    rows = conv.patches(geometry, x)
    return jnp.einsum("ri,rj->ij", rows, rows)


def chunked(geometry: ConvGeometry, x: jax.Array) -> jax.Array:
    """The same, chunk by chunk."""
    elements = int(np.prod(geometry.rows)) * geometry.n_in
    return conv.by_chunks(functools.partial(gram, geometry), x, elements)


def naive(geometry: ConvGeometry, x: jax.Array) -> jax.Array:
    """The same, with the patches that a convolution with a constant kernel makes."""
    order = ("NHWC", "HWIO", "NHWC")
    rows = lax.conv_general_dilated_patches(
        x, geometry.kernel, (1, 1), geometry.padding, dimension_numbers=order
    )
    rows = rows.reshape(-1, geometry.n_in)
    found = jnp.einsum("ri,rj->ij", rows, rows)
    # Its entries are ordered (channel, kernel axes).
    channels = x.shape[-1]
    order = np.arange(geometry.n_in).reshape(channels, -1).T.reshape(-1)
    return found[order][:, order]


def ways(geometry: ConvGeometry) -> dict[str, Callable]:
    """The ways to the factor, by name."""
    found = {
        NAIVE: functools.partial(naive, geometry),
        WHOLE: functools.partial(gram, geometry),
        CHUNKS: functools.partial(chunked, geometry),
        SHIFTS: functools.partial(conv.shifted_moment, geometry, axis=0),
    }
    return {name: jax.jit(way) for name, way in found.items()}


def measure(
    calls: dict[str, Callable], x: jax.Array, rounds: int
) -> dict[str, list[float]]:
    """Times all ways in turn; each was called before."""
    names, seconds = list(calls), {name: [] for name in calls}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name](x))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def benchmark(name: str, rounds: int) -> dict[str, Any]:
    """Measures one shape."""
    geometry = geometry_of(SHAPES[name])
    batch, side, channels, _, _ = SHAPES[name]
    shape = (batch, side, side, channels)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    calls = ways(geometry)
    wanted = calls[WHOLE](x)
    for way, call in calls.items():
        error = float(jnp.abs(call(x) - wanted).max() / jnp.abs(wanted).max())
        if error > 1e-4:
            raise RuntimeError(f"{name}: {way} is off by {error:.1e}, wanted 1e-4.")
    seconds = measure(calls, x, rounds)
    flops, rows = conv.patch_flops(geometry), {}
    for way, each in seconds.items():
        pairs = zip(each, seconds[WHOLE], strict=True)
        low, middle, high = quartiles(each)
        rows[way] = {
            "ms": 1e3 * middle,
            "ms_quartiles": [1e3 * low, 1e3 * middle, 1e3 * high],
            "gflop_per_second": flops / middle / 1e9,
            "ratio_to_im2col": quartiles([x / y for x, y in pairs]),
        }
    taken = conv.shift_axis(geometry) is not None
    return {"shape": list(shape), "flops": flops, "takes_shifts": taken, "rows": rows}


def show(result: dict[str, Any]) -> str:
    """The table of all shapes."""
    header = ("shape", "way", "ms", "quartiles", "GFLOP/s", "ratio", "quartiles")
    table = []
    for name, one in result.items():
        for way, row in one["rows"].items():
            first, _, last = row["ms_quartiles"]
            low, middle, high = row["ratio_to_im2col"]
            table.append(
                (
                    name,
                    way + (" *" if way == SHIFTS and one["takes_shifts"] else ""),
                    row["ms"],
                    f"{first:.2f}-{last:.2f}",
                    row["gflop_per_second"],
                    middle,
                    f"{low:.2f}-{high:.2f}",
                )
            )
    return text_table(header, table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures the shapes asked for and writes ``conv_factor.json``."""
    args = arguments(argv)
    result: dict[str, Any] = {"machine": machine(), "settings": settings(args)}
    print(" ".join(f"{k}={v}" for k, v in result["machine"].items()))
    result["shapes"] = {}
    for name in args.shapes:
        result["shapes"][name] = benchmark(name, args.rounds)
        write_json(args.out / "conv_factor.json", result)
    print(show(result["shapes"]))
    print(f"* taken by kfac. Written to {args.out / 'conv_factor.json'}.")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(main))
