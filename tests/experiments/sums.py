"""The digests that a user states for files of their own."""

import hashlib

from experiments.datasets.digests import SUMS


def state_digests(folder):
    """Writes the ``SHA256SUMS`` of a folder, as ``sha256sum *`` does."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != SUMS
    ]
    (folder / SUMS).write_text("".join(lines))
