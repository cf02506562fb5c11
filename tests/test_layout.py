"""The walls between the floors: who may import whom, read from the source without running it."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import fastskip

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastskip"


@dataclass(frozen=True)
class Floor:
    """Modules (or folders) of one floor, the floors below that it may use, and outside packages."""

    modules: tuple[str, ...]
    floors: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


# From the bottom up: a floor may only name floors above it in this table.
PURE = ("policy", "plan")
FLOORS = {
    # How numbers are told, to whoever tells them; how files are written and plots made, for whoever
    # writes or makes some.
    "wording": Floor(("wording",), (), ("torch",)),
    "files": Floor(("atomic_files", "json_file")),
    "garbage": Floor(("garbage",)),
    "plotting": Floor(("plotting", "plot_labels"), (), ("matplotlib",)),
    "policy": Floor(("policy",), ("files",), outside=("yaml",)),
    "plan": Floor(("plan",), ("policy",)),
    "reference": Floor(
        ("ops.reference", "ops.fused", "ops.fused_entries", "ops.fused_routes", "ops.contracts")
        + ("ops.routes", "ops.hops", "ops.allocate", "ops.bitmaps"),
        outside=("torch",),
    ),
    "tokens": Floor(("tokens",), ("policy", "reference"), ("torch",)),
    "kernels": Floor(("kernels",), ("reference",), ("torch", "triton")),
    "processor": Floor(("ops.processor",), outside=("torch",)),
    "ops": Floor(("ops",), ("reference", "kernels", "processor", "garbage"), ("torch",)),
    # What a decision is, is computed by the operations alone; routers bring its terms.
    "routing": Floor(("routing",), ("files", "policy", "reference"), ("torch", "safetensors")),
    "decoder": Floor(
        ("decoder",), (*PURE, "tokens", "reference", "ops", "routing"), ("torch", "numpy")
    ),
    "cache": Floor(
        ("decoder.cache",),
        (*PURE, "tokens", "reference", "ops", "routing", "decoder"),
        ("torch", "transformers.cache_utils"),
    ),
    # The same decoder on fused operations; the plain one runs without it.
    "fused": Floor(
        ("decoder.fused",),
        (*PURE, "tokens", "reference", "ops", "routing", "decoder", "cache"),
        ("torch",),
    ),
    "launches": Floor(
        ("launches",),
        (*PURE, "tokens", "reference", "ops", "routing", "decoder", "cache", "fused"),
        ("torch",),
    ),
    "families": Floor(("families",), PURE, ("torch",)),
    "fingerprints": Floor(("fingerprints",), (), ("torch",)),
    # Modules of a model and files of a checkpoint: above what multiplies, below what loads.
    "sparse": Floor(("sparse",), (*PURE, "reference", "kernels", "wording"), ("torch",)),
    "fit": Floor(("policy_fit",), ("policy", "families", "fingerprints", "sparse", "wording")),
    "generation": Floor(
        ("generation",),
        (*PURE, "tokens", "reference", "ops", "routing", "decoder", "cache", "fused", "families")
        + ("sparse",),
        ("torch", "transformers"),
    ),
    "loading": Floor(
        ("loading", "checkpoint_files"),
        (*PURE, "ops", "routing", "families", "fit", "sparse", "generation"),
        ("torch", "transformers"),
    ),
    "profiling": Floor(("profiling",), ("ops",)),
    "public": Floor(("",), (*PURE, "routing", "families", "loading")),
    # Users of the floors above. The oracle must share no code with what it judges.
    "oracle": Floor(("verification",), (), ("torch", "transformers")),
    "check": Floor(
        ("verification.check",),
        (*PURE, "routing", "families", "loading", "public", "oracle", "wording"),
        ("torch", "transformers"),
    ),
    "prompts": Floor(("prompts",), (), ("PIL", "numpy", "transformers")),
    "machine": Floor(("machine",), (*PURE, "files", "processor", "wording"), ("torch",)),
    "intervals": Floor(("intervals",), (), ("numpy",)),
    # Of any model that has Hugging Face's `generate`, ours or not.
    "timing": Floor(("timing",), ("garbage",), ("torch", "transformers")),
    "demo": Floor(
        ("demo",),
        (*PURE, "loading", "public", "machine", "intervals", "timing", "wording", "files")
        + ("plotting",),
        ("PIL", "matplotlib", "numpy", "rich", "safetensors", "tokenizers", "torch", "tqdm")
        + ("transformers",),
    ),
    # Policies found and judged, by what users have: the definition of a score is all it shares.
    "study": Floor(
        ("study",),
        (*PURE, "tokens", "reference", "routing", "families", "sparse", "loading", "public")
        + ("fingerprints", "fit", "wording", "files")
        + ("prompts", "intervals", "machine"),
        ("torch", "numpy", "PIL", "safetensors", "pycocoevalcap"),
    ),
    # Learned by transformers' trainer; what routers learn by is the definition of their score.
    "training": Floor(
        ("study.training",),
        (*PURE, "reference", "routing", "families", "loading", "public", "prompts", "timing")
        + ("fingerprints", "wording", "files", "plotting"),
        ("PIL", "numpy", "peft", "safetensors", "torch", "transformers"),
    ),
    # The experiments of the paper are run on the demo's models and scenes.
    "paper": Floor(
        ("study.paper", "study.evaluation.comparison", "study.evaluation.judging")
        + ("study.evaluation.result",),
        (
            *PURE,
            "families",
            "loading",
            "public",
            "prompts",
            "machine",
            "intervals",
            "timing",
            "demo",
            "fingerprints",
            "study",
            "training",
            "wording",
            "files",
            "plotting",
        ),
        ("torch", "numpy", "PIL", "transformers", "tqdm"),
    ),
    "bench": Floor(
        ("study.bench",),
        (*PURE, "routing", "families", "loading", "public", "prompts", "intervals", "timing")
        + ("garbage", "fingerprints", "fit", "files", "demo", "study", "paper"),
        ("PIL", "torch", "transformers"),
    ),
    # Reads what the study wrote, as files; no model and no tensor.
    "report": Floor(
        ("study.report",),
        (*PURE, "public", "intervals", "wording", "files", "plotting"),
        ("matplotlib", "jinja2", "markupsafe"),
    ),
    # What other programs load; one imports only the program that it plugs into.
    "integrations": Floor(
        ("integrations",),
        (*PURE, "tokens", "families", "loading", "public", "prompts", "timing", "study"),
        ("PIL", "lmms_eval", "loguru", "torch", "tqdm"),
    ),
    # Policies are sought by all that judges and calibrates them.
    "search": Floor(
        ("study.search",),
        (*PURE, "tokens", "families", "loading", "public", "machine", "intervals", "timing")
        + ("fingerprints", "fit", "study", "paper", "wording", "files", "plotting"),
        ("torch", "numpy", "scipy", "matplotlib"),
    ),
    "commands": Floor(
        ("cli", "__main__", "commands"),
        (*PURE, "families", "loading", "public", "check", "prompts", "machine", "launches")
        + ("intervals", "sparse", "demo", "study", "training", "paper", "bench", "search")
        + ("report", "wording", "files", "plotting"),
        ("rich", "safetensors", "torch", "tqdm", "transformers", "typer"),
    ),
}
# The cache is a file of the decoder, apart only for what it may import of Hugging Face.
TOGETHER = ({"decoder", "cache"},)


@dataclass(frozen=True)
class Import:
    """One import: the module that has it, and what it names."""

    where: str
    names: str
    line: int
    on_import: bool
    """Whether it runs when the module is imported: not within a function, not for types only"""

    def __str__(self) -> str:
        return f"fastskip/{self.where.replace('.', '/')}:{self.line} imports {self.names}"


@cache
def sources() -> dict[str, Path]:
    """The package's modules by their name without `fastskip.`; the package itself is ""."""
    files = [*PACKAGE.glob("**/*.py"), *(PACKAGE / "kernels").glob("**/*.py")]
    return {_name(file.relative_to(PACKAGE)): file for file in files}


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for where, file in sources().items():
        tree = ast.parse(file.read_text())
        lazy = set(_lazy_nodes(tree))
        for node in ast.walk(tree):
            for names in _named(node):
                found.append(Import(where, names, node.lineno, node not in lazy))  # type: ignore[attr-defined]
    return tuple(found)


def _lazy_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from ast.walk(node)


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used"
        module = str(node.module)
        for alias in node.names:
            # `from fastskip import ops` names the module, not only the package.
            inner = f"{module}.{alias.name}"
            yield inner if inner.removeprefix("fastskip.") in sources() else module


def floor_of(module: str) -> str:
    """The floor of a module: that of the longest name that it lies under."""
    best = {
        len(prefix): name
        for name, floor in FLOORS.items()
        for prefix in floor.modules
        if module == prefix or (prefix and module.startswith(prefix + "."))
    }
    assert best, f"fastskip.{module} is on no floor; add it to FLOORS"
    return best[max(best)]


def is_inside(names: str) -> bool:
    return names == "fastskip" or names.startswith("fastskip.")


def target(names: str) -> str:
    """The module of the package that an import names."""
    module = names.removeprefix("fastskip").removeprefix(".")
    return module if module in sources() else module.rpartition(".")[0]


def test_every_module_is_on_a_floor() -> None:
    assert len(sources()) > 40
    for module in sources():
        floor_of(module)


def test_floors_stand_on_lower_floors() -> None:
    order = list(FLOORS)
    for name, floor in FLOORS.items():
        assert all(order.index(below) < order.index(name) for below in floor.floors), name


def test_no_import_crosses_a_wall() -> None:
    wrong = []
    for found in imports():
        if not is_inside(found.names):
            continue
        here, there = floor_of(found.where), floor_of(target(found.names))
        together = any({here, there} <= group for group in TOGETHER)
        if here != there and there not in FLOORS[here].floors and not together:
            wrong.append(f"{found}: floor {here!r} must not know {there!r}")
    assert not wrong, "\n".join(wrong)


def test_outside_packages() -> None:
    wrong = []
    for found in imports():
        if is_inside(found.names) or _root(found) in sys.stdlib_module_names:
            continue
        allowed = FLOORS[floor_of(found.where)].outside
        if not any(found.names == name or found.names.startswith(name + ".") for name in allowed):
            wrong.append(f"{found}; allowed outside the standard library: {allowed}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "package", ["yaml", "matplotlib", "triton", "peft", "pycocoevalcap", "scipy"]
)
def test_imported_only_when_needed(package: str) -> None:
    """A file format, an optional extra, a GPU: not everyone has them or wants to wait for them."""
    wrong = [str(found) for found in imports() if found.on_import and _root(found) == package]
    assert not [found for found in wrong if "fastskip/kernels" not in found]


def _root(found: Import) -> str:
    return found.names.partition(".")[0]


def test_no_cycles() -> None:
    """Among the modules that import one another when they are imported."""
    below: dict[str, set[str]] = {module: set() for module in sources()}
    for found in imports():
        # Whatever is imported, the package itself comes first; that is no arrow.
        if is_inside(found.names) and found.on_import and target(found.names):
            below[found.where].add(target(found.names))
    while below:
        lowest = {module for module, needs in below.items() if not needs & below.keys()}
        assert lowest, f"these import one another in a circle: {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in lowest}


def run(code: str) -> None:
    """Run Python in the repository root, whose folders are then the first place to import from."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    run(
        "import fastskip, sys\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'yaml', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )


def test_loading_touches_no_device_and_the_kernels_folder_is_no_trap() -> None:
    """Hugging Face's library is called `kernels` too; transformers must not find our folder."""
    run(
        "import fastskip.loading, sys, torch\n"
        "import transformers.integrations.hub_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "named = [m for name, m in sys.modules.items() if name.split('.')[0] == 'kernels']\n"
        "files = [str(getattr(module, '__file__', None)) for module in named]\n"
        f"assert not [file for file in files if file.startswith({str(ROOT)!r})]"
    )


def test_kernels_folder() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers would import it"
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert link.resolve() == ROOT / "kernels"


NAMES = """load_model apply_ set_policy plan_of record_routing
SkipPolicy SkipRule RouterRule TokenClass Sublayer SkippedKV Arrangement SkipPlan
Router RoutingContext Decision Scope RouterError PolicyError PolicyFitWarning
UnsupportedModelError __version__"""


def test_public_names() -> None:
    assert sorted(fastskip.__all__) == sorted(NAMES.split())
    for name in fastskip.__all__:
        assert getattr(fastskip, name) is not None
    with pytest.raises(AttributeError, match="'fastskip' has no attribute 'nothing'"):
        _ = fastskip.nothing


def test_public_names_are_listed_before_they_are_loaded() -> None:
    """So that a prompt completes them."""
    run("import fastskip\nassert {*fastskip.__all__, 'profiling'} <= {*dir(fastskip)}")


def test_modules_of_the_readme_come_when_they_are_named() -> None:
    run("import fastskip\nwith fastskip.profiling.ranges(): pass")


@pytest.mark.parametrize(
    ("verb", "parameters"),
    [
        (
            "load_model",
            "model_id_or_path policy=None *dtype=auto *device=None *impl=None *attention=None "
            "*routers=None *weights=dense **",
        ),
        ("apply_", "model policy=None *impl=None *attention=None *routers=None"),
        ("set_policy", "model policy *routers=None"),
        ("plan_of", "model"),
        ("record_routing", "model"),
    ],
)
def test_verbs(verb: str, parameters: str) -> None:
    written = []
    for name, parameter in inspect.signature(getattr(fastskip, verb)).parameters.items():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        mark = "*" if parameter.kind is parameter.KEYWORD_ONLY else ""
        is_rest = parameter.kind is parameter.VAR_KEYWORD
        written.append("**" if is_rest else f"{mark}{name}{default}")
    assert " ".join(written) == parameters
