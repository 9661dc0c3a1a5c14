"""Where encoders come from: runs, SB3's zips, weight files, timm, torchvision, Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hubrl.architectures import find_architecture
from hubrl.encoders import as_float32, read_weights, with_features_dim
from hubrl.fetching.libraries import SPDX
from hubrl.files import reason, with_prefix
from hubrl.pathway import saved_facts
from hubrl.saved_agents import (
    agent_data,
    check_normalised,
    nature_tensors,
    policy_tensors,
    seen_size,
    square_pixels,
)
from hubrl.specs import HUB_FILE, EncoderSpec, HubSpec, load_hub
from hubrl.state_folder import load_state

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL_SHARE = 'pip install "hubrl[share]"'
N_FEATURES = 512  # of SB3's NatureCNN unless told otherwise


class Provided(NamedTuple):
    """An encoder that is not in a hub yet."""

    card: EncoderSpec
    """Without weights, sha256 and golden features."""
    tensors: dict[str, Tensor]
    """As the architecture names them."""


class Wishes(NamedTuple):
    """What a user says of an encoder beside its source; None: what the source says."""

    name: str | None = None
    license: str | None = None
    architecture: str | None = None
    image_size: int | None = None
    """Height and width in pixels."""
    n_frames: int | None = None
    """Of a stack, the frames that a library's model sees one after the other; 1: the newest."""


def require_license(card: EncoderSpec) -> None:
    """
    :raises ValueError: if the card states no licence
    """
    if not card.is_licensed:
        raise ValueError(
            f"encoder {card.name!r} has no licence: give --license with its SPDX identifier, such "
            "as MIT or Apache-2.0"
        )


def from_sb3(file: Path, wishes: Wishes) -> Provided:
    """
    The features extractor of an agent that Stable-Baselines3 saved, if it is its NatureCNN.

    Of Dict observations it is that of the only image. Nothing of the zip is executed: the weights
    pass torch's reader of tensors alone, and of the rest plain JSON is read.

    :param file: what ``model.save`` wrote
    :raises ValueError: if it is no such zip, holds anything but tensors, or another architecture,
        or its images were not normalised as a hub's are
    """
    _check_nature(wishes)
    tensors = nature_tensors(policy_tensors(file), file)
    data = agent_data(file)
    check_normalised(data, file)
    steps = data.get("num_timesteps")
    return _nature(
        wishes,
        tensors,
        file,
        name=file.stem,
        image_size=_wished_size(wishes) or seen_size(tensors, data.get("observation_space"), file),
        source=f"features extractor of the agent {file.name}",
        pretraining={"steps": steps} if type(steps) is int else {},
    )


def from_run(run: str, wishes: Wishes) -> Provided:
    """
    An encoder as a run of ``hubrl train`` has trained it: SB3's NatureCNN, or one of a hub's.

    :param run: ``FOLDER``, or ``FOLDER:ENCODER`` where the run's hub has several
    :raises ValueError: if there is no such run, checkpoint or encoder, or the run kept it as it
        was, or its card has changed since
    """
    # Their libraries take seconds that other sources save.
    from agents.checkpoints import Progress
    from agents.runs import best_checkpoint, checkpoint_dir, open_run

    path, colon, encoder = run.rpartition(":")
    if not colon or Path(run).exists():
        path, encoder = run, ""
    folder = Path(path)
    config = open_run(folder)
    checkpoint = checkpoint_dir(folder, best_checkpoint(folder))
    policy: dict[str, Tensor] = {}
    state = load_state({"policy": policy}, checkpoint, Progress, lambda _: None)
    game = config.env.id.removeprefix("ALE/").removesuffix("-v5")
    facts: dict[str, Any] = {
        "games": [config.env.id],
        "objective": config.algorithm.name,
        "seed": config.train.seed,
        "steps": state["num_timesteps"],
    }
    if config.hub.name == "none":
        if encoder:
            raise ValueError(f"{folder} has no hub: leave :{encoder} out")
        _check_nature(wishes)
        tensors = nature_tensors(policy, folder)
        return _nature(
            wishes,
            tensors,
            folder,
            name=game,
            image_size=_wished_size(wishes) or seen_size(tensors, None, folder),
            source="trained by hubrl train",
            pretraining=facts,
        )
    _refuse_architecture(wishes, "a run's hub")
    _refuse_n_frames(wishes)
    hub = load_hub(config.hub.name, weights=False)
    spec = _run_card(hub, config.hub.freeze, encoder, folder)
    tensors = _hub_tensors(policy, spec, folder)
    source, license = f"encoder {spec.name} of the hub {hub.name} ({spec.source})", spec.license
    if config.hub.random_init:
        source, license = f"random weights of {spec.architecture}", ""
    elif spec.pretraining:
        facts["before"] = dict(spec.pretraining)
    card = dataclasses.replace(
        spec,
        name=_valid_name(wishes.name or f"{spec.name}_{game}"),
        image_size=_wished_size(wishes) or spec.image_size,
        license=wishes.license or license,
        source=f"{source}, trained by hubrl train",
        pretraining=facts,
        weights=None,
        sha256=None,
        golden=None,
        provider=None,
    )
    return Provided(with_features_dim(card), tensors)


def from_file(file: Path, wishes: Wishes) -> Provided:
    """
    A safetensors file whose architecture the user names.

    :raises ValueError: if it can't be read, or the architecture is not given or unknown
    """
    if wishes.architecture is None:
        raise ValueError(
            f"{file} doesn't say what it is: give --architecture, such as nature_cnn, "
            "timm:resnet18 or torchvision:resnet18"
        )
    tensors = _read_tensors(file)
    card = _foreign_card(wishes, file.stem, f"weight file {file.name}", tensors)
    return Provided(with_features_dim(card), tensors)


def from_timm(model: str, wishes: Wishes) -> Provided:
    """
    A pretrained model of timm, downloaded by timm.

    :param model: a name of ``timm.list_models(pretrained=True)``
    :raises ValueError: if timm is not installed, has no such model, or can't download its weights
    """
    _refuse_architecture(wishes, "timm")
    architecture = f"timm:{model.partition('.')[0]}"
    tagged = wishes._replace(architecture=f"timm:{model}")
    card = _foreign_card(tagged, model, f"timm {model}", {})
    import timm

    known = timm.get_pretrained_cfg(model)
    if known is None or not known.has_weights:
        raise ValueError(f"timm has no pretrained weights of {model!r}; take another model")
    size = _wished_size(wishes) or tuple(known.input_size[1:])
    resized = {"img_size": size} if known.fixed_input_size else {}
    try:
        trunk = timm.create_model(model, pretrained=True, num_classes=0, **resized)
    except Exception as error:  # timm and its download know many
        raise ValueError(_no_download(f"timm model {model!r}", architecture, error)) from None
    card = dataclasses.replace(
        card,
        architecture=architecture,
        image_size=size,
        mean=tuple(known.mean),
        std=tuple(known.std),
        license=wishes.license or _spdx(known.license),
    )
    return Provided(with_features_dim(card), trunk.state_dict())


def from_torchvision(model: str, wishes: Wishes) -> Provided:
    """
    A classification model of torchvision with its default weights, downloaded by torchvision.

    :param model: a name of ``torchvision.models.list_models()``
    :raises ValueError: if torchvision is not installed, has no such model, or can't download it
    """
    _refuse_architecture(wishes, "torchvision")
    architecture = f"torchvision:{model}"
    card = _foreign_card(
        wishes._replace(architecture=architecture), model, f"torchvision {model}", {}
    )
    from torchvision import models

    weights = models.get_model_weights(model).DEFAULT
    try:
        # Not the file as it is: some have names of layers that torchvision translates.
        trunk = models.get_model(model, weights=weights, progress=False)
    except Exception as error:
        raise ValueError(_no_download(f"torchvision {weights}", architecture, error)) from None
    transform = weights.transforms()
    card = dataclasses.replace(
        card,
        image_size=_wished_size(wishes) or (transform.crop_size[0],) * 2,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        source=f"torchvision {weights}, {weights.url}",
    )
    return Provided(with_features_dim(card), trunk.state_dict())


def from_hf(address: str, wishes: Wishes) -> Provided:
    """
    An encoder of a Hugging Face repository: of a hub that it holds, or of a safetensors file.

    :param address: ``OWNER/NAME``, or ``OWNER/NAME/FILE`` for another file than model.safetensors
        and for one of several encoders of a hub
    :param wishes: without an architecture the repository's ``hub.yaml`` or timm's ``config.json``
        tells what the file is
    :raises ValueError: if huggingface_hub is not installed, the file can't be had or read, or what
        it is is not clear
    """
    owner, _, rest = address.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise ValueError(f"--from-hf {address}: give OWNER/NAME or OWNER/NAME/FILE.safetensors")
    repository, config = f"{owner}/{name}", {}
    if wishes.architecture is None:
        cards = download_if_there(repository, HUB_FILE)
        if cards is not None:
            return _of_shared_hub(load_hub(cards), repository, file, wishes)
        config = _timm_config(repository)
        wishes = wishes._replace(architecture=f"timm:{config['architecture']}")
    tensors = _read_tensors(download(repository, file or "model.safetensors"))
    named = Path(file).stem if file else name
    card = _foreign_card(wishes, named, f"https://huggingface.co/{repository}", tensors)
    card = _with_timm_config(card, config.get("pretrained_cfg", {}), wishes)
    return Provided(with_features_dim(card), tensors)


def download(repository: str, file: str) -> Path:
    """
    A file of a Hugging Face repository, in huggingface_hub's own cache.

    :raises ValueError: if huggingface_hub is not installed or the file can't be had
    """
    path = download_if_there(repository, file)
    if path is None:
        raise ValueError(f"{repository} has no file {file}; look it up on Hugging Face")
    return path


def download_if_there(repository: str, file: str) -> Path | None:
    """
    The same, or None where the repository has no such file.

    :raises ValueError: if huggingface_hub is not installed or the repository can't be read
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"Hugging Face repositories need huggingface_hub: {INSTALL_SHARE}"
        ) from None
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # no network, no such repository, no right to read it
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(
            f"{repository}/{file} can't be downloaded ({reason(error)}): check the name and the "
            "network, or get the file otherwise and give --from-file"
        ) from None


def _of_shared_hub(hub: HubSpec, repository: str, file: str, wishes: Wishes) -> Provided:
    """The encoder with its card."""
    cards = [(card, card.weights) for card in hub.encoders if card.weights]
    found = [(card, weights) for card, weights in cards if file in ("", weights)]
    if len(found) != 1:
        files = ", ".join(weights for _, weights in cards)
        raise ValueError(
            f"--from-hf {repository}: which encoder of this hub? Give {repository}/FILE with one "
            f"of its files: {files}"
        )
    _refuse_n_frames(wishes)
    ((card, weights),) = found
    tensors = read_weights(download(repository, weights), card)
    card = dataclasses.replace(
        card,
        name=_valid_name(wishes.name or card.name),
        license=wishes.license or card.license,
        image_size=_wished_size(wishes) or card.image_size,
        weights=None,
        sha256=None,
        golden=None,
    )
    return Provided(with_features_dim(card), tensors)


def _timm_config(repository: str) -> dict[str, Any]:
    """A timm repository's ``config.json``."""
    file = download_if_there(repository, "config.json")
    try:
        config = None if file is None else json.loads(file.read_text())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(
            f"{repository} has no {HUB_FILE} and no config.json that names an architecture of "
            "timm: give --architecture"
        )
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} can't be read as safetensors ({reason(error)}); "
            "safetensors.torch.save_file writes a state_dict so"
        ) from None
    return as_float32(tensors, str(file))


def _check_nature(wishes: Wishes) -> None:
    if wishes.architecture not in (None, "nature_cnn", "nature_conv"):
        raise ValueError(
            f"architecture is {wishes.architecture!r}, allowed of an agent of SB3: nature_cnn, "
            "nature_conv (its convolutions alone)"
        )
    _refuse_n_frames(wishes)


def _nature(wishes: Wishes, tensors: dict[str, Tensor], place: Path, **fields: Any) -> Provided:
    """
    An agent's NatureCNN, for images that were divided by 255.

    :param place: where it comes from, for an error
    """
    channels = tensors["cnn.0.weight"].shape[1]
    _refuse_stacked_colours(channels, place)
    card = _card(
        wishes,
        architecture=wishes.architecture or "nature_cnn",
        channels=channels,
        frames="last" if channels in (1, 3) else "stack",  # one frame, grey or of colours
        features_dim=len(tensors["linear.0.weight"]),
        **fields,
    )
    return Provided(with_features_dim(card), tensors)


def _run_card(hub: HubSpec, frozen: Collection[str], encoder: str, run: Path) -> EncoderSpec:
    """
    :param frozen: names of the encoders that the run kept as they were, or ``all``
    :param encoder: its name; nothing: the only one
    :raises ValueError: if it isn't clear which one is meant, or the run kept it as it was
    """
    if not encoder and len(hub.encoders) > 1:
        raise ValueError(
            f"{run} has the encoders {', '.join(hub.encoder_names)}: choose one, as "
            f"{run}:{hub.encoder_names[0]}"
        )
    (spec,) = hub.only(encoder or hub.encoder_names[0]).encoders
    if {"all", spec.name} & set(frozen):
        raise ValueError(
            f"encoder {spec.name!r} was frozen in {run}, which has not trained it: take another"
        )
    return spec


def _hub_tensors(policy: dict[str, Tensor], spec: EncoderSpec, run: Path) -> dict[str, Tensor]:
    """
    Those of an encoder that learned; the actor's, where actor and critic have their own.

    :raises ValueError: if there are none, or its card isn't that which the run was trained with
    """
    marker = f"pathway.encoders.owned.{spec.name}.trunk."
    prefixes = {key.partition(marker)[0] + marker for key in policy if marker in key}
    states = [tensor for key, tensor in policy.items() if key.endswith("pathway._extra_state")]
    if not prefixes or not states:
        raise ValueError(f"{run}: its checkpoint lacks encoder {spec.name!r}; put the file back")
    for field, value in saved_facts(states[0])[1].get(spec.name, {}).items():
        now = getattr(spec, field, None)
        if field != "sha256" and value != (list(now) if isinstance(now, tuple) else now):
            raise ValueError(
                f"{run} was trained with {field} {value} of encoder {spec.name!r}, but its hub's "
                f"card says {now} now: put the card back"
            )
    prefix = min(prefixes, key=lambda name: ("target" in name, "critic" in name, name))
    return {key: tensor.clone() for key, tensor in with_prefix(policy, prefix).items()}


def _foreign_card(
    wishes: Wishes, name: str, source: str, tensors: dict[str, Tensor]
) -> EncoderSpec:
    """
    ImageNet's colours for the libraries' models, grey stacks for our own architectures.

    :raises ValueError: if there is no such architecture
    """
    assert wishes.architecture is not None
    fields: dict[str, Any] = {"architecture": wishes.architecture, "name": name, "source": source}
    if ":" in wishes.architecture:
        n_frames = wishes.n_frames or 1
        fields |= {"frames": "each" if n_frames > 1 else "last", "n_frames": n_frames}
        fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "channels": 3}
        size = _wished_size(wishes) or (224, 224)
        card = _card(wishes, image_size=size, features_dim=n_frames, **fields)
    else:
        _refuse_n_frames(wishes)
        first, linear = (tensors.get(f"{layer}.weight") for layer in ("cnn.0", "linear.0"))
        pixels = square_pixels(linear.shape[-1]) if linear is not None and linear.ndim else None
        channels = first.shape[1] if first is not None and first.ndim == 4 else 4
        card = _card(
            wishes,
            image_size=_wished_size(wishes) or (pixels or 84,) * 2,
            channels=channels,
            frames="last" if channels in (1, 3) else "stack",
            features_dim=N_FEATURES if linear is None or not linear.ndim else len(linear),
            **fields,
        )
    find_architecture(card)
    return card


def _with_timm_config(card: EncoderSpec, config: Any, wishes: Wishes) -> EncoderSpec:
    """What a timm repository says of input and licence."""
    config = config if isinstance(config, dict) else {}
    try:
        changes: dict[str, Any] = {
            key: tuple(config[key]) for key in ("mean", "std") if key in config
        }
        if "input_size" in config and wishes.image_size is None:
            changes["image_size"] = tuple(config["input_size"][-2:])
        license = wishes.license or _spdx(config.get("license"))
        return dataclasses.replace(card, **changes, license=license)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{card.source}: its config.json is wrong ({reason(error)})") from None


def _spdx(license: str | None) -> str:
    """The identifier of what timm calls a licence; empty for none."""
    name = license or ""
    return SPDX.get(name, name)


def _card(wishes: Wishes, *, name: str, features_dim: int = 1, **fields: Any) -> EncoderSpec:
    """A card whose features_dim is still to be found, unless the architecture takes any."""
    name = _valid_name(wishes.name or name)
    return EncoderSpec(name=name, features_dim=features_dim, license=wishes.license or "", **fields)


def _valid_name(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).lstrip("_-") or "encoder"


def _wished_size(wishes: Wishes) -> tuple[int, int] | None:
    return None if wishes.image_size is None else (wishes.image_size, wishes.image_size)


def _refuse_architecture(wishes: Wishes, library: str) -> None:
    if wishes.architecture is not None:
        raise ValueError(
            f"architecture is {wishes.architecture!r}, but a model of {library} is its own; leave "
            "--architecture out"
        )


def _refuse_stacked_colours(channels: int, file: Path) -> None:
    """A card has a stack of grey frames, or the colours of one."""
    if channels > 3 and channels % 3 == 0:
        raise ValueError(
            f"{file} is an agent of {channels} channels, {channels // 3} frames of colours: "
            "no card can say so; train one on a stack of grey frames or on one of colours"
        )


def _refuse_n_frames(wishes: Wishes) -> None:
    if wishes.n_frames is not None:
        raise ValueError(
            f"n_frames is {wishes.n_frames}, but only a model of timm or torchvision sees frames "
            "one after the other; leave --n-frames out"
        )


def _no_download(what: str, architecture: str, error: Exception) -> str:
    return (
        f"{what}: its weights can't be downloaded ({reason(error)}); get them as safetensors "
        f"otherwise and give --from-file FILE --architecture {architecture}"
    )
