"""A stranger's YAML: what it may not hold, and that the limits let through what they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubrl.plain_yaml import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 32 + "]" * 32, "line 1, is nested deeper than the 32 levels allowed"),
        ("\n" + "".join(" " * i + "- \n" for i in range(33)), "line 33, is nested deeper than the"),
        ("[" * 100_000, "is not valid YAML: .*exceeded maximum nesting depth .* line 1, column"),
    ],
)
def test_deep_nests_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: " + text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "x.yaml", "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: !!timestamp x",
            r"line 1, has the YAML tag 'tag:yaml\.org,2002:timestamp', all",
        ),
        ("name: x\nencoders: !!set {a}", "line 2, has the YAML tag"),
        ("name: !!python/object/apply:os.system [ls]", "line 1, has the YAML tag"),
        ('name: "\\e[2J"', r"line 1, has control characters, allowed: text \('\\x1b\[2J'\)"),
        ('name: "\\uD800"', "line 1, column 7 found invalid Unicode character"),
        (f"name: {'9' * 5000}", r"line 1, has the number 9{20}\.\.\., allowed: 63 bits at most"),
        ("name: 0x8000000000000000", "line 1, has the number 0x80"),
        (f"name: 1{':59' * 200}.5", "line 1, has the number 1:59"),
        ("#" * 2**20 + "\n", "file .*x.yaml, 1,048,577 bytes long, allowed: 1,048,576"),
    ],
)
def test_what_a_strangers_yaml_may_not_hold(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "x.yaml", "file")


def test_what_is_within_the_limits_is_read() -> None:
    deep = "[" * 31 + "]" * 31
    data = parse_yaml(f"name: {deep}\nlarge: {2**63 - 1}\nsmall: -1.5e-3\ntext: 'ü \t'", "text")
    assert (data["large"], data["small"], data["text"]) == (2**63 - 1, -1.5e-3, "ü \t")
    assert parse_yaml(dump_yaml(data), "text") == data


def test_a_value_met_twice_is_written_twice() -> None:
    twice = [1, 2]
    assert dump_yaml({"a": twice, "b": twice}) == "a:\n- 1\n- 2\nb:\n- 1\n- 2\n"
