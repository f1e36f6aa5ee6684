"""Attention of queries to keys and values, with several backends that compute the same.

Enters: q, k, v of shape (B, heads, N, d) and a backend's name. Leaves: the attended values, (B, heads, N, d).
torch's own function is "sdpa", which picks a kernel for each shape; "cudnn", "flash" and "efficient" are that function
with one kernel put first, wherever it takes the shape.
`select_backend` names a backend that has run forward and backward, with right values, on the device at hand.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH_KERNELS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

CPU_VECTOR = 16
"""Numbers in a register of the CPU: the rest of a row of scores is computed one by one."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    if q.dtype != torch.bfloat16:
        return _on_cpu(q, k, v)
    # The CPU's bfloat16 kernel takes 19 times as long as its float32 one on heads of 32: a quarter of a small
    # network's training step.
    with torch.autocast("cpu", enabled=False):  # which would cast back
        return _on_cpu(q.float(), k.float(), v.float()).to(q.dtype)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fills 77 keys up to 80, which nothing attends to: the CPU's kernel is then twice as fast, its gradient 1.3."""
    keys = k.shape[2]
    missing = -keys % CPU_VECTOR
    if not missing or keys < CPU_VECTOR or q.shape[2] < CPU_VECTOR:
        return F.scaled_dot_product_attention(q, k, v)
    mask = torch.zeros(keys + missing, dtype=q.dtype)
    mask[keys:] = -torch.inf
    k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(*q.shape[:3], -1))


def _first(kernel: SDPBackend) -> Kernel:
    """torch's function with one of its kernels before all others."""
    order = [kernel, *(other for other in (*TORCH_KERNELS.values(), SDPBackend.MATH) if other != kernel)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # an optional dependency, and seconds to import

    # xformers keeps heads next to the features, (B, N, heads, d): the order in which the projections leave
    # them, so that these transposes move no data.
    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


BACKENDS: dict[str, Kernel] = {
    "sdpa": _sdpa,
    "xformers": _xformers,
    **{name: _first(kernel) for name, kernel in TORCH_KERNELS.items()},
}


def tried_by_auto(device: torch.device) -> list[str]:
    """The order in which "auto" tries backends: cuDNN's kernel first on Hopper and later, then torch's own choice.

    The order is fixed and nothing is timed, so that equal machines compute alike.
    """
    cudnn_first = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return ["cudnn"] * cudnn_first + [name for name in BACKENDS if name not in TORCH_KERNELS]


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, without mask (Vaswani et al. 2017, equation 1).

    Args:
        q: (B, heads, N, d). k, v: (B, heads, M, d), of q's dtype.
        backend: a name of `BACKENDS`, best one that `select_backend` returned.
    """
    return BACKENDS[backend](q, k, v)


def select_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Returns a backend that works, as shown by a forward and backward pass compared with the plain formula.

    `is_available()` of a library says that it imports, not that it has a kernel for this device and dtype.

    Args:
        name: "auto", which takes the first of `tried_by_auto` that works, or one of `BACKENDS`.
        dtype: that of the queries; under autocast the autocast dtype.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: it does not work here; the message has the cause.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend: found {name!r}, expected auto, {', '.join(BACKENDS)}")
    device = torch.device(device)
    failures: list[str] = []
    for candidate in tried_by_auto(device) if name == "auto" else (name,):
        failure = _trial(candidate, device, dtype)
        if failure is None:
            return candidate
        failures.append(f"{candidate}: {failure}")
    advice = "" if name == "auto" else "; use auto or sdpa"
    raise RuntimeError(
        f"attention backend {name!r} does not work on {device} in {dtype}{advice}\n" + "\n".join(failures)
    )


def _trial(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs a backend in small; None when it works, else the cause."""
    # 40 features a head and 77 keys are SD 1.x's cross-attention: the least convenient shape that training
    # will ask for.
    count = torch.arange(2 * 2 * 77 * 40, dtype=torch.float64, device=device).view(2, 2, 77, 40)
    q, k, v, upstream = (torch.sin(count * step).to(dtype) for step in (0.7, 1.1, 1.3, 1.7))
    q, upstream = q[:, :, :64], upstream[:, :, :64]
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found = _with_gradients(_alone(backend), (q, k, v), upstream)
            expected = _with_gradients(_formula, (q.double(), k.double(), v.double()), upstream.double())
    except Exception as error:  # whatever a library raises here says that it cannot be used
        return f"{type(error).__name__}: {error}"
    # bfloat16 gradients are off by 0.03; TF32 may be on in float32. A wrong kernel is off by far more.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype, 0.1)
    for what, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), found, expected, strict=True):
        deviation = float((a.double() - b).norm() / b.norm())
        if not deviation <= tolerance:  # also when it is not a number
            return f"wrong values: the {what} is {deviation:.2g} relative off the formula (limit {tolerance})"
    return None


def _alone(backend: str) -> Kernel:
    """A backend without the kernels that would step in for it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend not in TORCH_KERNELS:
            return attention(q, k, v, backend)
        with sdpa_kernel(TORCH_KERNELS[backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def _with_gradients(kernel: Kernel, inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = kernel(leaves[0], leaves[1], leaves[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
