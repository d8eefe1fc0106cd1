"""Run the whole forward pass, reduction included, as one CUDA graph: one launch instead of hundreds.

For small batches, launching the kernels of a block from Python takes longer than running them. All shapes of a
(reduced) model are static, so the kernels can be recorded once and replayed.

Source: "CUDA graphs" in PyTorch's notes on CUDA semantics; warm-up as in ``torch.cuda.make_graphed_callables``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.backbones.foreign import stand_in
from mtr_lab.backbones.interface import missing_members

WARM_UP_CALLS = 3  # compile, autotune and allocate workspaces before the recording


@dataclass(frozen=True)
class Recording:
    """A captured forward pass: ``graph`` computes ``logits`` from ``images``, both at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor
    stream: torch.cuda.Stream | None  # of the capture; graphs that share memory have to share it
    kept_alive: object = None  # other objects whose memory the graph reads

    def replay(self, images: Tensor) -> Tensor:
        """The logits of other images of the same shape, in a new tensor."""
        self.images.copy_(images)
        self.graph.replay()
        # The next replay, of this graph or of one that shares its memory, overwrites them.
        return self.logits.clone()


class CompiledModel:
    """The callable that ``compile`` returns. ``model`` is the model."""

    device_type = "cuda"

    def __init__(self, model: nn.Module, max_graphs: int = 32) -> None:
        if max_graphs < 2:  # evicting the only graph would free the shared memory pool
            raise ValueError(f"expected max_graphs >= 2, got {max_graphs}")
        self.model = model
        self._max_graphs = max_graphs
        self._watch()
        # All graphs read the same weights, ``_graph_weights``, in the state ``_state``.
        self._graphs: dict[tuple[Any, Any], Recording] = {}
        self._state: list[tuple[int, int]] = []
        self._graph_weights: list[Tensor] = []

    def _watch(self) -> None:
        """Look up the modules that decide about graphs; that in a patched object's place is not a submodule of it."""
        self._stand_in = stand_in(self.model)
        self._modules = list(self.model.modules())
        self._modules += [] if self._stand_in is None else list(self._stand_in.modules())
        self._backbones: list[Any] = [module for module in self._modules if not missing_members(module)]
        self._packing: list[Any] = [module for module in self._modules if hasattr(module, "packed")]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, K), on a GPU without gradients."""
        if not isinstance(images, Tensor) or images.device.type != self.device_type:
            return self.model(images)
        if stand_in(self.model) is not self._stand_in:  # an object was patched or unpatched
            self._graphs.clear()
            self._watch()
        # Tensors allocated here outlive the caller's inference mode, and inference tensors are read-only outside it.
        with torch.inference_mode(False), torch.no_grad():
            layout, key = self._key(images)
            recording = self._graphs.pop((layout, key), None)
            if recording is not None:
                self._graphs[layout, key] = recording  # move it to the end, to the most recently used
                logits = recording.replay(images)
                if self._weights_state() == self._state:  # read while the device computes
                    return logits
            return self._record(images, layout, key).replay(images)

    def _record(self, images: Tensor, layout: Any, key: Any) -> Recording:
        """Capture a new graph; drop the graphs of other weights and, beyond the maximum, the least recently used."""
        state = self._weights_state()
        if state != self._state:
            self._graphs.clear()
        while len(self._graphs) >= self._max_graphs:
            del self._graphs[next(iter(self._graphs))]
        same_layout = (other.images for (other_layout, _), other in self._graphs.items() if other_layout == layout)
        static = next(same_layout, None)
        static = torch.empty_like(images) if static is None else static
        static.copy_(images)
        recording = self.capture(static, next(iter(self._graphs.values()), None))
        # A module may cache a transformed copy of its weights in an attribute, and replace it when called with another
        # dtype. The graph reads the copy of this capture.
        attributes = [dict(vars(module)) for module in self._modules]
        recording = replace(recording, kept_alive=[*attributes, [module.packed.entry for module in self._packing]])
        # If the warm-up has repacked the weights, older graphs read outdated copies.
        self._graph_weights = [tensor.detach() for tensor in self._weights()]
        self._state = self._weights_state()
        if self._state != state:
            self._graphs.clear()
        self._graphs[layout, key] = recording
        return recording

    def capture(self, images: Tensor, sibling: Recording | None) -> Recording:
        """Record ``model(images)``, in the memory pool of ``sibling`` if given.

        Sharing is safe: replays follow each other on one stream, and their logits are copied at once.
        """
        graph = torch.cuda.CUDAGraph()
        # Without a cache: autocast frees its cached casts of the weights at the end of the block, before a replay.
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
                # Not "global": a data loader's pinning thread may allocate memory during the capture. The pool is taken
                # from another graph: PyTorch cannot reuse a pool after its last graph was freed.
                pool = None if sibling is None else sibling.graph.pool()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    logits = self.model(images)
            torch.cuda.current_stream().wait_stream(stream)
        return Recording(graph, images, logits, stream)

    def _key(self, images: Tensor) -> tuple[Any, Any]:
        """The memory layout of the images, and all other settings that decide which kernels run."""
        layout = (images.shape, images.stride(), images.dtype, images.device)
        schedule = [None if backbone.reduction is None else backbone.reduction.key for backbone in self._backbones]
        precision = (torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type))
        pooling = getattr(self.model, "global_pool", None)
        return layout, (*schedule, ops.selected_backend(), self.model.training, pooling, *precision)

    def _weights(self) -> list[Tensor]:
        """Parameters and buffers. ``nn.Module``'s own iterators take three times as long."""
        tensors: list[Tensor | None] = []
        modules: list[nn.Module | None] = [self.model]
        while modules:
            if (module := modules.pop()) is not None:
                tensors += module._parameters.values()
                tensors += module._buffers.values()
                modules += module._modules.values()
        return [tensor for tensor in tensors if tensor is not None]

    def _weights_state(self) -> list[tuple[int, int]]:
        """Address and version of each weight, and the identities of the modules' packed copies.

        A cast or a move changes the address (``_graph_weights`` keeps the old one in use), a change in place the
        version; tensors made in inference mode have none. Modules drop their packed copies if weights may have changed.
        """
        copies = [(id(module.packed.entry), 0) for module in self._packing]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._weights()] + copies


def compile(model: nn.Module, max_graphs: int = 32) -> Callable[[Tensor], Tensor]:
    """Run a model's forward pass as a CUDA graph: ``fast = compile(model)``; ``fast(images)`` equals ``model(images)``.

    The first call for each shape, dtype and memory layout of the images warms up and captures, later calls replay. A
    new schedule (``patch``, ``unpatch``, ``Reduction.use``), another backend of the operations and another autocast
    setting each get a graph. Changed weights (in place, cast or moved) drop all graphs. A replay needs memory for its
    logits alone: all graphs share one pool, and graphs of one layout share the buffer of the images.

    On any device but a CUDA GPU the callable simply calls the model, so that the same program runs everywhere.

    Args:
        model: a module from one tensor to one tensor that never waits for the device, such as the library's models,
            patched or not. Global switches (TF32, determinism) have their values at the time of capture.
        max_graphs: how many graphs to cache, at least 2; beyond, the least recently used is dropped.

    Returns:
        The callable. On a GPU it computes no gradients; call it from one thread and one stream at a time.

    Raises:
        ValueError: ``max_graphs`` below 2.
        RuntimeError: from the first call, if the forward pass cannot be captured, for example as it copies to the host.
    """
    return CompiledModel(model, max_graphs)
