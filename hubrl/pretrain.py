"""``hubrl pretrain``: trains an encoder on Atari games and makes it a member of a hub."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hubrl import cli
from hubrl.files import with_prefix
from hubrl.finite import NotFiniteError
from hubrl.origin import command_line, commit
from hubrl.plots import import_matplotlib
from hubrl.precision import check_device
from hubrl.pretraining import trainer
from hubrl.pretraining.frames import Player, Policy
from hubrl.pretraining.member import Member
from hubrl.pretraining.pretext import FRAME_STACK, IMAGE_SIZE, N_CONV_FEATURES, PRETEXTS
from hubrl.pretraining.trainer import Budget, Trainer
from hubrl.run_folder import CsvTable
from hubrl.signals import StopSignal
from hubrl.specs import EncoderSpec, closest
from hubrl.state_folder import has_state

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model  # noqa: E402
from agents.checkpoints import load_checkpoint  # noqa: E402
from agents.config import RecurrentPPOSection, RunConfig  # noqa: E402
from agents.evaluation import bootstrap_interval, evaluate  # noqa: E402
from agents.faults import policy_errors  # noqa: E402
from agents.runs import (  # noqa: E402
    PROGRESS_FILE,
    checkpoint_dir,
    derive_seed,
    open_run,
)
from envs.atari import AtariVecEnv, rom_name  # noqa: E402
from hubrl import train  # noqa: E402
from hubrl.games import make_env  # noqa: E402
from hubrl.pretraining.figures import COUNTS, draw_losses, draw_returns  # noqa: E402

OBJECTIVES = (*PRETEXTS, "ppo")
STATE_FILE = "state.safetensors"
LOSSES_FILE, LOSSES_PICTURE = "losses.csv", "losses.png"
RETURNS_PICTURE = "returns.png"

DEFAULT_FRAMES = 200_000
DEFAULT_AGENT_FRAMES = 1_000_000
N_ENVS = 8  # of each game
STICKY = 0.25
MEMORY = 2_000_000_000  # bytes of frames
LINE_SECONDS = 10.0
SAVE_SECONDS = 60.0
N_EPISODES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """
    What decides the result of a pretraining run.

    :param envs: games, ``ALE/Name-v5``
    :param objective: one of ``OBJECTIVES``
    :param n_frames: agent steps to play, over all games; None: until the minutes are over
    :param minutes: of training; None: until the frames are played
    :param seed: everything random follows from it
    :param play: ``random``, or the run folder of the agent that plays
    :raises ValueError: if a value is not allowed
    """

    envs: tuple[str, ...]
    objective: str
    n_frames: int | None = None
    minutes: float | None = None
    seed: int = 0
    play: str = "random"

    def __post_init__(self) -> None:
        self._check_envs()
        if self.objective not in OBJECTIVES:
            hint = closest(self.objective, OBJECTIVES)
            raise ValueError(
                f"objective {self.objective!r} is unknown{hint}; allowed: {', '.join(OBJECTIVES)}"
            )
        least = len(self.envs) * trainer.FIRST_STEPS * N_ENVS + trainer.FRAMES_PER_UPDATE
        if self.n_frames is not None and self.n_frames < least:
            raise ValueError(
                f"n-frames is {self.n_frames}, allowed: at least {least} for {len(self.envs)} games"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}, allowed: above 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, allowed: 0 or more, below {2**32}")
        if self.objective == "ppo":
            self._check_agent()

    def _check_envs(self) -> None:
        for env in self.envs:
            rom_name(env)
        doubles = sorted({env for env in self.envs if self.envs.count(env) > 1})
        if doubles:
            raise ValueError(f"env {doubles[0]!r} is given twice; give each game once")

    def _check_agent(self) -> None:
        if len(self.envs) > 1:
            raise ValueError(f"env is given {len(self.envs)} times, but objective ppo takes 1 game")
        if self.minutes is not None:
            raise ValueError(f"minutes is {self.minutes}, but objective ppo takes --n-frames")


@click.command("pretrain")
@click.option("--env", "envs", multiple=True, required=True, help="ALE/Name-v5; may be repeated.")
@click.option(
    "--objective", default="contrast", show_default=True, help=f"{', '.join(OBJECTIVES)}."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the hub.")
@click.option(
    "-n",
    "--n-frames",
    type=int,
    help="Frames as an agent sees them, one for each step, over all games.  "
    f"[default: {DEFAULT_FRAMES}; ppo: {DEFAULT_AGENT_FRAMES}]",
)
@click.option(
    "--minutes", type=float, help="Of training: in the place of -n, or beside it at most."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--name", help="Of the encoder.  [default: the game, or the objective of several]")
@click.option(
    "--play",
    default="random",
    show_default=True,
    help="random, or the run of the agent that plays; with ppo its encoder is taken as it is.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda ...")
def command(out: Path, name: str | None, device: str, **options: Any) -> int:
    """Train an encoder and write it and its card to OUT; the same command goes on after a stop."""
    with cli.user_errors():
        is_agent = options["objective"] == "ppo"
        is_trained = is_agent and options["play"] != "random"
        if is_trained and any(options[name] for name in ("n_frames", "minutes", "seed")):
            raise ValueError(
                f"play is {options['play']}, an agent that is taken as it is: leave out "
                "--n-frames, --minutes and --seed"
            )
        if options["n_frames"] is None and options["minutes"] is None:
            options["n_frames"] = DEFAULT_AGENT_FRAMES if is_agent else DEFAULT_FRAMES
        settings = Settings(**options)
        check_device("device", device)
        member = Member(out, _card(name, settings), dataclasses.asdict(settings))
        if member.is_complete():
            print(f"{out} has the encoder {member.card.name!r} already")
            return 0
        prepare = _agent if settings.objective == "ppo" else _self_supervised
        run = prepare(member, settings, device)
        member.open()
    with cli.holding(member.work), cli.failures(NotFiniteError, OSError):
        return run()


def _card(name: str | None, settings: Settings) -> EncoderSpec:
    """Named after the game, or for several games after the objective, unless a name is given."""
    only = len(settings.envs) == 1
    return EncoderSpec(
        name=name or (rom_name(settings.envs[0]) if only else settings.objective),
        architecture="nature_conv",
        features_dim=N_CONV_FEATURES,
        image_size=IMAGE_SIZE,
        channels=FRAME_STACK,
        license="MIT",
        source="trained by hubrl pretrain",
    )


def _self_supervised(member: Member, settings: Settings, device: str) -> Callable[[], int]:
    """Set up; what is returned trains until it is done or a signal comes."""
    file = member.work / STATE_FILE
    training = Trainer(
        settings.objective,
        _make_players(settings),
        Budget(settings.n_frames, settings.minutes),
        seed=settings.seed,
        device=check_device("device", device),
    )
    if file.exists():
        training.load(file)

    def run() -> int:
        stop, log = StopSignal(), Log(member.work, training, _title(settings))
        with stop.caught():
            while training.share_done < 1 and stop.number is None:
                log.add(training.update())
                if log.save_is_due():
                    training.save(file)
                    log.draw()
        training.save(file)
        log.close()
        if stop.number is not None:
            return 128 + stop.number
        _add_self_supervised(member, settings, training, log.means)
        return 0

    return run


def _agent(member: Member, settings: Settings, device: str) -> Callable[[], int]:
    """Set up; what is returned trains an agent by ``hubrl train``, and takes its encoder."""
    if settings.play != "random":
        config, played = _player_config(settings), Path(settings.play)
        _check_taken(settings, config)
        model = _load_player(played, config)
        return lambda: _add_agent(member, settings, config, model, played)
    folder = member.work / "run"
    is_begun = has_state(checkpoint_dir(folder, "last"))

    def run() -> int:
        if is_begun:
            arguments = ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it saved
            arguments = ["--env", settings.envs[0], "--hub", "none", "--device", device]
            arguments += ["-n", str(settings.n_frames), "--seed", str(settings.seed)]
            arguments += ["--run-dir", str(folder)]
        code = train.command.main(arguments, prog_name="hubrl train", standalone_mode=False)
        if code:
            _draw_returns(member, settings, folder)
            return int(code)
        config = open_run(folder)
        return _add_agent(member, settings, config, _load_player(folder, config), folder)

    return run


class Log:
    """
    Losses on the screen, in ``losses.csv`` and for TensorBoard, every ten seconds; and a picture.

    :param folder: of the training's files
    :param training: whose progress is logged
    :param title: of the picture
    """

    def __init__(self, folder: Path, training: Trainer, title: str) -> None:
        update = training.progress.update
        self._training = training
        self._folder, self._title = folder, title
        self._can_draw = _can_draw()
        self._table = CsvTable(folder / LOSSES_FILE, "update", update)
        self._events = SummaryWriter(str(folder), purge_step=update + 1)
        self._line = self._save = time.monotonic()
        self._n_updates = 0
        self._sums: dict[str, float] = {}
        # A run that was killed when all was learned but the card has nothing to add.
        last = self._table.last_row.items()
        self.means = {name: float(cell) for name, cell in last if name not in COUNTS}

    def add(self, losses: dict[str, float]) -> None:
        """Count the losses of one update in."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._n_updates += 1
        if time.monotonic() - self._line >= LINE_SECONDS:
            self._write()

    def save_is_due(self) -> bool:
        """Whether a minute has passed since this was last true."""
        due = time.monotonic() - self._save >= SAVE_SECONDS
        if due:
            self._save = time.monotonic()
        return due

    def draw(self) -> None:
        """Draw ``losses.csv`` as ``losses.png``, anew each time."""
        if self._can_draw:
            table, picture = self._folder / LOSSES_FILE, self._folder / LOSSES_PICTURE
            draw_losses(table, picture, self._title)

    def close(self) -> None:
        """Write and draw the rest."""
        if self._n_updates:
            self._write()
        self._events.close()
        self.draw()

    def _write(self) -> None:
        self.means = {name: round(v / self._n_updates, 4) for name, v in self._sums.items()}
        update, n_frames = self._training.progress.update, self._training.n_frames
        self._table.append({"update": update, "frames": n_frames, **self.means})
        for name, value in self.means.items():
            self._events.add_scalar(f"pretrain/{name}", value, update)
        speed = self._n_updates / max(time.monotonic() - self._line, 1e-9)
        losses = "  ".join(f"{name} {value:.3f}" for name, value in self.means.items())
        print(
            f"{time.strftime('%H:%M:%S')}  {n_frames:,} frames "
            f"({min(self._training.share_done, 1.0):.1%})  {losses}  {speed:.1f} updates/s",
            flush=True,
        )
        self._line, self._n_updates, self._sums = time.monotonic(), 0, {}


def _make_players(settings: Settings) -> list[Player]:
    n_kept = MEMORY // (len(settings.envs) * N_ENVS * IMAGE_SIZE[0] * IMAGE_SIZE[1])
    policy = None if settings.play == "random" else _policy(settings)
    return [
        Player(_make_env(env), (settings.seed, *env.encode()), n_kept, policy)
        for env in settings.envs
    ]


def _make_env(env_id: str) -> AtariVecEnv:
    """Lives as episodes, as a learning agent sees them, but true rewards."""
    return AtariVecEnv(
        env_id,
        N_ENVS,
        sticky=STICKY,
        clip_reward=False,
        frame_stack=FRAME_STACK,
        screen_size=IMAGE_SIZE[0],
    )


def _can_draw() -> bool:
    """Whether there will be pictures; says what they need where there won't."""
    try:
        import_matplotlib()
    except ValueError as error:
        print(f"no picture will be drawn: {error}", flush=True)
        return False
    return True


def _title(settings: Settings) -> str:
    """Objective and games, such as ``contrast on Pong, Qbert``."""
    games = [env.removeprefix("ALE/").removesuffix("-v5") for env in settings.envs]
    return f"{settings.objective} on {', '.join(games)}"


def _policy(settings: Settings) -> Policy:
    """
    The best actions of the agent that plays.

    :raises ValueError: if it wants to see other images than those that encoders are trained on, or
        if its actions follow from more than those
    """
    config = _player_config(settings)
    if isinstance(config.algorithm, RecurrentPPOSection):
        raise ValueError(
            f"play is {settings.play}, an agent of recurrent_ppo, whose actions follow from more "
            "than the images; give a run of another algorithm"
        )
    model = _load_player(Path(settings.play), config)
    seen, played = model.observation_space.shape, (FRAME_STACK, *IMAGE_SIZE)
    if seen != played:
        raise ValueError(
            f"play is {settings.play}, an agent that sees images of {seen}, but encoders are "
            f"trained on {played}; give a run without a hub, or with one of such images"
        )

    def best(observations: np.ndarray) -> np.ndarray:
        with policy_errors(model):
            return model.predict(observations, deterministic=True)[0]

    return best


def _player_config(settings: Settings) -> RunConfig:
    """The configuration of the run that ``play`` names."""
    config = open_run(Path(settings.play))
    if settings.envs != (config.env.id,):
        envs = ", ".join(settings.envs)
        raise ValueError(f"play is {settings.play}, an agent of {config.env.id}, but env is {envs}")
    return config


def _check_taken(settings: Settings, config: RunConfig) -> None:
    """
    :raises ValueError: if the agent that ``play`` names has no encoder that can be taken
    """
    if config.algorithm.name != "ppo":
        raise ValueError(
            f"play is {settings.play}, an agent of {config.algorithm.name}, but objective ppo "
            "takes the encoder of a PPO agent"
        )
    if config.hub.name != "none":
        raise ValueError(
            f"play is {settings.play}, an agent with the hub {config.hub.name!r}, but only "
            "the encoder of one without a hub can be taken"
        )


def _load_player(run: Path, config: RunConfig) -> BaseAlgorithm:
    model = build_model(config, make_env(config, config.env.n_envs), learns=False)
    load_checkpoint(model, checkpoint_dir(run, "last"))
    return model


def _add_self_supervised(
    member: Member, settings: Settings, training: Trainer, means: dict[str, float]
) -> None:
    facts = {
        "frames": training.n_frames,
        "updates": training.progress.update,
        "minutes": round(training.progress.seconds / 60, 1),
        "play": settings.play,
        "sticky": STICKY,
        "losses": means,
    }
    _add(member, training.encoder(), _facts(settings, facts))


def _add_agent(
    member: Member, settings: Settings, config: RunConfig, model: BaseAlgorithm, run: Path
) -> int:
    """Take the agent's encoder; the card compares the agent's play with random play."""
    _draw_returns(member, settings, run)
    env = make_env(config, N_ENVS)
    seed = derive_seed(config.train.seed, "evaluate")
    deterministic = config.train.deterministic_eval
    games = evaluate(model, env, N_EPISODES, deterministic=deterministic, seed=seed)
    assert games is not None
    tensors = with_prefix(model.policy.state_dict(), "features_extractor.")
    # The linear layer is only kept: the card says that the hub takes the convolutions.
    tensors = {key: t.half() if key.startswith("linear.") else t for key, t in tensors.items()}
    facts = {
        "seed": config.train.seed,
        "frames": model.num_timesteps,
        "sticky": config.env.sticky,
        "episodes": N_EPISODES,
        "score": _score(games.returns),
        "random_score": _score(_random_returns(env, seed)),
    }
    _add(member, tensors, _facts(settings, facts))
    return 0


def _draw_returns(member: Member, settings: Settings, run: Path) -> None:
    """The returns of the agent's run as a picture among the files of the member's training."""
    if _can_draw():
        draw_returns(run / PROGRESS_FILE, member.work / RETURNS_PICTURE, _title(settings))


def _add(member: Member, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    with cli.user_errors():
        file = member.add(tensors, facts)
    print(f"added to the hub {member.out}: {file}", flush=True)


def _facts(settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """What every card says of its training."""
    return {
        "games": list(settings.envs),
        "objective": settings.objective,
        "seed": settings.seed,
        **facts,
        "command": command_line("hubrl", "pretrain"),
        "commit": commit(),
    }


def _random_returns(env: VecEnv, seed: int) -> list[float]:
    """Returns of whole games of random play; each environment has its share, as in SB3."""
    env.seed(seed)
    env.reset()
    rng = np.random.default_rng(seed)
    n_actions = int(env.action_space.n)  # type: ignore[attr-defined]
    left = [(N_EPISODES + i) // env.num_envs for i in range(env.num_envs)]
    returns: list[float] = []
    while any(left):
        infos = env.step(rng.integers(0, n_actions, env.num_envs))[3]
        for i, info in enumerate(infos):
            if "episode" in info and left[i]:
                left[i] -= 1
                returns.append(float(info["episode"]["r"]))
    return returns


def _score(returns: list[float]) -> dict[str, float | list[float]]:
    """Mean return and its 95 % bootstrap interval."""
    mean, *interval = (round(value, 2) for value in bootstrap_interval(returns))
    return {"mean": mean, "interval95": interval}


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.pretrain")
