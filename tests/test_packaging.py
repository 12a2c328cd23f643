"""What is released: the version, the wheel, the source distribution."""

import configparser
import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kfac_jax_lite as kfac

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kfac_jax_lite"


def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def first(pattern, path):
    """The first match of a pattern in a file of the repository."""
    found = re.search(pattern, (ROOT / path).read_text(), re.M)
    assert found, f"{path} has no {pattern}"
    return found[1]


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )


# ---------------------------------------------------------------------- what is said


def test_one_version():
    version = kfac.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    assert config()["metadata"]["version"] == version
    assert first(r"^version: (\S+)$", "CITATION.cff") == version
    released = r"^(?:## \[|To be released as )(\d[^\s\]]*?)(?:\]|\.$)"
    assert first(released, "CHANGELOG.md") == version


def test_changelog_form():
    """Keep a Changelog: versions, and below them kinds of change, each once."""
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.split(r"^## ", text, flags=re.M)[1:]
    assert versions[0].startswith("[Unreleased]")
    for part in versions:
        title = part.splitlines()[0]
        assert re.fullmatch(r"\[Unreleased\]|\[[\d.]+\] - \d{4}-\d\d-\d\d", title)
        found = re.findall(r"^### (.*)$", part, re.M)
        assert found == [kind for kind in kinds if kind in found]


def test_citation():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    assert citation["license"] == config()["metadata"]["license"]


def test_every_dependency_of_dev_is_pinned():
    """``make test`` installs the versions of ``constraints.txt`` and no others."""

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {
        plain(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = config()["options.extras_require"]
    wanted = " ".join([*extras.values(), config()["options"]["install_requires"]])
    names = {plain(n) for n in re.findall(r"([\w.-]+)(?:\[\w+\])?>=", wanted)}
    assert names and not names - pinned


def test_workflow_mirrors_the_script():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    named = re.findall(r"Python :: (3\.\d+)", config()["metadata"]["classifiers"])
    assert versions == named
    commands = {
        step["run"] for job in jobs.values() for step in job["steps"] if "run" in step
    }
    assert commands == {".ci/run", "make lint", "make docs", "make dist"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {c.split()[1] for c in commands if c.startswith("make")} <= set(targets)


# ---------------------------------------------------------------------- what is built


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of a wheel and a source distribution, built from a copy."""
    for name in ("build", "twine"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install '.[dev]'")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than 77")
    source = tmp_path_factory.mktemp("packaging") / "source"
    unwanted = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*unwanted))
    built = run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (found,) = dist.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_has_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py")}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == modules | {"kfac_jax_lite/py.typed"}
    assert "kfac_jax_lite/bayes/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in info)


@pytest.mark.slow
def test_metadata_of_the_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == kfac.__version__
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert extras == set(config()["options.extras_require"])
    core = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    named = {re.match(r"\w+", r)[0] for r in core}
    assert named == {"chex", "jax", "jaxlib", "numpy", "optax", "scipy"}


@pytest.mark.slow
def test_source_distribution(dist):
    (path,) = dist.glob("*.tar.gz")
    names = {n.split("/", 1)[1] for n in tarfile.open(path).getnames() if "/" in n}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.cfg"}
    assert wanted | {"pyproject.toml", "kfac_jax_lite/py.typed"} <= names
    assert not [n for n in names if n.startswith(("tests", "experiments", "docs"))]


@pytest.mark.slow
def test_twine_check(dist):
    files = sorted(dist.iterdir())
    assert len(files) == 2
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_wheel_runs_the_quickstart(wheel, tmp_path):
    """In an empty environment, with the core dependencies and nothing else."""
    assert run(sys.executable, "-m", "venv", tmp_path / "env").returncode == 0
    python = tmp_path / "env" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
    ]
    installed = run(*install, wheel)
    if "No matching distribution" in installed.stderr:
        pytest.skip("pip reaches no index with the dependencies")
    assert installed.returncode == 0, installed.stderr
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", readme, re.M | re.S)
    assert code
    (tmp_path / "quickstart.py").write_text(code[1])
    unset = ("PYTHONPATH", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    ran = run(python, "quickstart.py", cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split("loss")[-1]) < 0.2
    listed = run(python, "-m", "pip", "list", "--format=freeze").stdout
    assert not re.search(r"^(flax|matplotlib|duckdb|pytest)==", listed, re.M)
