"""CudaGraph: launches that are the same each time, replayed by one call."""

from collections.abc import Callable

import torch


class CudaGraph:
    """A call of launches on memory that stays where it is. The first run compiles kernels, the second one is captured,
    and from then on all are replayed. They go to `device`, whichever is the current one."""

    def __init__(self, launch: Callable[[], object], device: torch.device):
        self._launch, self._device = launch, device
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        with torch.cuda.device(self._device):
            if not self._is_warm:
                self._launch()
                self._is_warm = True
                return
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._launch()
                self._graph = graph
            self._graph.replay()
