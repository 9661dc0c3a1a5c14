"""No line of the product unpickles what it reads; torch's reader of tensors alone may."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hubrl import plain_yaml

ROOT = Path(__file__).resolve().parents[1]
OURS = ("hubrl", "agents", "envs", "vision_tasks")
FILES = [file for name in OURS for file in sorted((ROOT / name).rglob("*.py"))]
#: Modules whose files are programs.
RUNNING_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
}  # fmt: skip
#: Readers that unpickle or build any object, by the last part of their name.
RUNNING_READERS = {
    "load_from_zip_file", "load_from_pkl", "load_replay_buffer", "read_pickle",
    "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "load_all", "load_url",
    "load_state_dict_from_url",
}  # fmt: skip
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "_PlainLoader"}


def dotted(node: ast.expr) -> str:
    """``torch.jit.load`` of the expression; empty for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
            yield from ((node.lineno, alias.name) for alias in node.names)


def is_refused(call: ast.Call) -> bool:
    """Whether it could run what it reads."""
    name, keywords = dotted(call.func), {k.arg: k.value for k in call.keywords}
    owner, _, last = name.rpartition(".")
    if name in ("eval", "exec", "compile", "__import__") or last in RUNNING_READERS:
        return True
    if last != "load":
        return False
    if owner == "torch":
        only = keywords.get("weights_only")
        return not (isinstance(only, ast.Constant) and only.value is True)
    if owner in ("np", "numpy"):
        return "allow_pickle" in keywords or len(call.args) > 2
    if owner == "yaml":
        loader = keywords.get("Loader", call.args[1] if len(call.args) > 1 else None)
        return loader is None or dotted(loader).rpartition(".")[2] not in SAFE_LOADERS
    # ``torch.jit.load``, and the ``load`` of SB3's classes.
    return owner.startswith("torch.") or owner.rpartition(".")[2][:1].isupper()


def findings(source: str) -> list[str]:
    """``LINE: NAME`` of each import and call that may run a stranger's file."""
    tree = ast.parse(source)
    imports = [
        f"{line}: {name}"
        for line, name in imported(tree)
        if name.partition(".")[0] in RUNNING_MODULES or name in RUNNING_READERS
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_refused(node)]
    return imports + [f"{call.lineno}: {ast.unparse(call.func)}" for call in calls]


@pytest.mark.parametrize("package", OURS)
def test_the_product_reads_no_programs(package: str) -> None:
    files = [file for file in FILES if file.relative_to(ROOT).parts[0] == package]
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line}" for file in files for line in findings(file.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f():\n    import joblib.numpy_pickle",
        "from stable_baselines3.common.save_util import load_from_zip_file",
        "eval('1')",
        "exec(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "torch.jit.load(file)",
        "torch.hub.load_state_dict_from_url(url)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.FullLoader)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "PPO.load(file)",
        "model.load_replay_buffer(file)",
    ],
)
def test_the_scan_finds_it(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file, weights_only=True)",
        "np.load(file)",
        "yaml.load(text, yaml.SafeLoader)",
        "json.load(file)",
        "model.eval()",
        "training.load(file)",
    ],
)
def test_the_scan_lets_pass(source: str) -> None:
    assert not findings(source)


def test_our_own_loader_of_yaml_is_a_safe_one() -> None:
    assert issubclass(plain_yaml._PlainLoader, yaml.CSafeLoader)
