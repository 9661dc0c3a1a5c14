"""Valid inputs made wrong: values of other types, keys that are lost or doubled, strange words."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import yaml

#: What no key expects.
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("nan"), "", " ", "a", "b", "1", "1e400", "nan", "0x10", "auto", "all",
    "none", "each", "last", "../../outside", "/etc/passwd", "a.safetensors", "hub.yaml", "a\0b",
    "\x1b[2J", "\ud800", "\u202e\ufeff", "\U0001d518" * 40, "x" * 5000, "timm:resnet18",
    "timm:test_resnet", "timm:test_vit", "torchvision:resnet18", "packaged:resnet50_thin",
    "nature_cnn", "nature_conv_wide", "pypi:a==1", [], {}, [1], ["a"], [0.5] * 8, [[1], [2]],
    [36, 36], [10**6, 10**6], [84.5, "x"], {"a": 1}, {"start": 1, "end": 0}, {1: 2, None: 3},
    {"mean": 1, "interval95": 5}, list(range(300)), "F4", "F8_E8M0", "I64", "BOOL", "C64",
)  # fmt: skip
WORDS = (
    "", "-", "--", "-n", "-1", "0", "1e9", "nan", "99999999999999999999", "a", "b", "x" * 3000,
    "\udcff\udc80", "\x1b[2J", "\u202e", "a\nb", "none", "all", "auto", "my_hub", "my_hub:a",
    "my_hub/hub.yaml", "my_hub/a.safetensors", "run", "agent.zip", "study.yaml", "agent.yaml",
    "atari5", "packaged5", "timm:test_resnet", "timm:,", ":", "a:b:c", "hub.yaml", "no/such/file",
    "ALE/Pong-v5", "ALE/Pong", "CartPole-v1", "hubrl/TinyImage-v0", "cuda:7", "meta", "--help",
    "--hub", "--out", "--seed", "--env", "--name", "--algo", "--device", "--json", "--config",
    "--resume", "--from-sb3", "--from-file", "--architecture", "nature_cnn", "--image-size",
)  # fmt: skip
#: Kinds whose inputs are a first byte and JSON, where they aren't others' bytes.
JSON_KINDS = ("checkpoint", "agent_zip", "weight_file", "agent_run", "image_run")


def mutated(kind: str, data: bytes, random: Random) -> bytes:
    """
    Another input of the same kind.

    :raises ValueError: if the data are no document that could be changed
    """
    if kind == "arguments":
        return b"\0".join(_changed_words(data.split(b"\0"), random))
    if kind in JSON_KINDS:
        tree = _changed(json.loads(data[1:]), random)
        return data[:1] + json.dumps(tree, default=str).encode("utf-8", "surrogatepass")
    try:
        tree = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError from error
    return _dumped(_changed(tree, random), random)


def _changed(tree: Any, random: Random) -> Any:
    """The tree after one to three changes: where all is wrong, the first check refuses it."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _with_change(tree, random)
    return tree


def _with_change(tree: Any, random: Random) -> Any:
    """The tree with another value, without one, or with one more, at some depth."""
    value = random.choice(VALUES)
    if type(tree) is int and random.randint(0, 3) == 0:  # which may be allowed
        return random.choice((tree + 1, tree - 1, 2 * tree))
    if not isinstance(tree, (dict, list)) or not tree or random.randint(0, 9) == 0:
        return value
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    key, old = random.choice(items)
    choice = random.randint(0, 9)
    if choice < 6:
        changed = [(k, _with_change(old, random) if k == key else v) for k, v in items]
    elif choice < 8:
        changed = [(k, v) for k, v in items if k != key]
    elif choice == 8:
        changed = [*items, (_key(value), old)]
    else:  # another of its values
        changed = [(k, random.choice(items)[1] if k == key else v) for k, v in items]
    return dict(changed) if isinstance(tree, dict) else [v for _, v in changed]


def _key(value: Any) -> Any:
    return value if value.__hash__ else str(value)


def _dumped(tree: Any, random: Random) -> bytes:
    choice = random.randint(0, 19)
    text = yaml.safe_dump(tree, default_flow_style=choice == 0, allow_unicode=False)
    lines = text.splitlines(keepends=True)
    if choice == 1:  # a doubled key, or a value in two places
        lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
    elif choice == 2:
        text = "&x " + text
        lines = [*lines, "y: *x\n"]
    elif choice == 3:
        return text.encode("utf-16")
    elif choice == 4:
        return ("k: " + "[" * random.randint(1, 2000) + "\n" + text).encode()
    elif choice == 5:
        number = random.choice(["0x" + "f" * 6000, "1" * 5000, "1:" * 40 + "1", "2001-13-99"])
        place = random.randrange(len(lines))
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {number}\n"
    elif choice == 6:
        place = random.randrange(len(lines))
        tag = random.choice(
            ["!!python/object/apply:os.system [x]", "!!binary x", "!!set {a}", "!!x"]
        )
        lines[place] = lines[place].partition(":")[0] + f": {tag}\n"
    return "".join(lines).encode("utf-8", "surrogatepass")


def _changed_words(words: list[bytes], random: Random) -> list[bytes]:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        word = random.choice(WORDS).encode("utf-8", "surrogateescape").replace(b"\0", b"")
        place = random.randrange(len(words))
        choice = random.randint(0, 3)
        if choice == 0:
            words.insert(place + 1, word)
        elif choice == 1 and place:
            words[place] = word
        elif choice == 2 and place:
            del words[place]
        else:
            words.append(random.choice(words))
    return words
