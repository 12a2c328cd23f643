"""Collectives of compiled programs, parsed from their text."""

import re
from typing import NamedTuple

ITEMSIZE = {"pred": 1, "u8": 1, "s8": 1, "u16": 2, "bf16": 2, "f16": 2}
ITEMSIZE |= {"s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8, "u64": 8}
KINDS = {
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-gather": "all_gather",
    "all-to-all": "all_to_all",
    "collective-permute": "permute",
}
CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Parsed(NamedTuple):
    """One collective: what it is, bytes of the whole array, and where it stands.

    ``gated``: it came from a branch of a ``cond`` in the traced program.
    """

    kind: str
    payload: int
    devices: int
    computation: str
    gated: bool


def collectives(text):
    """Every collective of a compiled program."""
    found, computation = [], ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            computation = "ENTRY" if head[1] else head[2]
        call = CALL.search(line)
        if call:
            found.append(parse(line, call, computation))
    return found


def parse(line, call, computation):
    """One instruction."""
    kind = KINDS[call[2]]
    gated = bool(re.search(r'op_name="[^"]*cond/branch', line))
    size = sum(
        ITEMSIZE[dtype] * prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in SHAPE.findall(call[1])
    )
    if kind == "permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)[1]
        return Parsed(kind, size * (pairs.count("},{") + 1), 0, computation, gated)
    devices = group_size(line)
    if kind == "reduce_scatter":
        size *= devices
    return Parsed(kind, size, devices, computation, gated)


def group_size(line):
    """How many devices take part, in any of the ways that programs write it."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if tiled:  # [groups,devices]<=[…]
        return int(tiled[1])
    # mesh['a'=4,'b'=2] {'a'}
    ((sizes, names),) = re.findall(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    size = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return prod(int(size[name]) for name in re.findall(r"'(\w+)'", names))


def prod(numbers):
    """Product."""
    result = 1
    for number in numbers:
        result *= number
    return result


def totals(records):
    """Bytes by kind and number of devices (of permutations by kind alone)."""
    found = {}
    for record in records:
        devices = 0 if record.kind == "permute" else record.devices
        key = (record.kind, devices)
        found[key] = found.get(key, 0) + record.payload
    return found
