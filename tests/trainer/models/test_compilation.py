"""How many graphs torch.compile makes of a model, and what makes it compile again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from siftclip.trainer.models.compilation import compile_towers
from siftclip.trainer.online.scoring import scoring_features
from siftclip.trainer.online.scoring_config import ScoringConfig

# Of torch's own compiler, which looks at activations
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SIZE, LENGTH = 32, 16
Compiled = Callable[..., tuple[nn.Module, list[int]]]


@pytest.fixture
def compiled() -> Iterator[Compiled]:
    """A compiled model, and the number of nodes of each graph that was made of it so far."""

    def make(**vision: Any) -> tuple[nn.Module, list[int]]:
        torch.manual_seed(0)
        of_image = {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
        of_text = {
            "context_length": LENGTH, "vocab_size": 512, "width": 64, "heads": 2, "layers": 2,
        }  # fmt: skip
        model = open_clip.CLIP(64, {**of_image, **vision}, of_text, output_dict=True).train()
        graphs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(len(graph.graph.nodes))
            return graph.forward

        compile_towers(model, backend=backend)  # type: ignore[arg-type]  # torch takes functions, too
        return model, graphs

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield make
    torch._dynamo.reset()


def samples(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, SIZE, SIZE), torch.randint(1, 511, (count, LENGTH))


def trained(model: nn.Module, count: int) -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        features = model(*samples(count))["image_features"]
    features.float().sum().backward()


def test_each_tower_is_one_graph(compiled: Compiled) -> None:
    model, graphs = compiled()
    for _ in range(3):
        trained(model, 8)
    assert len(graphs) == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_scoring_is_one_graph_more_for_each_tower(compiled: Compiled) -> None:
    """It is without gradients, in evaluation mode."""
    model, graphs = compiled()
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            scoring_features(model, *samples(8), ScoringConfig(), 0)
        trained(model, 8)
    assert len(graphs) == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_smaller_last_micro_batch_is_compiled_once(compiled: Compiled) -> None:
    model, graphs = compiled()
    for count in (8, 8, 5, 8, 3, 6):
        trained(model, count)
    assert len(graphs) == 4  # from the second size on, for any
