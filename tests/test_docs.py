"""The documentation: it builds, its code runs, and it has what the library has."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests.acceptance import pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
WALK = (DOCS / "walk.md").read_text()
# Modules without ``__all__``: what is public there.
LISTED = {
    "damping": ["adaptive", "levenberg_marquardt"],
    "logs": ["CSV", "TensorBoard", "Table"],
    "intervals": ["every", "adaptive", "staleness", "Interval"],
    "curvature.measures": None,
}


def blocks(page, language):
    """Blocks of a language, each behind the empty lines that keep its line numbers."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield "\n" * (text[: match.start()].count("\n") + 1) + match[2]


def ran(page, code, namespace):
    """The namespace after a block."""
    with jax.enable_x64(False):
        exec(compile(code, page, "exec"), namespace)
    return namespace


# ------------------------------------------------------------------------- the site


def test_site_builds_without_warnings(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{name} is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    index = (tmp_path / "index.html").read_text()
    assert "tagged.value_and_grad" in re.sub(r"<[^>]*>", "", index)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def load_hooks():
    """The module ``docs/hooks.py``."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_the_readme_fits_on_two_screens():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[0] == "Quickstart"


def test_the_first_page_says_what_the_readme_says():
    """The points of the introduction are the same; the rest comes in by marks."""
    points = [
        re.findall(
            r"^- .*\n(?:  .*\n)*", path.read_text().split("## Quickstart")[0], re.M
        )
        for path in (ROOT / "README.md", DOCS / "index.md")
    ]
    assert len(points[0]) == 4 and points[0] == points[1]


TEXTS = [
    ROOT / "README.md",
    *PAGES,
    ROOT / "experiments" / "README.md",
    ROOT / "notebooks" / "README.md",
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_to_files(path):
    """On the repository's own pages too, where MkDocs does not look."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", path.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), link


def test_no_environment_variable_is_asked_for():
    for path in TEXTS:
        text = path.read_text()
        assert not re.search(r"MALLOC_|OPENBLAS_NUM_THREADS=", text), path.name
    readme = (ROOT / "README.md").read_text()
    assert not re.search(r"\b[A-Z_]{4,}=|\bexport\b|XLA_FLAGS|NPROC", readme)


def test_marked_parts_of_the_readme_exist():
    hooks = load_hooks()
    for page in PAGES:
        text = hooks.MARK.sub(hooks.included, page.read_text())
        assert not hooks.MARK.search(text)
    text = "# A\n1\n## B\n```\n# no heading\n```\n### C\n2\n## D\n3"
    assert hooks.section(text, "B") == "```\n# no heading\n```\n### C\n2"
    assert hooks.section(text, "D") == "3"
    with pytest.raises(KeyError, match="no heading 'E'"):
        hooks.section(text, "E")


def test_links_of_the_repository_are_those_of_the_site():
    figure = "experiments/benchmarks/results/scale.png"
    linked = load_hooks().linked
    assert (
        linked("[a](docs/b.md#c) [d](https://e.f)", "")
        == "[a](b.md#c) [d](https://e.f)"
    )
    assert linked("[a](LICENSE) b [c](setup.cfg)", "") == "[a](LICENSE) b c"
    assert linked("[a](../docs/b.md)", "experiments") == "[a](b.md)"
    assert linked("[a](experiments/README.md#b)", "") == "[a](experiments.md#b)"
    assert linked(f"![a](../{figure})", "docs") == f"![a]({figure})"
    assert linked("a ![b](../none.png)", "docs") == "a "
    assert linked(f"[![a](../{figure})](b.md)", "docs") == f"[![a]({figure})](b.md)"
    assert linked("layers[i](x)", "docs") == "layers[i](x)"


# -------------------------------------------------------------------- the reference


def defined(module):
    """Names that a module defines and does not import, without those of its inside."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def public_names(module=kfac, prefix=""):
    """Dotted names of everything public but the modules themselves."""
    path = prefix.rstrip(".")
    names = getattr(module, "__all__", None) or LISTED[path] or defined(module)
    for name in names:
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield from public_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("name", sorted(public_names()))
def test_api_reference_has(name):
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert f"::: kfac_jax_lite.{name}\n" in text


# ------------------------------------------------------------------ troubleshooting


def literal(node):
    """A message with ``…`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(v) for v in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return "…"


def messages():
    """Texts of the errors and warnings that the library raises, by place."""
    for path in sorted(Path(kfac.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not (isinstance(call, ast.Call) and call.args):
                continue
            if isinstance(node, ast.Raise) or ast.unparse(call.func).endswith("warn"):
                text = literal(call.args[0]).replace("\n", " ")
                yield f"{path.name}:{node.lineno}", text


def test_troubleshooting_has_every_error_and_warning():
    text = (DOCS / "troubleshooting.md").read_text()
    found = list(messages())
    assert len(found) > 200
    missing = [f"{place}: {message}" for place, message in found if message not in text]
    assert not missing, "\n".join(missing)


# ------------------------------------------------------------------------- the code


def test_python_blocks_are_code_files_or_fragments():
    for page in PAGES:
        for info, _ in FENCE.findall(page.read_text()):
            assert info in ("python", "sh", "text", "{.python .fragment}") or (
                page.name == "walk.md" and re.fullmatch(r'python title="\w+.py"', info)
            ), f"{page.name}: {info}"


# Pages whose sections stand by themselves: tests/experiments/test_readme.py runs them.
BY_SECTION = ("devices", "recipes")


@pytest.fixture(scope="module")
def names():
    """What the README's quickstart leaves behind; the pages go on from it."""
    readme = ROOT / "README.md"
    code = next(blocks(readme, "python"))
    return ran(readme, code, {"__name__": "docs"})


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.stem not in BY_SECTION and any(blocks(p, "python"))],
    ids=lambda page: page.stem,
)
def test_code_runs(names, page):
    namespace = dict(names, learning_rate=0.05)
    for code in blocks(page, "python"):
        namespace = ran(page, code, namespace)
    leaves = jax.tree.leaves((namespace["loss"], namespace["params"]))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


# ------------------------------------------------------------------------- the walk


def walk():
    """Files of the walk by name, and its commands with what they print."""
    files = dict(re.findall(r'^```python title="(.*?)"\n(.*?)^```', WALK, re.M | re.S))
    files["quickstart.py"] = next(blocks(ROOT / "README.md", "python"))
    commands = re.findall(
        r"^```sh\n([^\n]*python (\w+\.py))\n```\n\n```text\n(.*?)^```",
        WALK,
        re.M | re.S,
    )
    return files, commands


def without_numbers(text):
    return re.sub(r"\d+(\.\d+)?", "#", text.strip())


def test_walk_is_complete():
    files, commands = walk()
    assert [name for _, name, _ in commands] == list(
        dict.fromkeys(["quickstart.py", *files])
    )
    for name, code in files.items():
        compile(code, name, "exec")
    readme = (ROOT / "README.md").read_text()
    assert commands[0][2].rsplit("\n", 2)[0].strip() in readme


@pytest.mark.slow
def test_walk(tmp_path):
    files, commands = walk()
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    python = f'"{sys.executable}" -W error'
    for command, _, printed in commands:
        run = subprocess.run(
            ["bash", "-c", command.replace("python ", f"{python} ")],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        assert without_numbers(run.stdout) == without_numbers(printed), command
        losses = [re.findall(r"loss (\S+)", text) for text in (run.stdout, printed)]
        np.testing.assert_allclose(*np.array(losses, float), rtol=0.05)


# ---------------------------------------------------------------------- the figures


def rows_of(page, start):
    """Cells of the rows of a page whose first cell begins with a text."""
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].startswith(start):
            yield cells


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("ours", "kfac_jax_lite"),
        ("kfac_jax", "kfac-jax"),
        ("soap", "SOAP"),
        ("muon", "Muon"),
        ("sgd", "SGD"),
    ],
)
def test_figures_at_a_glance(name, title):
    result = json.loads((RESULTS / "time_to_target.json").read_text())
    wanted = [
        f"{result['relative'][measure][name]['geometric_mean']:.2f}"
        for measure in ("steps", "cpu_seconds", "with_compiling")
    ]
    reached = [t["optimisers"][name]["reached"] >= 3 for t in result["tasks"].values()]
    row = next(rows_of("comparison.md", title))
    assert row[1:5] == [*wanted, str(sum(reached))]


@pytest.mark.parametrize(
    ("file", "model", "title"),
    [
        ("step_time_rows.json", "mlp", "MLP 784"),
        ("step_time_rows.json", "autoencoder", "autoencoder, 512"),
        ("step_time.json", "lenet5", "LeNet-5, 128"),
        ("step_time.json", "resnet", "ResNet-8, 64"),
    ],
)
def test_figures_of_time_per_step(file, model, title):
    rows = json.loads((RESULTS / file).read_text())["models"][model]["rows"]
    names = [
        f"{who} {every}"
        for every in ("(1, 5)", "(10, 100)")
        for who in ("kfac-jax", "ours mc")
    ]
    seen = next(rows_of("comparison.md", title))[1:]
    wanted = [rows[n]["ratio_to_sgd"] for n in (*names, "ours mc low_rank (10, 100)")]
    np.testing.assert_allclose(np.array(seen, float), wanted, rtol=5e-3)


@pytest.mark.parametrize("page", pages.PAGES)
def test_figures_beside_adam(page):
    record = json.loads((RESULTS / "pages.json").read_text())[page]
    assert pages.table(record) in (DOCS / f"{page}.md").read_text()


def test_figures_of_the_readme():
    """Those of its table and its options, in the order in which they stand there."""
    readme = (ROOT / "README.md").read_text()

    def result(name):
        return json.loads((RESULTS / name).read_text())

    def of(name, task, optimiser="ours"):
        return tasks[task]["optimisers"][optimiser][name]

    target, pinn = result("time_to_target.json"), result("pages.json")["pinn"]
    tasks, relative = target["tasks"], target["relative"]
    steps = result("step_time_rows.json")["models"]["mlp"]["rows"]
    autoencoder = result("autoencoder.json")["targets"]
    studies = RESULTS.parents[1] / "studies" / "results"
    cells = json.loads((studies / "batch_size" / "summary.json").read_text())["cells"]
    right = {
        c["optimizer"]: 100 * c["test_accuracy"]
        for c in cells
        if c["batch_size"] == 2048
    }
    cells = json.loads((studies / "damping" / "summary.json").read_text())["cells"]
    thirds = [cells[name]["best_third"] for name in ("adaptive", "fixed_1e-03")]
    wide = result("scale.json")["axes"]["width"]["points"][-1]
    names = ("ours cholesky", "ours low_rank", "AdamW")
    wide_ms = [wide["rows"][name]["ms"]["amortised"] for name in names]
    last = {n: o["final"] for n, o in pinn["optimisers"].items()}
    compiling = [of("compile_seconds", task) for task in tasks]
    reached = [autoencoder[n]["adam_final"] for n in ("ours", "adam")]
    for text in (
        f"after {reached[0]['step']} steps and {reached[0]['seconds']:.1f} s",
        f"after {reached[1]['step']} steps and {reached[1]['seconds']:.1f} s",
        f"{min(last['K-FAC']):.4f} to {max(last['K-FAC']):.3f}, "
        f"Adam's {min(last['Adam']):.3f} to {max(last['Adam']):.3f}",
        f"AdamW = 1: {relative['steps']['ours']['geometric_mean']:.2f}",
        f"{of('cpu_seconds', 'lenet')[1]:.1f} processor seconds, AdamW "
        f"{of('cpu_seconds', 'lenet', 'adamw')[1]:.1f}, SGD "
        f"{of('cpu_seconds', 'lenet', 'sgd')[1]:.1f} "
        f"({of('compile_seconds', 'lenet'):.1f} s of compiling not included)",
        f"takes {min(compiling):.0f} to {max(compiling):.0f} s",
        f"{relative['with_compiling']['ours']['geometric_mean']:.2f} times AdamW's",
        f"{of('cpu_seconds', 'mlp')[1]:.1f} processor seconds, AdamW "
        f"{of('cpu_seconds', 'mlp', 'adamw')[1]:.1f}",
        f"{of('cpu_seconds', 'transformer')[1]:.1f} processor seconds, AdamW "
        f"{of('cpu_seconds', 'transformer', 'adamw')[1]:.1f}, Muon "
        f"{of('cpu_seconds', 'transformer', 'muon')[1]:.1f}",
        f"{right['kfac']:.1f} % correct, Muon {right['muon']:.1f}, AdamW "
        f"{right['adamw']:.1f}, SGD {right['sgd']:.1f}",
        f"at width {wide['width']:,}: {wide_ms[0]:.0f} ms, low rank {wide_ms[1]:.0f}, "
        f"AdamW {wide_ms[2]:.0f}",
        f"{thirds[0]:.3f} with `damping.adaptive()`, {thirds[1]:.3f} with the default",
        f"{steps['ours mc (10, 100)']['ratio_to_sgd']:.2f} times SGD's instead of "
        f"{steps['ours mc (1, 5)']['ratio_to_sgd']:.2f}",
        f"{steps['ours mc low_rank (10, 100)']['ratio_to_sgd']:.2f} times SGD's with",
    ):
        assert text in readme.replace("\n", " "), text
