"""The layers: who may import whom, and where the heavy dependencies live. A new module must be placed here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Highest first: a module imports from the rows above its own and from its own row. `data` stands for all of `data.*`.
LAYERS = {
    "words": ["config", "pairs", "errors"],
    "mathematics": [
        *("losses", "logps", "metrics", "stopping", "space", "anomalies", "shingles"),
        *("comparisons", "curve_families", "curves", "trends"),
        *("acquisition.scores", "acquisition.choose", "acquisition.standings", "acquisition.heads"),
        *("evaluate.win_rates", "evaluate.calibration", "evaluate.drift", "evaluate.exports"),
        "evaluate.alpaca_eval",
    ],
    "material": [
        *(
            "storage",
            "machine",
            "reach",
            "attempts",
            "lease",
            "notices",
            "pulse",
            "data",
            "attention",
            "models",
            "manifest",
        ),
        *(
            "shards",
            "checkpoint",
            "tracking",
            "compiler_locks",
            "lineage",
            "recipe_reference",
            "device",
            "memory",
            "prepare",
            "job_env",
        ),
        *("page", "run_record", "run_panels", "recipe_diff", "evaluation_report", "model_card", "report"),
        *("run_comparison", "study", "study_findings", "study_panels", "study_report", "acquire_report", "data_report"),
        *("acquisition.pool", "acquisition.answers"),
    ],
    "machinery": ["actor_pool", "engine", "engine_state", "reference", "generate"],
    "procedure": [
        *("train", "uploads", "evaluate", "acquisition.samples", "acquisition.features", "acquisition.oracles"),
        *("acquisition.judge", "acquisition.chat", "acquisition.label_queue", "evaluate.harness"),
    ],
    "launch": [
        "launch",
        "promote",
        "supervise",
        "sweep",
        "acquisition.rounds",
        "acquire",
        "score",
        "evaluation",
        "shipping",
        "submit",
        "jobs",
    ],
    "surface": ["terminal", "displays", "cli", "cli_jobs", "demo", "doctor", "cluster_facts", "serve", "tune_spaces"],
}
ROW = {name: row for row, names in enumerate(LAYERS.values()) for name in names}
WITHOUT_RAY = {"words", "mathematics", "material"}

HOMES = {"deepspeed": {"engine"}, "mlflow": {"tracking"}, "lm_eval": {"evaluate.harness"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in ("dpo_ray", "serve", "tune_spaces")
    for path in sorted((ROOT / package).rglob("*.py"))
}
PACKAGES = sorted(name for name, path in FILES.items() if path.name == "__init__.py")
MODULES = sorted(set(FILES) - set(PACKAGES))


def imported(name: str) -> Iterator[str]:
    """Every import of a module, at any depth, as full dotted names; also `import_module("...")`."""
    package = name if name in PACKAGES else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in FILES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(value.value) for value in node.args[:1] if isinstance(value, ast.Constant))


def place(name: str) -> str:
    """The entry of the table that a module belongs to."""
    short = name.removeprefix("dpo_ray.")
    for entry in (short, short.rpartition(".")[0], short.partition(".")[0]):
        if entry in ROW:
            return entry
    pytest.fail(f"{name} has no layer: place it in the table of {Path(__file__).name}")


def ours(name: str) -> set[str]:
    """The modules of ours that a module imports, packages left out (they hold nothing)."""
    return {target for target in imported(name) if target in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_layer_and_those_above(name: str):
    row = ROW[place(name)]
    wrong = [target for target in ours(name) if ROW[place(target)] > row]
    assert not wrong, f"{name} imports from a later layer: {wrong}"


def test_no_import_goes_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(ours(name)):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_heavy_dependencies_stay_in_their_homes(name: str):
    layer = list(LAYERS)[ROW[place(name)]]
    for target in imported(name):
        library = target.partition(".")[0]
        assert place(name) in HOMES.get(library, {place(name)}), f"{name} imports {library}"
        assert not (library == "ray" and layer in WITHOUT_RAY), f"{name} ({layer}) imports ray"


def test_serving_reaches_no_module_that_imports_deepspeed():
    seen: set[str] = set()
    waiting = [name for name in MODULES if place(name) == "serve"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += ours(name)
    assert not [name for name in seen if any(t.partition(".")[0] == "deepspeed" for t in imported(name))]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_itself_imports_nothing(name: str):
    assert not list(imported(name))


def test_a_recipe_is_read_without_torch_ray_or_pandas():
    code = "import dpo_ray.config, sys; print([m for m in ('torch', 'ray', 'pandas', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_training_step_alone_needs_none_of_the_machinery():
    """`benchmarks/gpu_step.py` runs where only torch and transformers are."""
    modules = ("attention", "data.batching", "logps", "losses", "metrics", "models", "pairs")
    heavy = ("ray", "deepspeed", "pyarrow", "mlflow", "pydantic")
    imports = ", ".join(f"dpo_ray.{name}" for name in modules)
    code = f"import {imports}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
