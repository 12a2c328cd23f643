"""The package's types are complete: a user's checker knows every public symbol."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = [
    *(sys.executable, "-m", "pyright", "--verifytypes", "kfac_jax_lite"),
    *("--ignoreexternal", "--outputjson", "--pythonpath", sys.executable),
]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="pyright is not installed"
)
def test_every_public_type_is_known(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        COMMAND, capture_output=True, cwd=tmp_path, env=environment, text=True
    )
    report = json.loads(found.stdout)["typeCompleteness"]
    assert pathlib.Path(report["packageRootDirectory"]) == ROOT / "kfac_jax_lite"
    symbols = [s for s in report["symbols"] if s["isExported"]]
    assert len(symbols) > 2000
    unknown = [
        f"{symbol['name']}: {message['message']}"
        for symbol in symbols
        for message in symbol["diagnostics"]
    ]
    assert unknown == []
    assert report["completenessScore"] == 1
    assert found.returncode == 0
