"""An agent as an ONNX graph: observations in, deterministic actions and their scores out."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from hubrl.exporting.outputs import check_policy, outputs
from hubrl.extractor import HubFeaturesExtractor
from hubrl.pathway import HubPathway

# Shape letters: B batch, O features out, C H W image.

BATCH = 100
#: Continuous actions agree up to this, relative to their size and in absolute terms.
ACTION_TOLERANCE = 1e-4


class DenseHub(nn.Module):
    """
    A hub's features with all encoders on all rows, and weights of zero outside the top k.

    The numbers are those of dispatch, whose sizes follow from the data, which no graph can.

    :param pathway: in evaluation mode; float32 whatever its ``precision`` says
    """

    def __init__(self, pathway: HubPathway) -> None:
        super().__init__()
        self.pathway = pathway
        self.encoders = nn.ModuleList(pathway.encoders)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, O), free of noise."""
        found = self.pathway.route(
            images_BCHW, None, dispatch=False, encode=lambda i, _: self.encoders[i](images_BCHW)
        )
        return found.features


class ActingGraph(nn.Module):
    """
    A policy's deterministic actions and scores, without dispatch.

    :param policy: in float32; it stays as it is
    :raises ValueError: if it is recurrent
    """

    def __init__(self, policy: BasePolicy) -> None:
        super().__init__()
        check_policy(policy)
        self.policy = copy.deepcopy(policy)
        self.policy.set_training_mode(False)
        _make_dense(self.policy)

    def forward(self, observations_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """
        Actions and scores, as in ``hubrl.exporting.outputs``.

        :param observations_BCHW: uint8
        """
        answer = outputs(self.policy, observations_BCHW)
        return answer.actions, answer.scores


class Acts(NamedTuple):
    """Deterministic actions for some observations, and the scores they follow from."""

    actions: NDArray[np.generic]
    scores: NDArray[np.float32]


def import_onnx() -> None:
    """
    :raises ValueError: if a package that the export needs is not installed
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise ValueError(f"ONNX needs {name}: pip install 'hubrl[export]'") from None


def write_graph(policy: BasePolicy, file: Path) -> None:
    """
    Write the policy's graph, whose batch may have any size.

    :param policy: on the CPU, in float32
    :param file: is written
    :raises ValueError: if the policy is recurrent
    """
    graph = ActingGraph(policy).eval()
    examples_BCHW = torch.zeros(2, *(policy.observation_space.shape or ()), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            (examples_BCHW,),
            dynamo=True,
            verbose=False,
            input_names=["observations"],
            output_names=["actions", "scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    program.save(file, external_data=False)


def acts_of_graph(file: Path, observations: NDArray[np.uint8]) -> Acts:
    """What onnxruntime makes of the graph on the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    parts = [
        session.run(["actions", "scores"], {"observations": batch})
        for batch in _batches(observations)
    ]
    return Acts(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def acts_of_policy(policy: BasePolicy, observations: NDArray[np.uint8]) -> Acts:
    """The same of the policy itself; its actions are those of SB3's ``predict``."""
    actions, scores = [], []
    for batch in _batches(observations):
        actions.append(policy.predict(batch, deterministic=True)[0])
        with torch.no_grad():
            tensor = torch.from_numpy(batch).to(policy.device)
            scores.append(outputs(policy, tensor).scores.float().cpu().numpy())
    return Acts(np.concatenate(actions), np.concatenate(scores))


def equal_actions(ours: Acts, theirs: Acts, space: spaces.Space[np.generic]) -> NDArray[np.bool_]:
    """For each observation whether the actions are equal; continuous ones up to a tolerance."""
    if isinstance(space, spaces.Box):
        tolerance = ACTION_TOLERANCE
        equal = np.isclose(ours.actions, theirs.actions, rtol=tolerance, atol=tolerance)
    else:
        equal = ours.actions == theirs.actions
    found: NDArray[np.bool_] = equal.reshape(len(equal), -1).all(axis=1)
    return found


def _make_dense(policy: BasePolicy) -> None:
    """Replace each features extractor of a hub, under all names that it has."""
    dense: dict[HubFeaturesExtractor, DenseHub] = {}
    for module in list(policy.modules()):
        for name, child in module._modules.items():
            if isinstance(child, HubFeaturesExtractor):
                dense.setdefault(child, DenseHub(child.pathway).eval())
                setattr(module, name, dense[child])


def _batches(observations: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [observations[i : i + BATCH] for i in range(0, len(observations), BATCH)]
