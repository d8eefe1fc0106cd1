"""The whole forward pass, reduction included, as one CUDA graph: one launch instead of hundreds.

A block of a small batch keeps a GPU busy for less time than it takes Python to launch its kernels. All shapes of a
(reduced) model are static, so the kernels can be recorded once and replayed.

Source: "CUDA graphs" in PyTorch's notes on CUDA semantics; warm-up as in ``torch.cuda.make_graphed_callables``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.interface import missing_members

WARM_UP_CALLS = 3  # so that compilation, autotuning and the libraries' workspaces stay out of the recording


@dataclass(frozen=True)
class Recording:
    """A captured forward pass: ``graph`` computes ``logits`` from what is in ``images``, all at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor
    stream: torch.cuda.Stream | None  # it was captured on; captures that share memory have to share it
    held: object = None  # what else has to stay in memory for as long as the graph may read it

    def replay(self, images: Tensor) -> Tensor:
        """Logits of other images of the same shape, in a tensor of their own."""
        self.images.copy_(images)
        self.graph.replay()
        # The next replay, of this graph or of one that shares its memory, writes over them.
        return self.logits.clone()


class CompiledModel:
    """What ``compile`` returns; call it like the model. ``model`` is the model itself."""

    device_type = "cuda"

    def __init__(self, model: nn.Module, max_graphs: int = 32) -> None:
        if max_graphs < 2:  # an evicted graph leaves its memory to the others
            raise ValueError(f"expected max_graphs >= 2, got {max_graphs}")
        self.model = model
        self._max_graphs = max_graphs
        self._backbones: list[Any] = [module for module in model.modules() if not missing_members(module)]
        self._packing: list[Any] = [module for module in model.modules() if hasattr(module, "packed")]
        # All graphs are of the same weights: those in ``_held``, in the state ``_state``.
        self._graphs: dict[tuple[Any, Any], Recording] = {}
        self._state: list[tuple[int, int]] = []
        self._held: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to the model's logits (B, K), without gradients on a GPU."""
        if not isinstance(images, Tensor) or images.device.type != self.device_type:
            return self.model(images)
        # What is allocated here outlives the caller's inference mode, and would be read-only outside it.
        with torch.inference_mode(False), torch.no_grad():
            layout, key = self._key(images)
            recording = self._graphs.pop((layout, key), None)
            if recording is not None:
                self._graphs[layout, key] = recording  # the most recently used are at the end
                logits = recording.replay(images)
                if self._weights_state() == self._state:  # read while the device computes
                    return logits
            return self._record(images, layout, key).replay(images)

    def _record(self, images: Tensor, layout: Any, key: Any) -> Recording:
        """Capture a new graph, forgetting those of other weights and, beyond the maximum, the least recently used."""
        state = self._weights_state()
        if state != self._state:
            self._graphs.clear()
        while len(self._graphs) >= self._max_graphs:
            del self._graphs[next(iter(self._graphs))]
        same_layout = (other.images for (its_layout, _), other in self._graphs.items() if its_layout == layout)
        static = next(same_layout, None)
        static = torch.empty_like(images) if static is None else static
        static.copy_(images)
        recording = self.capture(static, next(iter(self._graphs.values()), None))
        # A module may keep what it has made of its weights, in an attribute, until it is called with another dtype.
        held = [dict(vars(module)) for module in self.model.modules()]
        recording = replace(recording, held=[*held, [module.packed.entry for module in self._packing]])
        # The warm-up may have repacked the weights, in which case the older graphs read what is no longer used.
        self._held = [tensor.detach() for tensor in self._weights()]
        self._state = self._weights_state()
        if self._state != state:
            self._graphs.clear()
        self._graphs[layout, key] = recording
        return recording

    def capture(self, images: Tensor, sibling: Recording | None) -> Recording:
        """Record ``model(images)``, in the memory of ``sibling`` if there is one.

        Sharing is safe since replays follow each other on one stream and what they return is copied at once.
        """
        graph = torch.cuda.CUDAGraph()
        # Weights that autocast has cast and cached would be freed at the end of its block, under the graph.
        autocast = torch.autocast(
            self.device_type,
            dtype=torch.get_autocast_dtype(self.device_type),
            enabled=torch.is_autocast_enabled(self.device_type),
            cache_enabled=False,
        )
        with torch.cuda.device(images.device), autocast:
            stream = torch.cuda.Stream() if sibling is None or sibling.stream is None else sibling.stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    self.model(images)
                # Not "global": a data loader's pinning thread may allocate while this one captures. A memory pool is
                # passed on from graph to graph: PyTorch refuses to revive one whose graphs are all gone.
                pool = None if sibling is None else sibling.graph.pool()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    logits = self.model(images)
            torch.cuda.current_stream().wait_stream(stream)
        return Recording(graph, images, logits, stream)

    def _key(self, images: Tensor) -> tuple[Any, Any]:
        """The layout of the images, and all else that decides which kernels run on them."""
        layout = (images.shape, images.stride(), images.dtype, images.device)
        schedule = [None if backbone.reduction is None else backbone.reduction.key for backbone in self._backbones]
        precision = (torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type))
        pooling = getattr(self.model, "global_pool", None)
        return layout, (*schedule, ops.selected_backend(), self.model.training, pooling, *precision)

    def _weights(self) -> list[Tensor]:
        """Parameters and buffers. ``nn.Module``'s own iterators take three times as long."""
        found: list[Tensor | None] = []
        modules: list[nn.Module | None] = [self.model]
        while modules:
            if (module := modules.pop()) is not None:
                found += module._parameters.values()
                found += module._buffers.values()
                modules += module._modules.values()
        return [tensor for tensor in found if tensor is not None]

    def _weights_state(self) -> list[tuple[int, int]]:
        """Address and version of every weight: the first tells a cast or a move (``_held`` keeps the old addresses
        taken), the second a change in place. Tensors made in inference mode have no version. Then the modules' own
        copies of their weights (kept by the recordings), which they drop where a change is to be expected."""
        copies = [(id(module.packed.entry), 0) for module in self._packing]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._weights()] + copies


def compile(model: nn.Module, max_graphs: int = 32) -> Callable[[Tensor], Tensor]:
    """Run a model's forward pass as a CUDA graph: ``fast = compile(model)``; ``fast(images)`` equals ``model(images)``.

    The first call for each shape, dtype and layout of the images warms up and captures, the next ones replay. It
    captures anew when a schedule not seen before is in force (``patch``, ``unpatch``, ``Reduction.use``), when another
    backend of the operations or autocast is on, and when weights change, in place or by a cast or move; then the old
    graphs are dropped. A replay costs no memory beside its logits: all graphs share one pool, and graphs of one
    layout the buffer their images are copied to.

    On any other device than a GPU it simply calls the model, so that the same program runs everywhere.

    Args:
        model: any module of one tensor to one tensor that never waits for the device; the library's models, patched
            or not. Its global switches (TF32, determinism) are those at the time of capture.
        max_graphs: how many graphs to keep, at least 2; beyond, the least recently used is dropped.

    Returns:
        The callable. On a GPU it computes no gradients, and is to be called from one thread and stream at a time.

    Raises:
        ValueError: ``max_graphs`` below 2.
        RuntimeError: from the first call, if the forward pass cannot be captured: it copies to the host, say.
    """
    return CompiledModel(model, max_graphs)
