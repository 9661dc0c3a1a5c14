"""An SB3 VecEnv over ale-py's C++ Atari emulators, with the meaning of SB3's ``AtariWrapper``."""

from __future__ import annotations

import difflib
from array import array
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from envs.seeds import check_seed, episode_seed

gym.register_envs(ale_py)

NOOP = 0
FIRE_PRESSES = (1, 2)  # what SB3's FireResetEnv presses: FIRE and the action after it
FULL_STRENGTH = np.ones(1, dtype=np.float32)
NO_SEED = -1
NEW_GAME = -1  # among what an emulator was sent, a reset without a seed
FRAME_SKIP = 4
# Loading the ROM, which seeding the emulator does, costs as much as 200 agent steps; so it happens
# once per block of episodes, and inside a block the emulator's own generator draws the no-ops.
# (Not with sticky actions: they advance that generator, so each episode is seeded.)
SEED_EVERY = 32
# In these games a reset leaves RAM that depends on earlier play, and most seed themselves from it:
# a reset without a fresh ROM would not replay, so they are seeded at every episode.
HISTORY_DEPENDENT = frozenset(
    {
        "crossbow",
        "hangman",
        "haunted_house",
        "ice_hockey",
        "kung_fu_master",
        "pooyan",
        "sir_lancelot",
        "space_war",
        "surround",
        "time_pilot",
        "yars_revenge",
    }
)


class Frame(NamedTuple):
    """What one emulator shows after a step or a reset."""

    image: np.ndarray  # (C, H, W) uint8, C = 1 or 3
    reward: float
    terminated: bool
    truncated: bool
    lives: int
    emulator_frames: int  # since the episode began, no-ops included


# Yields an action, is sent the frame that it leads to, returns the first frame of the episode.
Presses = Generator[int, Any, Frame]


def is_atari(env_id: str) -> bool:
    """Whether the id names an ALE game (``ALE/Name-v5``)."""
    return env_id.startswith("ALE/")


def rom_name(env_id: str) -> str:
    """
    The ROM of a game, e.g. ``"space_invaders"`` for ``"ALE/SpaceInvaders-v5"``.

    :raises ValueError: if no such game is registered; the message has the closest ids
    """
    games = [name for name in gym.registry if is_atari(name) and name.endswith("-v5")]
    if env_id not in games:
        closest = difflib.get_close_matches(env_id, games, n=3, cutoff=0.4)
        hint = f"closest: {', '.join(closest)}" if closest else "e.g. ALE/Breakout-v5"
        raise ValueError(f"env {env_id!r} is not an Atari game of ale-py ({hint})")
    return str(gym.spec(env_id).kwargs["game"])


class AtariVecEnv(VecEnv):
    """
    Atari games stepped by ale-py's C++ threads, one emulator for each environment.

    Observations are (n_envs, frame_stack, screen_size, screen_size) uint8, newest frame last (in
    colour, frame_stack * 3 channels). The meaning is that of SB3's ``make_atari_env`` with
    ``VecFrameStack(4)``: no-ops at the start, 4 frames per action, the maximum over the last two,
    a lost life ends an episode for the learner without resetting the game, NOOP, FIRE and a third
    action start each life, the reward's sign for learning. ``infos[i]["episode"]`` holds the return
    (``r``, unclipped), the length in emulator frames (``l``) and the seconds (``t``, always 0: wall
    time is not reproducible) of each whole game.

    Episode starts repeat: they follow from ``(seed, env index, episode)`` alone. What differs from
    SB3 (``tests/envs/test_atari.py`` holds each point to its exact size):

    - The maximum over two frames is taken after the conversion to grey, as ALE does, so a pixel
      where two colours flicker may be darker than SB3's, never brighter.
    - The frame in which a game ends or is truncated is not part of its last image.
    - 0 to 29 no-ops at the start of a game instead of 1 to 30; a game is truncated ``max_frames``
      after them, and rewards that fall during them count for nobody.
    - The length of an episode is ALE's count, which in a few games includes the frames in which
      the game's mode is selected.
    - ``reset`` starts a new game, also in the middle of one.
    - A game that ends while its next life is being started is reported; SB3 forgets its return.

    :param env_id: an id ``ALE/Name-v5``; its registered frame skip and stickiness are not used
    :param n_envs: number of emulators
    :param seed: seed of the run
    :param sticky: probability that the emulator repeats the last action, per frame
    :param life_loss_ends_episode: report a lost life as the end of an episode; if not, lives still
        start in the same way, so that an agent sees what it saw in training
    :param clip_reward: replace the reward by its sign
    :param grey: one channel for a frame instead of red, green and blue
    :param frame_stack: number of frames in an observation
    :param screen_size: height and width of an observation, in pixels
    :param noop_max: upper bound (exclusive) of the no-op frames at the start of a game
    :param max_frames: a game is truncated after so many emulator frames
    :raises ValueError: if ``env_id`` is unknown or a number is out of its range
    """

    def __init__(
        self,
        env_id: str,
        n_envs: int = 8,
        *,
        seed: int = 0,
        sticky: float = 0.0,
        life_loss_ends_episode: bool = True,
        clip_reward: bool = True,
        grey: bool = True,
        frame_stack: int = 4,
        screen_size: int = 84,
        noop_max: int = 30,
        max_frames: int = 108_000,
    ) -> None:
        _check_at_least_1(
            n_envs=n_envs,
            frame_stack=frame_stack,
            screen_size=screen_size,
            noop_max=noop_max,
            max_frames=max_frames,
        )
        if not 0.0 <= sticky <= 1.0:
            raise ValueError(f"sticky is {sticky}, but a probability lies in 0..1")
        rom = rom_name(env_id)
        self._emulators = [
            _emulator(rom, sticky, grey, screen_size, noop_max, max_frames) for _ in range(n_envs)
        ]
        actions = [action.name for action in self._emulators[0].get_action_set()]
        channels = 1 if grey else 3
        shape = (frame_stack * channels, screen_size, screen_size)
        super().__init__(
            n_envs,
            gym.spaces.Box(0, 255, shape, np.uint8),
            gym.spaces.Discrete(len(actions)),
        )
        self.env_id = env_id
        self._n_actions = len(actions)
        self._fire_presses = FIRE_PRESSES if actions[1] == "FIRE" else ()
        self._life_loss_ends_episode = life_loss_ends_episode
        self._clip_reward = clip_reward
        self._channels = channels
        self._seed_every = 1 if sticky > 0.0 or rom in HISTORY_DEPENDENT else SEED_EVERY
        self._images = np.zeros((n_envs, *shape), dtype=np.uint8)
        self._lives = [0] * n_envs
        self._returns = [0.0] * n_envs
        self._over = [False] * n_envs  # the game itself, not only a life
        self._screens = [image[: self._channels] for image in self._images]  # newest frames
        self._seeded = [0] * n_envs  # the episode that the last seed began
        self._sent = [array("h") for _ in range(n_envs)]  # since then; hours of play are long
        self.seed(seed)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        Derive all later episodes from this seed, counting from episode 0 again.

        :param seed: 0 or more; None draws one
        """
        self._seed = int(np.random.randint(2**31)) if seed is None else seed
        check_seed(self._seed)
        self._episodes = [-1] * self.num_envs
        return [self._seed] * self.num_envs

    def reset(self) -> np.ndarray:
        """Start a new game everywhere; (n_envs, frame_stack, H, W) uint8."""
        self._images = np.zeros_like(self._images)
        starting: deque[tuple[int, Presses]] = deque()

        def begin(i: int) -> None:
            self._begin(i, self._start_episode(i, {}, new_game=True), starting)

        # Loading a ROM takes 0.1 s, without Python's lock.
        with ThreadPoolExecutor() as threads:
            list(threads.map(begin, range(self.num_envs)))
        self._finish(starting)
        return self._images

    def step_async(self, actions: np.ndarray) -> None:
        """
        Hand one action to each emulator; their threads start at once.

        :param actions: (n_envs,) integers
        """
        numbers = np.asarray(actions).reshape(self.num_envs).tolist()
        if min(numbers) < 0 or max(numbers) >= self._n_actions:  # the emulator would hang
            raise ValueError(
                f"actions are {numbers}, but {self.env_id} takes 0..{self._n_actions - 1}"
            )
        for i, number in enumerate(numbers):
            self._send(i, number)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Collect the frames; start a new life or game where one ended, as SB3's VecEnvs do.

        An emulator starts its new life while the others still step: each start is a generator of
        presses, and the first press is sent before the next emulator's frame is awaited.
        """
        self._images = np.concatenate(
            [self._images[:, self._channels :], self._images[:, : self._channels]], axis=1
        )
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        dones = np.zeros(self.num_envs, dtype=bool)
        infos: list[dict[str, Any]] = []
        starting: deque[tuple[int, Presses]] = deque()
        for i in range(self.num_envs):
            frame = self._receive(i)
            life_lost = self._notice_end(i, frame)
            rewards[i] = np.sign(frame.reward) if self._clip_reward else frame.reward
            dones[i] = life_lost and self._life_loss_ends_episode
            infos.append(self._info(i, frame, life_lost))
            self._images[i, -self._channels :] = frame.image
            if life_lost or self._over[i]:
                infos[i]["terminal_observation"] = self._images[i].copy()
                self._images[i] = 0
                self._begin(i, self._start_episode(i, infos[i]), starting)
        self._finish(starting)
        dones |= ["episode" in info for info in infos]
        return self._images, rewards, dones, infos

    def state(self) -> Callable[[], dict[str, np.ndarray]]:
        """
        Where the games stand now: what ``restore`` takes, made when it is asked for.

        Emulators in an ALE vector can't be cloned, but follow from their seed and actions.
        """
        now = {
            "images": self._images,
            "screens": np.stack(self._screens),
            "lives": np.array(self._lives),
            "returns": np.array(self._returns),
            "over": np.array(self._over),
            "seed": np.array(self._seed),
            "episodes": np.array(self._episodes),
            "seeded": np.array(self._seeded),
        }
        sent = [(actions, len(actions)) for actions in self._sent]
        return lambda: (
            now
            | {
                f"{i}.sent": np.array(actions[:n], dtype=np.int16)
                for i, (actions, n) in enumerate(sent)
            }
        )

    def restore(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
        """
        Lead the emulators to where others stood, by all that those were sent since their last seed.

        :param state: what ``state`` gave
        :return: observations; other ones than before if the emulators don't replay
        :raises ValueError: if it is of other games
        """
        self._check_state(state)
        self._seed = int(state["seed"])
        self._seeded = state["seeded"].tolist()
        self._sent = [array("h", state[f"{i}.sent"]) for i in range(self.num_envs)]
        with ThreadPoolExecutor(max_workers=self.num_envs) as threads:
            self._screens = list(threads.map(self._replay, range(self.num_envs)))
        self._episodes, self._lives = state["episodes"].tolist(), state["lives"].tolist()
        self._returns, self._over = state["returns"].tolist(), state["over"].tolist()
        self._images = state["images"].copy()
        for i, (screen, expected) in enumerate(zip(self._screens, state["screens"], strict=True)):
            if not np.array_equal(screen, expected):
                self._images[i, -self._channels :] = screen
        return self._images

    def _check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """It may be a stranger's, and emulators hang or crash at what they don't know."""
        for key, like in self.state()().items():
            found, is_sent = state[key], key.endswith("sent")
            n_axes_fit = found.ndim == 1 if is_sent else found.shape == like.shape
            if not n_axes_fit or found.dtype != like.dtype:
                raise ValueError(
                    f"{key} is {found.shape} {found.dtype}, not {like.shape} {like.dtype}"
                )
            if is_sent and not np.isin(found, [NEW_GAME, *range(self._n_actions)]).all():
                raise ValueError(f"{key} holds actions that {self.env_id} doesn't take")

    def _replay(self, i: int) -> np.ndarray:
        """The last screen of an emulator that is sent everything again."""
        emulator = self._emulators[i]
        seed = episode_seed(self._seed, i, self._seeded[i])
        image, _ = emulator.reset(np.array([0]), np.array([seed]))
        for action in self._sent[i]:
            if action == NEW_GAME:
                image, _ = emulator.reset(np.array([0]), np.array([NO_SEED]))
            else:
                emulator.send(np.array([action]), FULL_STRENGTH)
                image, *_ = emulator.recv()
        return _channels_first(image)

    def close(self) -> None:
        """Release the emulators and their threads."""
        self._emulators.clear()

    def _send(self, i: int, action: int) -> None:
        self._sent[i].append(action)
        self._emulators[i].send(np.array([action]), FULL_STRENGTH)

    def _receive(self, i: int) -> Frame:
        image, rewards, terminated, truncated, info = self._emulators[i].recv()
        frame = _frame(image, rewards[0], terminated[0], truncated[0], info)
        self._returns[i] += frame.reward
        self._screens[i] = frame.image
        return frame

    def _notice_end(self, i: int, frame: Frame) -> bool:
        """Whether the frame shows a lost life; remembers lives and whether the game is over."""
        self._over[i] = frame.terminated or frame.truncated
        # Qbert stays at 0 lives for some frames before the game is over: 0 is not a lost life.
        life_lost = 0 < frame.lives < self._lives[i]
        self._lives[i] = frame.lives
        return life_lost

    def _info(self, i: int, frame: Frame, life_lost: bool) -> dict[str, Any]:
        cut = frame.truncated and not (life_lost and self._life_loss_ends_episode)
        info: dict[str, Any] = {"lives": frame.lives, "TimeLimit.truncated": cut}
        if self._over[i]:
            info["episode"] = self._episode(i, frame)
        return info

    def _episode(self, i: int, frame: Frame) -> dict[str, float]:
        return {"r": self._returns[i], "l": frame.emulator_frames, "t": 0.0}

    def _begin(self, i: int, start: Presses, starting: deque[tuple[int, Presses]]) -> None:
        if self._advance(i, start, None):
            starting.append((i, start))

    def _finish(self, starting: deque[tuple[int, Presses]]) -> None:
        """Press on in turn, so that all emulators that start an episode work side by side."""
        while starting:
            i, start = starting.popleft()
            if self._advance(i, start, self._receive(i)):
                starting.append((i, start))

    def _advance(self, i: int, start: Presses, frame: Frame | None) -> bool:
        """Send the next press; False if there is none, and the episode's first frame is known."""
        try:
            self._send(i, start.send(frame))
        except StopIteration as stop:
            self._images[i, -self._channels :] = stop.value.image
            return False
        return True

    def _start_episode(self, i: int, info: dict[str, Any], new_game: bool = False) -> Presses:
        """``FireResetEnv.reset`` over ``EpisodicLifeEnv.reset``, to the letter."""
        frame = yield from self._start_life(i, info, new_game)
        for action in self._fire_presses:
            frame = yield action
            if self._ended(i, frame, info):
                yield from self._start_life(i, info)  # SB3 shows the frame from before it
        return frame

    def _start_life(self, i: int, info: dict[str, Any], new_game: bool = False) -> Presses:
        if new_game or self._over[i]:
            frame = yield from self._start_game(i)
        else:
            frame = yield NOOP
            self._ended(i, frame, info)
            if self._over[i]:
                frame = yield from self._start_game(i)
        self._lives[i] = frame.lives
        return frame

    def _ended(self, i: int, frame: Frame, info: dict[str, Any]) -> bool:
        """Whether a life or game ended while the next was being started; SB3 loses its return."""
        life_lost = self._notice_end(i, frame)
        if self._over[i]:
            info.setdefault("episode", self._episode(i, frame))
        return self._over[i] or life_lost

    def _start_game(self, i: int) -> Presses:
        self._episodes[i] += 1
        self._returns[i] = 0.0
        load_rom = self._episodes[i] % self._seed_every == 0
        if self._over[i] and not load_rom:
            # After a game's end the emulator answers any action by a new game.
            frame: Frame = yield NOOP
        else:
            frame = self._reset_emulator(i, load_rom)
        self._over[i] = False
        self.reset_infos[i] = {"episode": self._episodes[i], "frames": frame.emulator_frames}
        return frame

    def _reset_emulator(self, i: int, load_rom: bool) -> Frame:
        seed = NO_SEED
        if load_rom:
            seed = episode_seed(self._seed, i, self._episodes[i])
            self._seeded[i], self._sent[i] = self._episodes[i], array("h")
        else:
            self._sent[i].append(NEW_GAME)
        image, info = self._emulators[i].reset(np.array([0]), np.array([seed]))
        frame = _frame(image, 0.0, False, False, info)
        self._screens[i] = frame.image
        return frame

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """This object's own attribute, once for each index: the emulators have none."""
        value = None if attr_name == "render_mode" else getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Not possible: the emulators are C++ objects."""
        raise NotImplementedError("AtariVecEnv: attributes are set when it is made")

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Not possible: the emulators are C++ objects."""
        raise NotImplementedError(f"AtariVecEnv has no environment method {method_name!r}")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """True for ``Monitor``: true returns are in ``infos[i]["episode"]``."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def _emulator(
    rom: str, sticky: float, grey: bool, screen_size: int, noop_max: int, max_frames: int
) -> ale_py.ALEVectorInterface:
    """One emulator with a thread of its own; stacks, clips and FIRE are left to AtariVecEnv."""
    return ale_py.AtariVectorEnv(
        rom,
        num_envs=1,
        num_threads=1,
        max_num_frames_per_episode=max_frames,
        repeat_action_probability=sticky,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        img_height=screen_size,
        img_width=screen_size,
        grayscale=grey,
        stack_num=1,
        frameskip=FRAME_SKIP,
        noop_max=noop_max,
        reward_clipping=False,
        use_fire_reset=False,
    ).ale


def _frame(
    image: np.ndarray, reward: float, terminated: bool, truncated: bool, info: dict[str, np.ndarray]
) -> Frame:
    lives, frames = int(info["lives"][0]), int(info["episode_frame_number"][0])
    return Frame(
        _channels_first(image), float(reward), bool(terminated), bool(truncated), lives, frames
    )


def _channels_first(image: np.ndarray) -> np.ndarray:
    channels_first: np.ndarray = image[0] if image.ndim == 4 else image[0, 0].transpose(2, 0, 1)
    return channels_first


def _check_at_least_1(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}, but at least 1 is needed")
