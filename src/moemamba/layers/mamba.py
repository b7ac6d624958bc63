"""The Mamba layer: a selective state-space model between two projections (arXiv 2312.00752, section 3.4, figure 3)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.arguments import autocasts
from ..ops.kit.packed import Weight
from ..ops.mamba_step import Inner
from ..ops.packing import without_padding
from .layer import Layer, Prepared, Result
from .linear import Linear, before_bias, beside, in_halves
from .norm import RMSNorm, norm_alone
from .placing import placed
from .plain import plain, weights_alone
from .roles import MATRIX, VECTOR, Role, composed

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..tensors import Stored


class MambaState(NamedTuple):
    """What a Mamba layer remembers of a sequence, whatever its length."""

    conv: Tensor
    """(b, i, k-1) last inputs of the convolution, oldest first"""
    ssm: Tensor
    """(b, i, n) float32"""

    def select(self, rows: "Tensor | list[int] | slice") -> "MambaState":
        """The state of some rows, in the order given; a row may be taken more than once."""
        return MambaState(*(tensor[rows] for tensor in self))

    def fork(self, copies: int) -> "MambaState":
        """Each row `copies` times, one after the other."""
        return MambaState(*(tensor.repeat_interleave(copies, dim=0) for tensor in self))

    def to(self, device: torch.device | str) -> "MambaState":
        """The state on another device."""
        return MambaState(*(tensor.to(device) for tensor in self))

    def detach(self) -> "MambaState":
        """The state cut off from the graph, for truncated back-propagation."""
        return MambaState(*(tensor.detach() for tensor in self))


class StepWeights(NamedTuple):
    """What `ops.mamba_step` reads of a layer, in its order."""

    in_proj: Weight
    """(2i, d), the gate's rows last"""
    conv_weight: Tensor
    """(i, k)"""
    conv_bias: Tensor
    """(i,)"""
    x_proj: Weight
    """(r + 2n, i), rows of dt, B and C"""
    dt_proj: Tensor
    """(i, r)"""
    dt_bias: Tensor
    """(i,)"""
    A_log: Tensor
    """(i, n)"""
    D: Tensor
    """(i,)"""
    out_proj: Weight
    """(d, i)"""
    inner: Inner | None = None
    """the norms of dt, B and C"""


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with SiLU; parameters shaped as in `nn.Conv1d(i, i, k, groups=i)`."""

    bias: Tensor | None

    def __init__(self, channels: int, width: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)
        bound = 1 / math.sqrt(width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (b, l, i), state (b, i, k-1) -> y (b, l, i), state."""
        return ops.causal_conv1d(x, self.weight.squeeze(1), self.bias, initial_state=state, seq_idx=seq_idx)


class SelectiveSSM(Layer):
    """The heart of a Mamba layer: convolution, input-dependent dt, B and C, and the scan; no projections in or out."""

    dt_norm: nn.Module
    B_norm: nn.Module
    C_norm: nn.Module
    state_type, state_kind = MambaState, "mamba"
    DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # initial step sizes (section 3.6)

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int,
        expand: float,
        dt_rank: int | None,
        inner_norm: str = "none",
        inner_norm_eps: float | None = None,
        conv_bias: bool = True,
    ):
        super().__init__()
        if inner_norm not in ("none", "rmsnorm", "weightless"):
            raise ValueError(f'inner_norm is {inner_norm!r}; choose "none", "rmsnorm" or "weightless"')
        self.d_inner = int(expand * d_model)
        self.d_state = d_state
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, conv_bias)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))  # S4D-real
        self.D = nn.Parameter(torch.ones(self.d_inner))
        # softplus(dt_proj.bias) is log-uniform in [DT_MIN, DT_MAX]; the bias is its inverse softplus.
        dt = torch.exp(torch.empty(self.d_inner).uniform_(math.log(self.DT_MIN), math.log(self.DT_MAX)))
        dt = dt.clamp(min=self.DT_FLOOR)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.inner_norm, self.conv_bias = inner_norm, conv_bias
        if inner_norm != "none":
            for name, width in (("dt", self.dt_rank), ("B", d_state), ("C", d_state)):
                norm = RMSNorm(width, inner_norm_eps or 1e-5, elementwise_affine=inner_norm == "rmsnorm")
                self.add_module(f"{name}_norm", norm)

    def roles(self) -> dict[str, Role]:
        """dt is computed in float32; the convolution and the state-space model act on channels one by one."""
        return composed(self, "out_proj") | {
            "conv1d.weight": MATRIX._replace(muon=False, float32=True),
            "dt_proj.weight": MATRIX._replace(float32=True),
            "dt_proj.bias": VECTOR,
            "A_log": VECTOR,
            "D": VECTOR,
        }

    @classmethod
    def allocate(cls, rows: int, room: int, like: Any) -> MambaState:
        """Zeros that lie in memory as kernels leave states: those of the CPU by channel."""
        zeros = []
        for tensor in like:
            _, width, entries = tensor.shape
            if ops.choose("mamba_step", tensor) == "cpu":
                zeros.append(tensor.new_zeros(rows, entries, width).transpose(1, 2))
            else:
                zeros.append(tensor.new_zeros(rows, width, entries))
        return MambaState(*zeros)

    @classmethod
    def fit(cls, *stored: "Stored") -> bool:
        conv, ssm = stored
        shapes = len(conv.shape) == len(ssm.shape) == 3 and conv.shape[:2] == ssm.shape[:2]
        return shapes and conv.dtype.is_floating_point and ssm.dtype.is_floating_point

    def initial_state(
        self, rows: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """The state before any token, all zeros, of `rows` sequences: to begin with one of your own, or a learned one.

        Args:
            device, dtype: of `conv`, as the layer's weights if None; `ssm` is float32, or float64 as they are.
        """
        weight = self.conv1d.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(rows, self.d_inner, weight.shape[-1] - 1, device=device, dtype=dtype)
        return MambaState(conv, torch.zeros(rows, self.d_inner, self.d_state, device=device, dtype=wide))

    def scan(self, u: Tensor, z: Tensor, state: MambaState | None, seq_idx: Tensor | None) -> tuple[Tensor, MambaState]:
        """u, gate z (b, l, i) -> y (b, l, i), state."""
        u, conv = self.conv1d(u, None if state is None else state.conv, seq_idx)
        u, x = beside(self.x_proj, u)
        dt, B, C = x.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.inner_norm != "none":
            dt, B, C = self.dt_norm(dt).to(x.dtype), self.B_norm(B).to(x.dtype), self.C_norm(C).to(x.dtype)
        dt, dt_bias = before_bias(self.dt_proj, dt)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        initial = None if state is None else state.ssm
        y, ssm = ops.selective_scan(u, dt, A, B, C, self.D, z, dt_bias, initial_state=initial, seq_idx=seq_idx)
        return y, MambaState(conv, ssm)


def options(config: "ModelConfig") -> dict[str, Any]:
    """The arguments of `SelectiveSSM` besides d_model."""
    return {
        "d_state": config.mamba.d_state,
        "d_conv": config.mamba.d_conv,
        "expand": config.mamba.expand,
        "dt_rank": config.mamba.dt_rank,
        "inner_norm": config.mamba.inner_norm,
        "inner_norm_eps": config.inner_norm_eps,
        "conv_bias": config.mamba.conv_bias,
    }


class Mamba(SelectiveSSM):
    """A Mamba layer.

    Args:
        d_model: width of input and output, d.
        d_state: state dimensions of each channel, n.
        d_conv: taps of the convolution, k.
        expand: d_inner = int(expand * d_model), i.
        dt_rank: rank of the step-size projection, r; ceil(d_model / 16) if None.
        inner_norm: of dt, B and C: "none", "rmsnorm" (with weights, as in Jamba) or "weightless" (as in Falcon-Mamba).
        inner_norm_eps: of these norms; 1e-5 if None.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the projections in and out have biases.
        device, dtype: of the parameters, as for torch's modules; what is read in float32 whatever the precision (dt, A,
            D, the convolution) stays float32 at least.

    Unlike mamba_ssm's it returns its state beside its output. Padding has the sequence number -1: `layers.padded` makes
    it from lengths, `layers.packed` puts sequences one behind the other.

    Parameters carry the names and shapes of mamba_ssm: in_proj (2i, d; the gate's rows last), conv1d (i, 1, k),
    x_proj (r + 2n, i), dt_proj (i, r), A_log (i, n), D (i,), out_proj (d, i). The norms are dt_norm (r,), B_norm and
    C_norm (n,).
    """

    __call__: Callable[..., tuple[Tensor, MambaState]]

    @placed
    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        inner_norm: str = "none",
        inner_norm_eps: float | None = None,
        conv_bias: bool = True,
        proj_bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(d_model, d_state, d_conv, expand, dt_rank, inner_norm, inner_norm_eps, conv_bias)
        self.proj_bias = proj_bias
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=proj_bias)
        self.out_proj = Linear(self.d_inner, d_model, bias=proj_bias)

    @classmethod
    def build(cls, config: "ModelConfig") -> Self:
        """The layer of a model."""
        return cls(config.d_model, **options(config), proj_bias=config.mamba.proj_bias)

    @classmethod
    def call(
        cls, layer: Any, x: Tensor, state: Any = None, seq_idx: Tensor | None = None, record: Any = None
    ) -> Result:
        return *layer(x, state, seq_idx), ()

    def forward(
        self, x: Tensor, state: MambaState | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """x (b, l, d), seq_idx (b, l) -> y (b, l, d), and the state that continues it; zero output at padding."""
        # On a GPU the step is fused where it is captured (`step_with_norm`): alone, launching it takes the time.
        if state is not None and seq_idx is None and x.shape[1] == 1 and x.device.type == "cpu":
            weights = self.weights_of_step(x)
            if weights is not None:
                y, *after = ops.mamba_step(x, state.conv, state.ssm, *weights)
                return y, MambaState(*after)
        if not self.padding_is_zero:
            x = without_padding(x, seq_idx)
        u, z = in_halves(self.in_proj, x)
        y, state = self.scan(u, z, state, seq_idx)
        return self.out_proj(y), state

    def step(self, x: Tensor, buffers: Any, live: int, place: Tensor) -> Tensor:
        """In place where there is a kernel for it."""
        weights = self.weights_of_step(x) if x.device.type == "cpu" else None
        if weights is None:
            return super().step(x, buffers, live, place)
        conv, ssm = (buffer[:live] for buffer in buffers)
        return ops.mamba_step(x, conv, ssm, *weights, in_place=True)[0]

    def prepare(self, buffers: Any, x: Tensor, y: Tensor) -> Prepared:
        weights = self.weights_of_step(x[:, None])
        step = None if weights is None else ops.prepare_mamba_step(x, buffers.conv, buffers.ssm, weights, y)
        if step is None:
            return super().prepare(buffers, x, y)
        return lambda live, room, place: step(live)

    def step_with_norm(self, x: Tensor, norm: nn.Module, buffers: Any, live: int, place: Tensor) -> Tensor | None:
        if ops.choose("mamba_step", x) == "cpu":
            return None  # its kernel is that of the layer alone, which `forward` calls
        weights, normed = self.weights_of_step(x), norm_alone(norm, x)
        if weights is None or normed is None:
            return None
        weight, bias, eps = normed
        conv, ssm = (buffer[:live] for buffer in buffers)
        return ops.mamba_step(x, conv, ssm, *weights, weight, bias, eps=eps, in_place=True)[0]

    def weights_of_step(self, x: Tensor) -> StepWeights | None:
        """What `ops.mamba_step` reads for an x (b, 1, d), where it may take the place of calling the children.

        That is where they are what they were built as, no gradient is wanted, and there are kernels for it.
        """
        if torch.is_grad_enabled() or autocasts(x.device.type) or not plain(self, Mamba):
            return None
        if self.why_not_fused():
            return None
        weights = self._step_weights()
        return weights if weights and ops.fuses_mamba_step(x, *weights) else None

    def why_not_fused(self) -> str | None:
        """Which option the kernels of a whole step know nothing of; None if they know all of this layer's."""
        if not self.conv_bias:
            return "conv_bias = False: the kernel of a step adds a bias"
        if self.proj_bias:
            return "proj_bias = True: the kernel of a step adds no biases to its projections"
        return None

    def _step_weights(self) -> StepWeights | None:
        """All weights; None where calling the children may do more than `ops.mamba_step` does."""
        in_proj = weights_alone(self.in_proj, Linear, 1)
        conv1d = weights_alone(self.conv1d, CausalConv1d, 2)
        x_proj = weights_alone(self.x_proj, Linear, 1)
        dt_proj = weights_alone(self.dt_proj, Linear, 2)
        out_proj = weights_alone(self.out_proj, Linear, 1)
        inner = self._inner_norms()
        if not (in_proj and conv1d and x_proj and dt_proj and out_proj and inner is not False):
            return None
        taps, shift = conv1d
        assert isinstance(taps, Tensor)
        inside = (*x_proj, *dt_proj, self.A_log, self.D)
        return StepWeights._make((*in_proj, taps.squeeze(1), shift, *inside, *out_proj, inner))

    def _inner_norms(self) -> Inner | Literal[False] | None:
        """The norms of dt, B and C; False where calling them may do more than a norm does."""
        if self.inner_norm == "none":
            return None
        norms = (self.dt_norm, self.B_norm, self.C_norm)
        if not all(plain(norm, RMSNorm) for norm in norms):
            return False
        return Inner._make((*(norm._parameters["weight"] for norm in norms), self.dt_norm.eps))
