"""Evaluations of the network recorded once as a CUDA graph and replayed: no time on the host between its kernels.

Enters: a network that samples, and how to record. Leaves: a network of the same signature. Of each shape the first
evaluation is recorded on buffers of its own; later ones copy their inputs there, replay, and copy the output out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.models.autocast import autocast_dtype
from ldm.models.conditioning import Conditioning

WARMUPS = 2
"""Evaluations before a recording: libraries choose their kernels and allocate their workspaces in these."""
SHAPES = 4
"""Recordings that are kept, the latest: each holds all activations of its shape."""

Work = Callable[[], Tensor]


class Recorder(Protocol):
    """Records work on tensors that stay where they are."""

    def record(self, work: Work) -> tuple[Callable[[], object], Tensor]:
        """What repeats the work, and where it leaves its result."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: at most one of them is replayed at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> tuple[Callable[[], object], Tensor]:
        """As Recorder; raises RuntimeError where the work waits for the device, which a graph cannot."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        return graph.replay, result


@dataclass
class Recording:
    """One shape's buffers and how to repeat the work on them."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    result: Tensor
    weights: dict[str, Tensor]
    """Lowered copies that the recorded kernels read: they live as long as the recording."""
    told: Conditioning | None = None
    """What the buffers of the conditioning hold: prompts stay the same over a whole run."""


class Replayed(nn.Module):
    """A network whose evaluations without gradients are recordings; with gradients it is the network itself.

    The network must be a function of its inputs and parameters alone. Parameters that changed are noticed by `renew`,
    which `replayed` calls: between two of its calls they must stay.
    """

    def __init__(self, network: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        # Weak, as what a weak dictionary remembers of the network must not keep it alive.
        self._network = ref(network)
        self.recorder = recorder
        self.recordings: dict[tuple[Any, ...], Recording] = {}
        self._seen: tuple[tuple[int, int], ...] = ()
        self.renew()

    @property
    def network(self) -> nn.Module:
        network = self._network()
        if network is None:
            raise RuntimeError("the network that was recorded is gone")
        return network

    def renew(self) -> None:
        """Forgets what was recorded of parameters that have changed since, or lie elsewhere."""
        seen = tuple((p.data_ptr(), p._version) for p in self.network.parameters())
        if seen != self._seen:
            self.recordings.clear()
            self._seen = seen

    def parameters(self, recurse: bool = True) -> Any:
        """The network's."""
        return self.network.parameters(recurse)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As the network's."""
        if torch.is_grad_enabled():
            plain: Tensor = self.network(x, t, conditioning)
            return plain
        given = [x, t, *_parts(conditioning)]
        dtype = autocast_dtype(x.device)
        key = (dtype, *((part.shape, part.dtype, part.device) for part in given), _form(conditioning))
        recording = self.recordings.pop(key, None)
        if recording is None:
            if len(self.recordings) == SHAPES:
                del self.recordings[next(iter(self.recordings))]
            recording = self._record(x, t, conditioning, dtype)
        elif recording.told is conditioning:
            _copy(recording.inputs[:2], given[:2])
        else:
            _copy(recording.inputs, given)
        recording.told = conditioning
        self.recordings[key] = recording  # the latest is the last
        recording.replay()
        return recording.result.clone()  # the next replay writes over it

    def _record(self, x: Tensor, t: Tensor, conditioning: Conditioning, dtype: torch.dtype | None) -> Recording:
        own_x, own_t, own = x.clone(), t.clone(), conditioning.select(slice(None))._map(torch.clone)
        # Autocast would forget its lowered weights when it ends, and graphs would read what was freed.
        weights = {} if dtype is None else lowered(self.network, dtype)
        network = self.network
        replay, result = self.recorder.record(lambda: functional_call(network, weights, (own_x, own_t, own)))
        return Recording([own_x, own_t, *_parts(own)], replay, result, weights)


_REPLAYED: WeakKeyDictionary[nn.Module, Replayed] = WeakKeyDictionary()
"""What was recorded of a network, while it lives: recording costs as much as several evaluations."""


def replayed(network: nn.Module, recorder: Callable[[], Recorder] = CudaRecorder) -> Replayed:
    """The network as recordings, those of an earlier call where its parameters are still the same."""
    if network not in _REPLAYED:
        _REPLAYED[network] = Replayed(network, recorder())
    _REPLAYED[network].renew()
    return _REPLAYED[network]


def lowered(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the parameters that autocast would lower, those of linear layers and convolutions, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter.detach().to(dtype)
        for prefix, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for name, parameter in module.named_parameters(recurse=False)
    }


def _parts(conditioning: Conditioning) -> list[Tensor]:
    optional = [conditioning.pooled, conditioning.sizes]
    keys_values = [part for pair in conditioning.keys_values or () for part in pair]
    return [conditioning.text, *(part for part in optional if part is not None), *keys_values]


def _form(conditioning: Conditioning) -> tuple[bool, bool, int]:
    return conditioning.pooled is None, conditioning.sizes is None, len(conditioning.keys_values or ())


def _copy(into: list[Tensor], given: list[Tensor]) -> None:
    for own, part in zip(into, given, strict=True):
        own.copy_(part)
