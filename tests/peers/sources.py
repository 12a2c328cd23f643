"""The peers' own test files, of the versions installed: downloaded, checked, unpacked.

Nothing of theirs is kept in this repository: their source distributions come from the
package index through pip, into a folder that is thrown away.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

SHA256 = {
    "optax-0.2.8": "5b225b35066fc3eebaa4d798f1b4173b4d57d1a480610908981f8343b50af0b0",
    "flax-0.12.8": "1bb438775b967a3f1f42b9c3d4ddf1d2883cd6406589f9cecdc244634036bdc4",
}


class Unavailable(Exception):
    """The tests cannot be had; says why."""


def unpacked(peer: str, folder: Path) -> Path:
    """A peer's source distribution.

    Args:
        peer: ``"optax"`` or ``"flax"``.
        folder: where to download and unpack; archives that are there are used.

    Returns:
        Its root folder.

    Raises:
        Unavailable: no checksum is known for the version installed, no network, or
            another checksum.
    """
    name = f"{peer}-{importlib.metadata.version(peer)}"
    if name not in SHA256:
        raise Unavailable(f"no checksum is known for {name}: add it to SHA256.")
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        download(name, folder)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise Unavailable(f"{archive.name} has SHA-256 {found}, not {SHA256[name]}.")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".py")]
        tar.extractall(folder, members, filter="data")
    return folder / name


def download(name: str, folder: Path) -> None:
    """Fetches ``name-version`` through pip, which checks the sum as well."""
    peer, version = name.rsplit("-", 1)
    wanted = folder / f"{peer}.txt"
    wanted.write_text(f"{peer}=={version} --hash=sha256:{SHA256[name]}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    options = ["--require-hashes", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, *options, "-r", str(wanted)], capture_output=True, text=True
    )
    if done.returncode:
        raise Unavailable(f"pip could not get {name}: {done.stderr[-300:]}")
