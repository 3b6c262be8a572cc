"""The engine "graphed" without a GPU: its recorder keeps the work instead of capturing it."""

from collections.abc import Callable

import torch
from runtime_support import eager

from turbopi.engine.graphed import GraphedEngine, ReferenceFunctions, StageGraphs


class _Keeps:
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


class Captured(GraphedEngine):
    def __init__(self) -> None:
        model = eager().model
        self.model, self.precision, self.config = model, "fp32", model.config
        self.device = torch.device("cpu")
        self.graphs = self._graphs = StageGraphs(model, ReferenceFunctions(model), _Keeps())

    def synchronize(self) -> None:
        pass
