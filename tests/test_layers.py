"""The layers: every module imports, imports point one way, the maths needs torch alone, tolerances are tight."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_tools", "prefopt", "rewards")
FILES = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]
MATHS = ["ops", "parts", "scores", "margins", "label_rules", "pairwise", "pointwise", "listwise", "pair_weights",
         "reductions", "regularisers", "annotations", "masks", "references", "diagnose", "objectives", "accepts", "advantages",
         "corrections", "credits", "critics", "divergences", "keeps", "normalisers", "penalties", "policy", "ratios",
         "selections", "shaping", "surrogates", "token_rewards", "token_weights"]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(f): f for f in FILES}


def imports(file: Path, *, top_level: bool) -> set[str]:
    """Modules that a file imports; with `top_level` only those it imports whenever it is imported itself."""
    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and top_level:
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: imports are absolute"
                submodules = [f"{child.module}.{alias.name}" for alias in child.names]
                yield from (s if s in NAMES else child.module for s in submodules)
            yield from walk(child)
    return set(walk(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", sorted(n for n in NAMES if not n.endswith("__main__")))
def test_every_module_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_point_one_way(name):
    """data_tools <- prefopt <- rewards, and only the command line sees all three."""
    allowed = {"data_tools": {"data_tools"}, "prefopt": {"data_tools", "prefopt"}, "rewards": set(PACKAGES)}
    package = name.split(".")[0]
    if name == "prefopt.cli":
        return
    for other in imports(NAMES[name], top_level=False):
        if other.split(".")[0] in PACKAGES:
            assert other.split(".")[0] in allowed[package], f"{name} imports {other}"


def test_no_circular_imports():
    graph = {n: {i for i in imports(f, top_level=True) if i in NAMES and i != n} for n, f in NAMES.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circular import: {' -> '.join([*path[path.index(name):], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)


RECIPES = sorted(n for n in NAMES if n.startswith("prefopt.recipes"))


@pytest.mark.parametrize("name", [f"prefopt.{m}" for m in MATHS] + RECIPES)
def test_maths_needs_torch_alone(name):
    for other in imports(NAMES[name], top_level=False):
        home, *rest = other.split(".")
        assert home in ("torch", "data_tools", "prefopt") or home in sys.stdlib_module_names, f"{name} imports {other}"
        assert home != "prefopt" or rest[0] in (*MATHS, "recipes"), f"{name} imports {other}"


HEAVY = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "pandas", "matplotlib")


@pytest.mark.parametrize("statement, forbidden", [
    ("import prefopt", HEAVY), ("import data_tools", HEAVY), ("import rewards", HEAVY),
    ("import data_tools.columns, data_tools.records", HEAVY),
    ("import prefopt.recipes, prefopt.objectives", tuple(h for h in HEAVY if h not in ("torch", "numpy")))])
def test_imports_are_cheap(statement, forbidden):
    program = f"import sys; {statement}; print([m for m in {forbidden!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", f"{statement} loads {out.stdout.strip()}"


@pytest.mark.parametrize("package", ["prefopt", "data_tools"])
def test_every_lazy_name_is_there(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="known: "):
        _ = module.no_such_name


# ---------------------------------------------------------------------------------------------------------- the suite
TESTS = sorted((ROOT / "tests").glob("*.py"))


def number(node) -> float | None:
    try:
        return float(ast.literal_eval(node))
    except (ValueError, TypeError):
        return None


@pytest.mark.parametrize("file", TESTS, ids=lambda f: f.name)
def test_no_loose_tolerance(file):
    """No comparison of values is looser than 1e-3."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            named = ("rtol", "atol", "rel", "abs", "rel_tol", "abs_tol", "tolerance")
            loose = [k.arg for k in node.keywords if k.arg in named and (number(k.value) or 0) > 1e-3]
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("approx", "close"):
                loose += [x for x in node.args[2 if called == "close" else 1:] if (number(x) or 0) > 1e-3]
            assert not loose, f"{file.name}:{node.lineno}: a tolerance above 1e-3"


TEXT = [f for pattern in ("*.py", "*.md", "*.yaml", "*.toml", "*.ini") for f in ROOT.rglob(pattern)
        if not any(p.startswith(".") for p in f.relative_to(ROOT).parts)]


def test_no_machine_paths():
    """Nothing in the project points into one machine's folders."""
    words = ["/" + place + "/" for place in ("work", "root", "home")]
    for file in TEXT:
        text = file.read_text(encoding="utf-8")
        assert not any(w in text for w in words), f"{file.relative_to(ROOT)} holds a path of one machine"
