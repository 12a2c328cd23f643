"""Starts the processes of a run on this host: ``python -m experiments.launch --help``.

It sets the variables that `experiments.processes` reads, puts the number of the process
before each line of output, and when a process dies stops the others, which would wait
for it. Under SLURM, `srun` does all this; see docs/multihost.md.
"""

import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import tyro

from experiments.configs.checks import check
from experiments.errors import ConfigError
from experiments.processes import (
    ADDRESS,
    COUNT,
    DEFAULT_HEARTBEAT,
    HEARTBEAT,
    LOCAL_DEVICES,
    NUMBER,
)
from experiments.progress import ended

PROGRAM = "python -m experiments.launch"
COMMAND = (sys.executable, "-m", "experiments.main")
DEVICE_FLAG = "--xla_force_host_platform_device_count"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
GRACE = 5.0

Children = Mapping[int, subprocess.Popen[str]]
Ended = queue.SimpleQueue[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Starts processes that train together; what follows `--` is their command."""

    processes: int = 2
    """Processes over all hosts."""
    devices_per_process: int = 1
    """Devices of each process; a CPU is made to count as that many."""
    hosts: int = 1
    """Hosts; each starts its equal share of the processes."""
    process_id: int = 0
    """Number of the first process on this host."""
    coordinator: str | None = None
    """host:port of process 0, the same on all hosts; on one host a free port."""
    heartbeat_seconds: int = DEFAULT_HEARTBEAT
    """Seconds without a sign of life after which a process counts as dead."""

    def __post_init__(self) -> None:
        check(self, counts="processes devices_per_process hosts heartbeat_seconds")
        if self.processes % self.hosts:
            raise ConfigError(
                f"processes is {self.processes}; wanted a multiple of the "
                f"{self.hosts} hosts."
            )
        if self.process_id not in range(0, self.processes, self.share):
            raise ConfigError(
                f"process-id is {self.process_id}; the first process of a host is one "
                f"of {list(range(0, self.processes, self.share))}."
            )
        if self.coordinator is None and self.hosts > 1:
            raise ConfigError(
                "coordinator is missing; several hosts want the host:port of process 0."
            )

    @property
    def share(self) -> int:
        return self.processes // self.hosts


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    own, command = given[:cut], given[cut + 1 :]
    config = tyro.cli(LaunchConfig, prog=PROGRAM, args=own)
    if not command:
        print("error: there is no command; wanted one as in -- train", file=sys.stderr)
        return 2
    return run([*COMMAND, *command], environments(config))


def environments(config: LaunchConfig) -> dict[int, dict[str, str]]:
    """Returns what each process of this host finds in its environment."""
    shared = {
        COUNT: str(config.processes),
        HEARTBEAT: str(config.heartbeat_seconds),
        "PYTHONUNBUFFERED": "1",
    }
    if config.coordinator is None:
        address = f"127.0.0.1:{free_port()}"
        shared |= {ADDRESS: address, BIND_ADDRESS: address}
    else:
        shared |= {ADDRESS: config.coordinator}
    count = config.devices_per_process
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(DEVICE_FLAG)]
    shared["XLA_FLAGS"] = " ".join([*flags, f"{DEVICE_FLAG}={count}"])
    found = {}
    for local in range(config.share):
        number = config.process_id + local
        devices = range(local * count, (local + 1) * count)
        found[number] = shared | {
            NUMBER: str(number),
            LOCAL_DEVICES: ",".join(map(str, devices)),
        }
    return found


def free_port() -> int:
    """Returns a port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: Sequence[str], variables: Mapping[int, Mapping[str, str]]) -> int:
    """Runs a command once for each environment, until all end or the first fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    children: dict[int, subprocess.Popen[str]] = {}
    ended: Ended = queue.SimpleQueue()
    readers: list[threading.Thread] = []
    try:
        for number, added in variables.items():
            child = subprocess.Popen(
                command,
                env={**os.environ, **added},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            children[number] = child
            say(f"process {number} has the id {child.pid}")
            readers.append(threading.Thread(target=follow, args=(number, child, ended)))
            readers[-1].start()
        number, status = first_failure(len(children), ended)
    except KeyboardInterrupt:
        say("interrupted; a run continues from its last checkpoint, if it has one.")
        return 128 + signal.SIGINT
    finally:
        stop(children)
        for reader in readers:
            reader.join()
    if status == 0:
        return 0
    say(
        f"process {number} {cause(status)}; the others were stopped. A run continues "
        "from its last checkpoint, if it has one, by the same command."
    )
    return status if status > 0 else 128 - status


def follow(number: int, child: subprocess.Popen[str], ended: Ended) -> None:
    """Passes a process's output on, and tells when and how it has ended."""
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            print(f"[{number}] {line.rstrip()}\n", end="", flush=True)  # one write
    ended.put((number, child.wait()))


def first_failure(count: int, ended: Ended) -> tuple[int, int]:
    """Waits until all processes have ended or one has failed."""
    number, status = 0, 0
    for _ in range(count):
        number, status = ended.get()
        if status:
            break
    return number, status


def stop(children: Children) -> None:
    """Asks the processes that still run to end, and kills those that do not."""
    for child in children.values():
        child.terminate()
    deadline = time.monotonic() + GRACE
    for child in children.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def cause(status: int) -> str:
    """Says in words how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by signal {-status} ({signal.Signals(-status).name})"


def say(text: str) -> None:
    """Prints a line of the launcher's own."""
    print(f"[launch] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(ended(main))
