"""Valid inputs of each kind, which bad ones are made of."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import yaml
from safetensors.torch import save
from small_hubs import nature_spec, write_hub
from small_images import quadrant_data, small_vision_config, write_rgb_hub
from small_runs import small_config, small_env
from stable_baselines3 import PPO
from torch import nn

from agents.config import BUILT_IN_CONFIGS, dump_config
from hubrl import HubFeaturesExtractor, cli, train
from hubrl.plain_yaml import dump_yaml
from hubrl.specs import HUB_FILE
from hubrl.state_folder import StatePart, save_state
from vision_tasks import classification
from vision_tasks.config import BUILT_IN_CONFIGS as VISION_CONFIGS
from vision_tasks.config import dump_config as dump_vision_config

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"
CHECKPOINT_FILES = (
    "state.json",
    MANIFEST,
    "policy.safetensors",
    "policy.optimizer.safetensors",
    "log_std.safetensors",
)
#: Algorithms of runs, and what is varied in them; ``checkpoint`` has weights and optimizers.
RUN_ALGORITHMS = ("ppo", "dqn", "recurrent_ppo")
AGENT_RUN_FILES = (
    "run/checkpoints/last/state.json",
    "run/checkpoints/last/policy.safetensors",
    "run/episodes.csv",
    "run/evaluations.csv",
    "run/progress.csv",
    "run/checkpoints/last/run.safetensors",
)
IMAGE_RUN_FILES = (
    "run/checkpoints/last/state.json",
    "run/results.json",
    "run/epochs.csv",
)
#: Where the hub of an agent's zip lies, from the folder that it is read in.
AGENT_HUB = "agent_hub"
#: What its weights say of the hub's encoders.
ENCODERS = "pathway._extra_state"
#: Of an agent's zip: where the bytes after the first one go.
ZIP_PARTS = ("zip", "data", "policy.pth", "data.pkl", "kwargs", "hub_data", "encoders")


class Evil:
    """Unpickling it makes the file ``canary``; it never should."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("open('canary', 'w').close()",)


@functools.cache
def agent_configs() -> list[bytes]:
    """One for each algorithm."""
    return [_plain(file) for file in sorted(BUILT_IN_CONFIGS.glob("*.yaml"))]


def ppo_config() -> bytes:
    """The one that studies are upon."""
    return _plain(BUILT_IN_CONFIGS / "ppo-atari.yaml")


@functools.cache
def image_configs() -> list[bytes]:
    """One for each task."""
    return [_plain(file) for file in sorted(VISION_CONFIGS.glob("*.yaml"))]


@functools.cache
def studies() -> list[bytes]:
    """All that ship, upon ``ppo.yaml`` beside them."""
    found = []
    for file in sorted((ROOT / "configs" / "studies").glob("*.yaml")):
        found.append(dump_yaml(yaml.safe_load(file.read_text()) | {"config": "ppo.yaml"}).encode())
    return found


@functools.cache
def hub_cards() -> list[bytes]:
    """A hub with weight files ``a`` and ``b``, and one with every key and a library's encoder."""
    small = _small_hub()[HUB_FILE]
    hub = yaml.safe_load(small)
    card, other = hub["encoders"]
    card |= {
        "golden": [0.5] * 8,
        "pretraining": {"games": ["Pong"], "score": {"mean": 1.0, "interval95": [0.5, 2.0]}},
    }
    library = {
        "name": "library", "architecture": "timm:test_resnet", "features_dim": 96,
        "image_size": [32, 32], "channels": 3, "mean": [0.5, 0.5, 0.5], "std": 0.2,
        "frames": "each", "n_frames": 1, "license": "MIT", "source": "random numbers",
    }  # fmt: skip
    whole = hub | {"always_active": ["a"], "encoders": [card, other, library]}
    return [small, dump_yaml(whole).encode()]


@functools.cache
def weight_files() -> dict[str, bytes]:
    """Name -> content of the hub's weight files."""
    return {name: data for name, data in _small_hub().items() if name != HUB_FILE}


@functools.cache
def checkpoint_files() -> dict[str, bytes]:
    """Name -> content."""
    with tempfile.TemporaryDirectory() as folder:
        state = {"num_timesteps": 64, "episodes": [[1.0, 5, 0.5]], "encoders": {"a": None}}
        save_state(parts(), state, Path(folder, "last"))
        return _files(Path(folder, "last"))


def parts() -> dict[str, StatePart]:
    """A module, its optimizer after a step, and a tensor."""
    torch.manual_seed(0)
    policy = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(policy.parameters())
    policy(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"policy": policy, "policy.optimizer": optimizer, "log_std": torch.zeros(2)}


def agent_zip(data: bytes) -> bytes:
    """The zip of an agent with a foreign part."""
    part = ZIP_PARTS[data[0] % 16 % len(ZIP_PARTS)] if data else "zip"
    content, entries = data[1:], dict(_agent())
    if part == "zip":
        return content
    if part == "hub_data":
        return _zip({**_hub_agent(), "data": content})
    if part == "encoders":  # what its weights say of them
        tensors = _hub_weights()
        record = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)
        tensors |= {name: record for name in tensors if name.endswith(ENCODERS)}
        return _zip({**_hub_agent(), "policy.pth": _saved(tensors)})
    if part == "data.pkl":
        entries["policy.pth"] = _with_entry(entries["policy.pth"], "/data.pkl", content)
    elif part == "kwargs":  # JSON that is part of JSON
        text = json.dumps(json.loads(entries["data"]) | {"policy_kwargs": "KWARGS"})
        entries["data"] = text.encode().replace(b'"KWARGS"', content)
    else:
        entries[part] = content
    return _zip(entries)


@functools.cache
def agent_zips() -> list[bytes]:
    """A zip, and each part with its first byte."""
    entries, hub_entries = _agent(), _hub_agent()
    kwargs = [json.dumps(json.loads(e["data"])["policy_kwargs"]) for e in (entries, hub_entries)]
    own = [json.dumps({"net_arch": {"pi": [8], "vf": [8, 4]}, "n_critics": 2, "n_quantiles": 5})]
    evil = _saved({"features_extractor.cnn.0.weight": Evil()})
    legacy = _saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    contents: dict[str, list[bytes]] = {
        "zip": [_zip({"data": entries["data"]}), _zip({}), _zip({"../../outside": b"x"})],
        "data": [entries["data"], hub_entries["data"]],
        "policy.pth": [evil, pickle.dumps(Evil()), legacy],
        "data.pkl": [_entry(entries["policy.pth"], "/data.pkl"), pickle.dumps(Evil())],
        "kwargs": [text.encode() for text in kwargs + own],
        "hub_data": [hub_entries["data"]],
        "encoders": [_encoders_record()],
    }
    return [bytes([i]) + content for i, part in enumerate(ZIP_PARTS) for content in contents[part]]


def checkpoints() -> list[bytes]:
    """Each file after its first byte, with the manifest's knowledge."""
    files = checkpoint_files()
    return [bytes([128 + i]) + files[name] for i, name in enumerate(CHECKPOINT_FILES)]


@functools.cache
def agent_run(algorithm: str) -> dict[str, bytes]:
    """Path -> content of a run that has stopped before its last rollout."""
    return _run(train.command, _write_agent_config, algorithm)


@functools.cache
def image_run() -> dict[str, bytes]:
    """The same of an image task that has stopped before its last epoch; it has results, too."""
    with mock.patch("vision_tasks.runs.load_classification", return_value=quadrant_data()):
        return _run(classification.command, _write_image_config, "hub-pathway")


def agent_run_files() -> list[bytes]:
    """Of each algorithm's run each file after its first byte, which tells both."""
    runs = [agent_run(name) for name in RUN_ALGORITHMS]
    n = len(RUN_ALGORITHMS)
    return [
        bytes([n * place + i]) + run[path]
        for i, run in enumerate(runs)
        for place, path in enumerate(AGENT_RUN_FILES)
    ]


def image_run_files() -> list[bytes]:
    """Each file after its first byte."""
    return [bytes([i]) + image_run()[path] for i, path in enumerate(IMAGE_RUN_FILES)]


def weight_file(data: bytes) -> bytes:
    """The bytes after the first one as a file, or as the header of the weight file ``a``."""
    if data[:1] > b"\x7f":
        return data[1:]
    whole = weight_files()["a.safetensors"]
    body = whole[8 + int.from_bytes(whole[:8], "little") :]
    return len(data[1:]).to_bytes(8, "little") + data[1:] + body


def weight_file_parts() -> list[bytes]:
    """The header that fits, and whole files of other types."""
    whole = weight_files()["a.safetensors"]
    types = [torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
    others = {str(i): torch.ones(2, 2).to(dtype) for i, dtype in enumerate(types)}
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    return [b"\0" + header, b"\xff" + save(others), b"\xff" + save({"a": torch.ones(0, 3)})]


def command_lines() -> list[bytes]:
    """Some of each command."""
    lines = (ROOT / "tests" / "fuzz" / "command_lines.txt").read_text().splitlines()
    return [line.replace(" ", "\0").encode() for line in lines if line]


#: Kind of input -> its valid ones.
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "agent_config": agent_configs,
    "image_config": image_configs,
    "study": studies,
    "hub_card": hub_cards,
    "shared_hub": hub_cards,
    "weight_file": weight_file_parts,
    "checkpoint": checkpoints,
    "agent_run": agent_run_files,
    "image_run": image_run_files,
    "agent_zip": agent_zips,
    "arguments": command_lines,
}


def _run(
    command: click.Command, write_config: Callable[[Path, str], str], method: str
) -> dict[str, bytes]:
    """A run to its end, whose configuration then says that it goes on."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        longer = write_config(Path("config.yaml"), method)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            cli.run(command, "valid", ["--config", "config.yaml", "--run-dir", "run"])
        Path("run", "config.yaml").write_text(longer)
        paths = [path for path in Path().rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in paths if "tfevents" not in path.name}


def _write_agent_config(file: Path, algorithm: str) -> str:
    write_hub(Path("small"), [nature_spec("a"), nature_spec("b")])
    values = {"hub.name": "small", "train.n_timesteps": 64, "train.eval_freq": 32}
    file.write_text(dump_config(small_config(algorithm, values)))
    return dump_config(small_config(algorithm, values | {"train.n_timesteps": 96}))


def _write_image_config(file: Path, method: str) -> str:
    hub, values = write_rgb_hub(Path("rgb")), {"data__name": "fashion-mnist"}
    file.write_text(dump_vision_config(small_vision_config(hub, method, **values, train__epochs=1)))
    return dump_vision_config(small_vision_config(hub, method, **values, train__epochs=2))


def _plain(file: Path) -> bytes:
    """Without comments."""
    return dump_yaml(yaml.safe_load(file.read_text())).encode()


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@functools.cache
def _small_hub() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return _files(write_hub(Path(folder, "small"), [nature_spec("a"), nature_spec("b")]))


@functools.cache
def _agent() -> dict[str, bytes]:
    torch.manual_seed(0)
    model = PPO("CnnPolicy", small_env(), policy_kwargs={"net_arch": [4]}, n_steps=2, batch_size=2)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "agent.zip"))
        return _entries(Path(folder, "agent.zip").read_bytes())


@functools.cache
def _hub_agent() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, AGENT_HUB).mkdir()
        for path, content in agent_hub().items():
            Path(folder, path).write_bytes(content)
        kwargs = {
            "features_extractor_class": HubFeaturesExtractor,
            "features_extractor_kwargs": {"hub": AGENT_HUB},
            "net_arch": [],
        }
        with contextlib.chdir(folder):
            model = PPO("CnnPolicy", small_env(), policy_kwargs=kwargs, n_steps=2, batch_size=2)
            model.save("agent.zip")
        return _entries(Path(folder, "agent.zip").read_bytes())


def agent_hub() -> dict[str, bytes]:
    """Path -> content of the hub that an agent's zip names."""
    return {f"{AGENT_HUB}/{name}": content for name, content in _small_hub().items()}


def _hub_weights() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(
        io.BytesIO(_hub_agent()["policy.pth"]), weights_only=True
    )
    return tensors


def _encoders_record() -> bytes:
    records = (t for name, t in _hub_weights().items() if name.endswith(ENCODERS))
    return bytes(next(records).tolist())


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _entry(data: bytes, end: str) -> bytes:
    return next(content for name, content in _entries(data).items() if name.endswith(end))


def _with_entry(data: bytes, end: str, new: bytes) -> bytes:
    entries = _entries(data)
    return _zip({n: new if n.endswith(end) else content for n, content in entries.items()})


def _saved(values: dict[str, Any], **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()
