"""Pictures of pretraining: what is drawn of a table, on which axes, and when nothing is."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hubrl.pretraining import figures
from hubrl.pretraining.figures import draw_losses, draw_returns

CONTRAST = """update,frames,image,place,inverse,accuracy
10,2000,9.0,11.0,1.5,0.2
20,3000,5.0,10.0,0.5,0.6
"""
PROGRESS = """time/total_timesteps,train/loss,rollout/ep_rew_mean
1024,0.1,
2048,0.2,-21.0
3072,0.1,-19.5
"""


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """What is drawn, as figures of matplotlib instead of files."""
    seen: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: seen.append(figure))
    return seen


def write(folder: Path, text: str) -> tuple[Path, Path]:
    (folder / "table.csv").write_text(text)
    return folder / "table.csv", folder / "picture.png"


def labels(panel) -> list[str]:
    return [line.get_label() for line in panel.get_lines()]


def test_losses_are_lines_over_the_steps_and_accuracy_has_its_own_panel(drawn, tmp_path):
    table, picture = write(tmp_path, CONTRAST)
    draw_losses(table, picture, "contrast on Pong")
    losses, accuracy = drawn[0].axes
    assert losses.get_title() == "contrast on Pong"
    assert labels(losses) == ["image  5", "place  10", "inverse  0.5"]
    assert labels(accuracy) == ["accuracy  0.6"]
    assert losses.get_lines()[1].get_xdata().tolist() == [2000.0, 3000.0]
    assert losses.get_lines()[1].get_ydata().tolist() == [11.0, 10.0]
    assert accuracy.get_ylim() == (0.0, 1.0)
    colours = {line.get_color() for panel in drawn[0].axes for line in panel.get_lines()}
    assert len(colours) == 4


@pytest.mark.parametrize(
    ("rows", "scale", "label"),
    [
        ("10,2000,1.0,9.9", "linear", "loss"),
        ("10,2000,1.0,10.0", "log", "loss, logarithmic"),
        ("10,2000,0.0,10.0", "linear", "loss"),
        ("10,2000,-1.0,10.0", "linear", "loss"),
        ("10,2000,nan,nan", "linear", "loss"),
    ],
)
def test_losses_that_are_far_apart_get_a_logarithmic_axis(rows, scale, label, drawn, tmp_path):
    table, picture = write(tmp_path, f"update,frames,one,two\n{rows}\n")
    draw_losses(table, picture, "title")
    (panel,) = drawn[0].axes
    assert (panel.get_yscale(), panel.get_ylabel()) == (scale, label)
    assert (panel.get_ylim()[0] >= 0) == ("-1" not in rows)


def test_a_long_title_is_wrapped(drawn, tmp_path):
    draw_losses(*write(tmp_path, CONTRAST), f"contrast on {', '.join(['SpaceInvaders'] * 6)}")
    assert drawn[0].axes[0].get_title().count("\n") == 1


def test_returns_are_drawn_from_the_first_game_on(drawn, tmp_path):
    table, picture = write(tmp_path, PROGRESS)
    draw_returns(table, picture, "ppo on Pong")
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_xdata().tolist() == [2048.0, 3072.0]
    assert line.get_ydata().tolist() == [-21.0, -19.5]
    assert drawn[0].axes[0].get_ylabel() == "mean return of the last 100 games"


def test_the_same_table_gives_the_same_file(tmp_path):
    table, picture = write(tmp_path, CONTRAST)
    draw_losses(table, picture, "title")
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    draw_losses(table, picture, "title")
    assert picture.read_bytes() == first
    assert {file.name for file in tmp_path.iterdir()} == {"table.csv", "picture.png"}


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (draw_losses, ""),
        (draw_losses, CONTRAST[: CONTRAST.index("\n")]),
        (draw_returns, ""),
        (draw_returns, "time/total_timesteps,train/loss\n1024,0.1\n"),
        (draw_returns, "time/total_timesteps,rollout/ep_rew_mean\n1024,\n"),
    ],
)
def test_without_numbers_there_is_no_picture(draw, text, tmp_path):
    table, picture = write(tmp_path, text)
    draw(table, picture, "title")
    table.unlink()
    draw(table, picture, "title")
    assert not picture.exists()
