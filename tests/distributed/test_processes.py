"""Two processes under ``jax.distributed``, layers dealt out to owners in both."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import batches_of, leaves
from tests.parallel import AXIS, EXAMPLES, OWNER, device_step, single, transformation

NET = models.mlp("processes", (4, 5, 3))
STEPS, LOCAL = 6, 2
ROOT = pathlib.Path(kfac.__file__).parents[1]


def train():
    """Every process: a few steps over the devices of all of them."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), (AXIS,))
    tagged = NET.tag(EXAMPLES // devices)
    reduction = OWNER(devices=devices, share="gradients")
    tx = transformation(tagged.layers, AXIS, reduction)
    state = tx.init(NET.params())
    specs = kfac.state_specs(state, AXIS)
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    step = jax.jit(
        jax.shard_map(
            device_step(tagged, tx, True),
            mesh=mesh,
            in_specs=(whole, specs, split, split),
            out_specs=(whole, specs, whole),
        )  # fmt: skip
    )

    def put(x, spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        )

    params = jax.tree.map(lambda x: put(x, whole), NET.params())
    state = jax.tree.map(put, state, specs)
    for batch in batches_of(NET, STEPS, EXAMPLES):
        params, state, _ = step(params, state, *(put(x, split) for x in batch))
    state = multihost_utils.process_allgather(state, tiled=True)
    layers = NET.tag(EXAMPLES).layers
    state = kfac.relayout(state, transformation(layers).init(NET.params()), layers)
    return params, state.kfac


def main(number, count, port):
    """Entry of a process; the first prints what it has."""
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    params, state = train()
    if number == 0:
        found = {"params": leaves(params), "factors": leaves(state.factors)}
        found["interval"] = {"": state.clock.interval}
        plain = {
            k: {n: np.asarray(x).tolist() for n, x in v.items()}
            for k, v in found.items()
        }
        print("RESULT " + json.dumps(plain), flush=True)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_the_work_of_one(count):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={LOCAL}",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    code = (
        "import sys, tests.distributed.test_processes as t;"
        "t.main(*map(int, sys.argv[1:]))"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), str(count), str(port)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for number in range(count)
    ]
    try:
        outputs = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * count, outputs
    (line,) = [x for x in outputs[0].splitlines() if x.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    params, state = single(NET, STEPS)
    wanted = {"params": leaves(params), "factors": leaves(state.factors)}
    for kind, tree in wanted.items():
        assert set(found[kind]) == set(tree)
        for name, value in tree.items():
            np.testing.assert_allclose(found[kind][name], value, rtol=0, atol=1e-8)
    assert found["interval"][""] == state.clock.interval.tolist()
