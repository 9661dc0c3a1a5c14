"""Who may import whom: the core knows no one, the commands alone compose."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"hubrl", "agents", "envs", "vision_tasks"}
CORE = {
    "plain_yaml": set(),
    "specs": {"hubrl.plain_yaml"},
    "architectures": {"hubrl.specs"},
    "encoders": {"hubrl.architectures", "hubrl.files", "hubrl.precision", "hubrl.specs"},
    "files": set(),
    "finite": set(),
    "generators": {"hubrl.encoders", "hubrl.precision"},
    "cuda_graphs": set(),
    "losses": set(),
    "precision": set(),
    "optimizer": {"hubrl.encoders"},
    "replay": set(),
    "run_folder": {"hubrl.files"},
    "signals": set(),
    "state_folder": {"hubrl.files"},
    "aggregation": {"hubrl.encoders", "hubrl.specs"},
    "encoder_list": {"hubrl.encoders", "hubrl.specs"},
    "pathway": {
        "hubrl.aggregation",
        "hubrl.encoder_list",
        "hubrl.encoders",
        "hubrl.generators",
        "hubrl.losses",
        "hubrl.precision",
        "hubrl.specs",
    },
}
THIRD_PARTY_OF_CORE = {"torch", "safetensors", "yaml", "numpy", "pydantic"}
IMPORTED_WHERE_USED = {"architectures": {"timm", "torchvision"}}


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("module", CORE)
def test_core_imports_torch_and_what_is_below_it(module: str) -> None:
    third_party = THIRD_PARTY_OF_CORE | IMPORTED_WHERE_USED.get(module, set())
    for name in imported(ROOT / "hubrl" / f"{module}.py"):
        package = name.split(".")[0]
        allowed = is_standard(name) or package in third_party or name in CORE[module]
        assert allowed, f"hubrl/{module}.py imports {name}"


def test_envs_import_nothing_of_ours() -> None:
    for file in (ROOT / "envs").glob("*.py"):
        foreign = {name for name in imported(file) if name.split(".")[0] in OURS - {"envs"}}
        assert not foreign, f"{file.name} imports {foreign}"


def test_agents_import_the_extractor_but_no_command() -> None:
    core = {"aggregation", "cuda_graphs", "encoder_list", "encoders", "optimizer", "pathway"}
    files = {
        "files",
        "finite",
        "plain_yaml",
        "run_folder",
        "sections",
        "signals",
        "specs",
        "state_folder",
    }
    allowed = core | files | {"callback", "extractor", "precision", "saved_agents"}
    for file in (ROOT / "agents").glob("*.py"):
        for name in imported(file):
            package, _, module = name.partition(".")
            if package == "hubrl":
                assert module in allowed, f"{file.name} imports {name}"
            assert package not in {"envs", "vision_tasks"}, f"{file.name} imports {name}"


def test_vision_tasks_know_no_agents() -> None:
    for file in (ROOT / "vision_tasks").rglob("*.py"):
        for name in imported(file):
            assert name.split(".")[0] not in {"agents", "envs", "stable_baselines3"}


def test_the_extractor_needs_no_agents_and_no_envs() -> None:
    for module in ("extractor", "callback", "__init__"):
        for name in imported(ROOT / "hubrl" / f"{module}.py"):
            assert name.split(".")[0] not in {"agents", "envs", "vision_tasks"}


def test_an_installation_has_every_package() -> None:
    """They are listed by hand, since ``configs`` holds data alone."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for name in OURS for file in (ROOT / name).rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == names | {"configs"}
