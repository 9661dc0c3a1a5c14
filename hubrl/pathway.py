"""Hub-Pathway's core: top-k activation, dispatch, weights (torch only)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hubrl.aggregation import Contribution, Standardised, build_aggregator
from hubrl.encoder_list import BuildEncoders, EncoderList
from hubrl.encoders import Casts
from hubrl.generators import GENERATORS, GeneratorClass
from hubrl.losses import pathway_exploration_loss
from hubrl.precision import check_precision, resolve_precision
from hubrl.specs import HubSpec, closest, load_hub

# Shape letters: B batch, E encoders, M of them to choose from, K top k, D features of one encoder,
# O features out, C H W image, R rows of the batch that activate one encoder.


# Weight of what is chosen beside encoders that are always active. It makes their features, and
# with them each step of Adam on their weights, count less: choices that differ between images and
# between rollouts then don't disturb what the agent has learned from the encoders that stay.
CHOSEN_SCALE = 0.1
#: Share of the pathway probability above which one encoder leaves the hub unused.
COLLAPSE = 0.95

#: Of an encoder's card: what decides its features, besides the weights.
FACTS = (
    "architecture",
    "features_dim",
    "image_size",
    "channels",
    "mean",
    "std",
    "frames",
    "n_frames",
)

#: Encoders activated for each image, 1..E; ``auto``: 2, or 1 for a hub of one.
TopK = int | Literal["auto"]
#: Features (R, D) of encoder i for rows (R,) of the batch.
Encode = Callable[[int, Tensor], Tensor]


class PathwayOutput(NamedTuple):
    """What ``HubPathway`` returns."""

    features: Tensor
    """Aggregated features, (B, O) float32."""
    weights: Tensor
    """
    Pathway weights, (B, E): zero outside the top k.

    Those of the chosen encoders sum to 1 if more than one is chosen. Always active ones have
    weight 1 instead, and the weights of the ones chosen beside them are divided by 10.
    """
    activated: Tensor
    """Indices of the activated encoders, (B, K) int64, ascending."""
    probabilities: Tensor
    """Softmax of the scores over the encoders to choose from, (B, E): 0 for always active ones."""
    exploration_loss: Tensor
    """Unweighted pathway exploration loss of the batch, scalar; see ``hubrl.losses``."""


class HubPathway(nn.Module):
    """
    A hub of encoders of which each image activates the ``top_k`` that its pathway weights choose.

    An encoder runs, forward and backward, on just the rows that activate it. Method: Hub-Pathway
    (Shu et al., NeurIPS 2022, arXiv 2206.03726); what is ours is marked in the parts.

    Ours: encoders may be active for all images, and the generator chooses the others of the
    ``top_k``. They are what mixtures of experts call shared experts (DeepSeekMoE, Dai et al. 2024,
    arXiv 2401.06066): what every image needs is learned once, from every row.

    :param hub: a name, a folder, a YAML file or a ``HubSpec``
    :param top_k: encoders activated for each image, 1..E; ``"auto"``: 2, or 1 for a hub of one
    :param always_active: names of encoders that are among them for each image, fewer than
        ``top_k``; ``"auto"``: those of the hub's card, if they are fewer. A ``state_dict``
        remembers which, and a pathway with others refuses it
    :param generator: a key of ``hubrl.generators.GENERATORS``; ``uniform`` runs all encoders with
        equal weights
    :param image_shape: (C, H, W) of the images; default: what the first encoder's card says
    :param features_dim: length of the aggregated features, unless ``aggregation`` is a module
    :param aggregation: a key of ``hubrl.aggregation.AGGREGATIONS``; ``concat`` is the paper's, and
        ``"auto"`` takes ``sum``, which is cheaper, where the encoders' features have one length; or
        a module of your own that is called as those are
    :param standardise: bring each encoder's features to one scale before, see
        ``hubrl.aggregation.Standardised``; not with a module of your own, and not before training
        mode was left for the first time
    :param freeze: names of encoders whose weights don't learn, ``"all"``, or ``"chosen"`` for all
        that aren't always active
    :param freeze_layers: first layers of each encoder that don't learn
    :param pretrained: load the hub's weights; otherwise random ones
    :param precision: what encoders compute in: ``float32``, ``bfloat16``, or ``auto`` for the
        faster one on the device; generator and features are float32 in any case
    :param build_encoders: gives an ``EncoderList`` of another kind; default: all encoders in memory
    :raises ValueError: if the hub is unknown or damaged, ``top_k`` is outside 1..E, ``freeze``
        names an encoder that the hub lacks or is ``"chosen"`` where none is always active,
        ``always_active`` names one that the hub lacks or leaves none to choose,
        ``freeze_layers`` are all that an encoder has, or ``generator`` or ``aggregation`` is
        unknown or doesn't fit the rest
    """

    _is_always_E: Tensor
    _choices_M: Tensor

    def __init__(
        self,
        hub: str | Path | HubSpec,
        top_k: TopK = "auto",
        *,
        always_active: Collection[str] | str = "auto",
        generator: str = "small",
        image_shape: tuple[int, int, int] | None = None,
        features_dim: int = 512,
        aggregation: str | nn.Module = "auto",
        standardise: bool = False,
        freeze: Collection[str] | str = (),
        freeze_layers: int = 0,
        pretrained: bool = True,
        precision: str = "float32",
        build_encoders: BuildEncoders | None = None,
    ) -> None:
        super().__init__()
        self.hub = load_hub(hub, weights=pretrained)
        self.top_k = number_activated(top_k, self.hub)
        self.precision = check_precision(precision)
        first = self.hub.encoders[0]
        channels, *image_size = image_shape or (first.channels, *first.image_size)
        self.always_active = always_active_names(always_active, self.top_k, self.hub)
        is_always = [name in self.always_active for name in self.hub.encoder_names]
        choices = [i for i, is_fixed in enumerate(is_always) if not is_fixed]
        self.register_buffer("_is_always_E", torch.tensor(is_always), persistent=False)
        self.register_buffer("_choices_M", torch.tensor(choices), persistent=False)
        self.generator = _generator_class(generator, self.hub, len(self._choices_M), self.top_k)(
            channels, (image_size[0], image_size[1]), len(self._choices_M)
        )
        build = build_encoders or EncoderList
        frozen = frozen_names(freeze, self.always_active, self.hub)
        self.encoders = build(self.hub, frozen, pretrained)
        if freeze_layers:
            for encoder in self.encoders:
                encoder.freeze_first(freeze_layers)
        if isinstance(aggregation, str):
            features_dims = [spec.features_dim for spec in self.hub.encoders]
            aggregation = build_aggregator(aggregation, features_dims, features_dim)
            if standardise:
                aggregation = Standardised(aggregation, features_dims)
        self.aggregator = aggregation

    def forward(self, images_BCHW: Tensor, *, encode: Encode | None = None) -> PathwayOutput:
        """
        Route the images with fresh noise in training mode and without noise in evaluation mode.

        :param images_BCHW: uint8 in 0..255 or float in 0..1
        :param encode: as in ``route``
        """
        noise_BE = None
        if self.training:
            noise_BE = torch.randn(
                len(images_BCHW), len(self.hub.encoders), device=images_BCHW.device
            )
        return self.route(images_BCHW, noise_BE, encode=encode)

    def route(
        self,
        images_BCHW: Tensor,
        noise_BE: Tensor | None,
        activated_BK: Tensor | None = None,
        *,
        casts: Casts | None = None,
        encode: Encode | None = None,
        dispatch: bool = True,
    ) -> PathwayOutput:
        """
        Route the images with given noise and, if wished, a given activated set.

        :param images_BCHW: uint8 in 0..255 or float in 0..1
        :param noise_BE: standard normal numbers, or None for none; those of always active
            encoders are not used
        :param activated_BK: encoders to activate, the always active ones included, -1 where the
            scores shall choose; the weights over them follow from the scores in any case
        :param casts: cast weights, to be used and added to; only while no weight changes
        :param encode: gives an encoder's features of some rows; default: ``encode``, which runs it
        :param dispatch: run an encoder on the rows that activate it; else each on all rows, of
            which the others have weight 0 and give a gradient of 0: more work, but the same for
            every batch of a size, as a CUDA graph needs it
        """
        probabilities_BE = self._probabilities(images_BCHW, noise_BE)
        chosen_BK = self._top(probabilities_BE)
        if activated_BK is not None:
            chosen_BK = activated_BK.where(activated_BK >= 0, chosen_BK)
        weights_BE = self._weights(probabilities_BE, chosen_BK)
        features_BO = self.aggregate(
            images_BCHW, weights_BE, chosen_BK, casts=casts, encode=encode, dispatch=dispatch
        )
        loss = pathway_exploration_loss(probabilities_BE)
        return PathwayOutput(features_BO, weights_BE, chosen_BK, probabilities_BE, loss)

    def aggregate(
        self,
        images_BCHW: Tensor,
        weights_BE: Tensor,
        activated_BK: Tensor,
        *,
        casts: Casts | None = None,
        encode: Encode | None = None,
        dispatch: bool = True,
    ) -> Tensor:
        """
        Dispatch each encoder on the rows that activate it; aggregate their weighted features.

        :param images_BCHW: uint8 in 0..255 or float in 0..1
        :param weights_BE: pathway weights
        :param activated_BK: the encoders that run for each image
        :param casts: as in ``route``
        :param encode: as in ``route``
        :param dispatch: as in ``route``
        :return: (B, O) float32
        """
        if encode is None:

            def encode(i: int, rows_R: Tensor) -> Tensor:
                return self.encode(i, images_BCHW, rows_R, casts)

        if dispatch:
            rows = rows_of_encoders(activated_BK, len(self.encoders))
        else:
            # len would fix B for a traced graph.
            all_B = torch.arange(images_BCHW.shape[0], device=images_BCHW.device)
            rows = [all_B] * len(self.encoders)
        contributions = (
            Contribution(i, rows_R, encode(i, rows_R))
            for i, rows_R in enumerate(rows)
            if not dispatch or len(rows_R) > 0
        )
        features_BO: Tensor = self.aggregator(contributions, weights_BE, casts)
        return features_BO

    def encode(
        self, i: int, images_BCHW: Tensor, rows_R: Tensor, casts: Casts | None = None
    ) -> Tensor:
        """
        Run encoder i on some rows of the batch; (R, D) in the format of computation.

        :param i: index of the encoder
        :param images_BCHW: uint8 in 0..255 or float in 0..1
        :param rows_R: indices of the rows, ascending
        :param casts: as in ``route``
        """
        dtype = resolve_precision(self.precision, images_BCHW.device)
        encoder = self.encoders[i]
        if casts is not None:
            encoder = casts.encoder(i, encoder, dtype)
        if len(rows_R) < len(images_BCHW):
            images_BCHW = images_BCHW.index_select(0, rows_R)
        features_RD: Tensor = encoder(images_BCHW, dtype)
        return features_RD

    def collapsed_to(self, shares: Mapping[str, float]) -> str | None:
        """
        The encoder that has nearly all of the pathway probability, so that the hub is not used.

        :param shares: mean pathway probability of each encoder, 0..1, by name
        :return: None if it is spread, or if there is nothing to choose
        """
        top = max(shares, key=shares.__getitem__)
        n_choices = len(self.hub.encoders) - len(self.always_active)
        return top if shares[top] > COLLAPSE and n_choices > 1 else None

    def get_extra_state(self) -> Tensor:
        """For ``state_dict``: what the weights mean nothing without, as JSON in bytes, uint8."""
        text = json.dumps([list(self.always_active), self._encoder_facts()])
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """
        :raises ValueError: if the state was saved with other encoders, in another order or with
            others always active, or is damaged
        """
        if state.dtype == torch.bool:  # of an older version
            always = list(itertools.compress(self.hub.encoder_names, state.tolist()))
        else:
            always, saved = saved_facts(state)
            _check_facts(saved, self._encoder_facts())
        if always != list(self.always_active):
            raise ValueError(
                f"these weights were trained with always_active {always}, but this pathway has "
                f"{list(self.always_active)}: build it with theirs"
            )

    def _encoder_facts(self) -> dict[str, dict[str, Any]]:
        """By name, in order, what decides the features; of frozen ones the weights, too."""
        sha256 = self.encoders.shared_sha256()
        facts = {
            spec.name: {field: getattr(spec, field) for field in FACTS}
            | {"sha256": sha256[spec.name]}
            for spec in self.hub.encoders
        }
        found: dict[str, dict[str, Any]] = json.loads(json.dumps(facts))  # lists for tuples
        return found

    def _probabilities(self, images_BCHW: Tensor, noise_BE: Tensor | None) -> Tensor:
        shape = (images_BCHW.shape[0], len(self.encoders))  # not len, as in aggregate
        zero_BE = torch.zeros(shape, device=images_BCHW.device)
        if len(self._choices_M) == 1:  # nothing to choose
            return zero_BE.index_fill(1, self._choices_M, 1.0)
        noise_BM = None if noise_BE is None else noise_BE[:, self._choices_M]
        scores_BM: Tensor = self.generator(images_BCHW, noise_BM)
        return zero_BE.index_copy(1, self._choices_M, scores_BM.softmax(dim=1))

    def _top(self, probabilities_BE: Tensor) -> Tensor:
        """Indices of the always active encoders and of the most probable others, ascending."""
        ranks_BE = probabilities_BE.detach().masked_fill(self._is_always_E, 2.0)
        return ranks_BE.topk(self.top_k, dim=1).indices.sort(dim=1).values

    def _weights(self, probabilities_BE: Tensor, activated_BK: Tensor) -> Tensor:
        """Probabilities of the activated encoders, zero elsewhere."""
        kept_BK = probabilities_BE.gather(1, activated_BK)
        # Of one encoder a renormalised weight is always 1, and the task gives no gradient.
        if self.top_k - len(self.always_active) > 1:
            kept_BK = kept_BK / kept_BK.sum(dim=1, keepdim=True)
        if self.always_active:
            kept_BK = torch.where(self._is_always_E[activated_BK], 1.0, CHOSEN_SCALE * kept_BK)
        return torch.zeros_like(probabilities_BE).scatter(1, activated_BK, kept_BK)


def rows_of_encoders(activated_BK: Tensor, n_encoders: int) -> list[Tensor]:
    """For each encoder the rows that activate it, ascending, (R,) int64."""
    top_k = activated_BK.shape[1]
    by_encoder = activated_BK.flatten().argsort(stable=True)
    counts = activated_BK.flatten().bincount(minlength=n_encoders).tolist()
    return list(torch.split(by_encoder // top_k, counts))


def number_activated(top_k: TopK, hub: HubSpec) -> int:
    """
    How many encoders ``HubPathway`` activates for each image.

    :raises ValueError: if ``top_k`` is outside 1..E
    """
    n = len(hub.encoders)
    if top_k == "auto":
        return min(2, n)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= n:
        raise ValueError(
            f"top_k is {top_k!r}, allowed: 1..{n}, the number of encoders of hub {hub.name!r}, "
            "or 'auto'"
        )
    return top_k


def always_active_names(names: Collection[str] | str, top_k: int, hub: HubSpec) -> tuple[str, ...]:
    """
    The encoders that ``HubPathway`` keeps active, in the hub's order.

    :param names: of encoders, or ``"auto"`` for what the hub's card says, which is none where
        ``top_k`` would leave none to choose
    :raises ValueError: if the hub lacks one, or none would be left to choose
    """
    if names == "auto":
        names = hub.always_active if len(hub.always_active) < top_k else ()
    found = _names("always_active", names, hub)
    if len(found) >= top_k:
        raise ValueError(
            f"always_active is {', '.join(sorted(found))}, but top_k is {top_k}: at least one "
            "encoder must be left to choose; name fewer, or raise top_k"
        )
    return tuple(name for name in hub.encoder_names if name in found)


def frozen_names(
    freeze: Collection[str] | str, always_active: Collection[str], hub: HubSpec
) -> frozenset[str]:
    """
    The encoders that ``HubPathway`` keeps as they are.

    :param freeze: names, ``"all"``, or ``"chosen"`` for all that aren't always active
    :param always_active: names, as ``always_active_names`` gives them
    :raises ValueError: if the hub lacks one, or nothing is always active
    """
    if freeze == "all":
        return frozenset(hub.encoder_names)
    if freeze == "chosen":
        if not always_active:
            raise ValueError(
                f"freeze is 'chosen', but no encoder of hub {hub.name!r} is always active, so none "
                "would learn: name one in always_active, or give freeze='all'"
            )
        return frozenset(hub.encoder_names) - set(always_active)
    return _names("freeze", freeze, hub)


def saved_facts(state: Tensor) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """
    What ``get_extra_state`` gave.

    :raises ValueError: if it is anything else
    """
    try:
        always, saved = json.loads(bytes(state.tolist()))
        is_whole = isinstance(always, list) and all(isinstance(f, dict) for f in saved.values())
    except (ValueError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError("what these weights say of their encoders is damaged: put the file back")
    return always, saved


def _check_facts(saved: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    if list(saved) != list(found):
        raise ValueError(
            f"these weights were trained with the encoders {', '.join(saved)} in this order, but "
            f"the hub has {', '.join(found)}: give the hub that they were trained with"
        )
    for name, facts in saved.items():
        for field, value in facts.items():
            now = found[name].get(field)
            if now != value:
                raise ValueError(
                    f"these weights were trained with {field} {value} of encoder {name!r}, but it "
                    f"has {now} now: put its card and its file back, or train anew"
                )


def _generator_class(name: str, hub: HubSpec, n_choices: int, top_k: int) -> GeneratorClass:
    if name not in GENERATORS:
        raise ValueError(
            f"generator is {name!r}{closest(name, GENERATORS)}, allowed: {', '.join(GENERATORS)}"
        )
    n = len(hub.encoders)
    if name == "uniform" and (top_k, n_choices) != (n, n):
        raise ValueError(
            f"generator is 'uniform', which runs all encoders with equal weights: top_k must be "
            f"{n} and always_active empty"
        )
    return GENERATORS[name]


def _names(argument: str, names: Collection[str] | str, hub: HubSpec) -> frozenset[str]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Collection):
        raise ValueError(
            f"{argument} is {names!r}, allowed: a list of encoders' names, [] for none"
        )
    try:
        return frozenset(hub.only(name).encoders[0].name for name in names)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
