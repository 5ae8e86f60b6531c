"""The block that mixes a sequence with a structured matrix, and owns every parameter of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .matrices import Inputs, Placed, Projected, Settings, StructuredMatrix, matrix_class
from .ops import Documents, Layout, first_linear, last_linear, layout, per_document, rows
from .ops.backend import transforming
from .ops.semiseparable import IMPLEMENTATIONS
from .parameters import GatedNorm, Parameters, ShortConv, read

STATE_OPTIONS = {"dt_limit", "dt_min", "dt_max", "dt_init_floor", "A_init_range", "learnable_init_states"}
STATE_OPTIONS |= {"impl", "recompute", "tolerance"}
FLOAT32 = ("A_log", "dt_bias", "D")  # exponents and what feeds them: half precision would move decays by percents


class MatrixMixer(nn.Module):
    """y = out_proj(norm(M x) * SiLU(z)), with M a structured matrix: (B, L, d_model) in and out.

        in_proj:  z | x | the features of M that pass the convolution | those that do not
        conv1d:   centred, depthwise, over x and those features; then SiLU on x and on what M's class declares

    In the fixed form the features are learned tables of positions instead. `bare` drops z, the convolution, the
    activation of x, the norm and the identity: y = out_proj(M x), as in a Transformer.

    Args:
        matrix: a name in `hydra_ssm.MATRICES` or a StructuredMatrix class.
        d_state: order N of the class: state size, rank, or features of a query and a key.
        d_conv: width of the convolution, odd.
        max_length: longest sequence of the fixed form; some data-dependent classes scale by it.
        data_dependent: False for the fixed form; None takes the data-dependent one where the class has it.
        dt_limit, dt_min, dt_max, dt_init_floor, A_init_range, learnable_init_states: for classes with a state; so are
        impl, of the product and what goes with it, and recompute, for less memory and more time on a GPU.
        tolerance: relative error of the products of cauchy and vandermonde; None: 1e-5, in float64 1e-13.
    """

    def __init__(
        self,
        d_model: int,
        matrix: str | type[StructuredMatrix],
        *,
        data_dependent: bool | None = None,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        max_length: int = 512,
        bare: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **state_options: Any,
    ) -> None:
        super().__init__()
        self.matrix_class = matrix_class(matrix)
        self.data_dependent = _form(self.matrix_class, data_dependent)
        self.d_model, self.d_inner, self.bare = d_model, int(expand * d_model), bare
        _check_sizes(d_model, self.d_inner, headdim, ngroups, d_state, d_conv, max_length)
        if unknown := state_options.keys() - STATE_OPTIONS:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        if (impl := state_options.get("impl")) not in (None, *IMPLEMENTATIONS):
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        if (tolerance := state_options.get("tolerance")) is not None and not 1e-15 <= tolerance <= 0.1:
            raise ValueError(f"tolerance must be between 1e-15 and 0.1, got {tolerance}")
        self.settings = Settings(self.d_inner // headdim, headdim, d_state, ngroups, max_length, **state_options)
        features = self.matrix_class.features(self.settings)
        self.features = tuple(sorted(features, key=lambda f: not f.conv))  # stable: convolved ones first
        computed = self.features if self.data_dependent else ()
        wet = [(not bare, self.d_inner), *((f.activation, f.size) for f in computed if f.conv)]
        # Neighbours that are both activated are so in one go: (activated, sizes); in the convolution if all are.
        self.runs = [(on, [size for _, size in run]) for on, run in groupby(wet, key=lambda part: part[0])]
        self.all_activated = all(on for on, _ in self.runs)
        convolved = sum(size for _, size in wet)
        self.split = [0 if bare else self.d_inner, convolved, sum(f.size for f in computed if not f.conv)]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=bias, **factory)
        if not bare:
            self.conv1d = ShortConv(
                convolved, convolved, d_conv, groups=convolved, padding=d_conv // 2, bias=conv_bias, **factory
            )
            self.norm = GatedNorm(torch.ones(self.d_inner, **factory), norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self._add_parameters(factory)

    def _add_parameters(self, factory: dict[str, Any]) -> None:
        """What the class learns: its own parameters, and in the fixed form a table for each feature."""
        with torch.device(factory["device"] or torch.get_default_device()):
            own = self.matrix_class.parameters(self.settings)
            tables = () if self.data_dependent else tuple(f for f in self.features if f.learned)
            own |= {f"tables.{f.name}": torch.randn(self.settings.max_length, *f.shape) for f in tables}
        self.own = tuple(own)
        for name, value in own.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, Parameters())
                module = getattr(module, part)
            dtype = factory["dtype"] or value.dtype  # what a default of torch made is in that default
            keep = leaf in FLOAT32 and dtype in (torch.float16, torch.bfloat16)
            parameter = nn.Parameter(value.to(torch.float32 if keep else dtype))
            module.register_parameter(leaf, parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor does; for a module that was made on the meta device."""
        for parameter, value in self.drawn():
            parameter.copy_(value)
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    def drawn(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter that is of no torch layer, and a new value for it."""
        drawn = self.matrix_class.parameters(self.settings)
        for name in self.own:
            parameter = self.get_parameter(name)
            yield parameter, drawn[name] if name in drawn else torch.randn_like(parameter)
        if not self.bare:
            yield self.norm.weight, torch.ones_like(self.norm.weight)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would move towards no meaning: log-decays, steps, skips."""
        return {name for name in self.own if name in FLOAT32}

    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        documents: Documents | None = None,
    ) -> Tensor:
        """Mix u (B, L, d_model) along L.

        Args:
            mask: (B, L) bool, True for tokens, at any place. Padding has no influence and comes out as zero.
            cu_seqlens: (documents + 1,) offsets of documents packed in one row, B = 1. None reads another.
            documents: instead of both, where u is already in one of the forms of `Documents`, as a stack keeps it.
        """
        self._check(u, mask, cu_seqlens, documents)
        return per_document(self._mix, u, mask, cu_seqlens) if documents is None else self._mix(u, documents)

    def matrix(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        documents: Documents | None = None,
    ) -> StructuredMatrix:
        """The matrix that `forward` mixes u with: `.dense()` is (B, H, L, L), differentiable. Arguments as there."""
        self._check(u, mask, cu_seqlens, documents)
        place = layout((u.shape[0], u.shape[1]), mask, cu_seqlens)
        if place is None:
            packed = documents if documents is not None and documents.cu_seqlens is not None else None
            if packed is not None and not (transforming() or u.isfinite().all()):
                own = tuple(rows(packed))  # products of zero do not stop NaN: each document by itself
                return Placed(None, tuple(self.matrix(one.take(u), documents=one.documents) for one in own), own)
            return self._matrix(self._inputs(self.in_proj(u), documents)[1])
        return Placed(None, (self.matrix(place.take(u), documents=place.documents),), (place,))

    def _check(self, u: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, documents: Documents | None) -> None:
        check_input(u, self.d_model)
        if documents is not None and not (mask is None and cu_seqlens is None):
            raise ValueError("documents must come without mask and cu_seqlens: they say the same")

    def _mix(self, u: Tensor, documents: Documents | None) -> Tensor:
        projected = self._through(self.in_proj, first_linear, u)
        block = self._block(projected, documents)
        fused = None if block is None else self.matrix_class.fused(block)
        if fused is not None:
            # Nobody else holds what comes out of it, and nobody sees its gradient where no hook waits for it.
            return self._through(self.out_proj, last_linear, fused)
        z, inputs = self._inputs(projected, documents)
        y = self._matrix(inputs) @ inputs.x
        if not self.bare:
            y = y + inputs.x if self.matrix_class.skip else y
            return self.out_proj(self.norm(y.flatten(2), z, self._layer_impl))
        return self.out_proj(y.flatten(2))

    @staticmethod
    def _through(module: nn.Linear, function: Callable[[Tensor, Tensor, Tensor | None], Tensor], u: Tensor) -> Tensor:
        """module(u), by the function where it is a plain linear map without hooks that has gradients."""
        hooks = module._backward_hooks or module._backward_pre_hooks or nn.modules.module._has_any_global_hook()
        if hooks or not (_as_made(module, nn.Linear) and torch.is_grad_enabled()):
            y: Tensor = module(u)
            return y
        return function(u, module.weight, module.bias)

    def _matrix(self, inputs: Inputs) -> StructuredMatrix:
        """The class's matrix; one for each document where it cannot take many in a row, or rows this long."""
        documents, longest = inputs.documents, inputs.x.shape[1]
        too_long = not self.data_dependent and longest > self.settings.max_length
        if documents is not None and too_long:
            longest = max(documents.lengths)
        if not self.data_dependent and longest > self.settings.max_length:
            raise ValueError(
                f"this fixed mixer was made for lengths up to max_length = {self.settings.max_length}, got {longest}"
            )
        if documents is None or not (too_long or documents.packed) or (documents.packed and self.matrix_class.packs):
            return self.matrix_class.build(inputs)
        layouts = tuple(rows(documents))
        return Placed(None, tuple(self.matrix_class.build(_taken(inputs, layout)) for layout in layouts), layouts)

    @property
    def _layer_impl(self) -> str | None:
        """Of the convolution and the norm: kernels where the product is to be one, the eager forms beside another."""
        impl = self.settings.impl
        return impl if impl in (None, "triton") else "eager"

    def _block(self, projected: Tensor, documents: Documents | None) -> Projected | None:
        """What kernels for all of the block take; None where a part is to be called, or is not there."""
        if self.bare or not self.data_dependent:
            return None
        conv, norm = self.conv1d, self.norm
        if not (_as_made(conv, ShortConv) and _as_made(norm, GatedNorm)):
            return None
        parameters = {name: read(self, name) for name in self.own}
        private = _as_made(self.in_proj, nn.Linear) and not nn.modules.module._global_forward_hooks
        return Projected(
            projected, conv.weight, conv.bias, norm.weight, norm.eps, parameters, self.settings, documents, private
        )

    def _inputs(self, projected: Tensor, documents: Documents | None) -> tuple[Tensor, Inputs]:
        """The gate z and all that the matrix is built from."""
        z, convolved, rest = projected.split(self.split, dim=-1)
        if not self.bare:
            convolved = self.conv1d(convolved, documents, self.all_activated, self._layer_impl)
        computed = [f for f in self.features if self.data_dependent]
        parts: list[Tensor] = []
        for (activated, sizes), run in zip(
            self.runs, convolved.split([sum(sizes) for _, sizes in self.runs], dim=-1), strict=True
        ):
            parts += (F.silu(run) if activated and not self.all_activated else run).split(sizes, dim=-1)
        dry = [f.size for f in computed if not f.conv]
        parts += rest.split(dry, dim=-1) if dry else ()  # a split into nothing is no operation that can be saved
        x = parts[0].unflatten(-1, (self.settings.nheads, self.settings.headdim))
        features = {f.name: t.unflatten(-1, f.shape) for f, t in zip(computed, parts[1:], strict=True)}
        parameters = {name: read(self, name) for name in self.own}
        if not self.data_dependent:
            features = self._tables(x, parameters, documents)
        return z, Inputs(x, features, parameters, self.settings, documents)

    def _tables(self, x: Tensor, parameters: Mapping[str, Tensor], documents: Documents | None) -> dict[str, Tensor]:
        """The features of the fixed form, by position in the document."""
        features = {}
        place = None if documents is None or not documents.packed else documents.positions
        if x.shape[1] > self.settings.max_length:  # what is longer is padding, or refused when the matrix is made
            place = torch.arange(x.shape[1], device=x.device) if place is None else place
            place = place.clamp(max=self.settings.max_length - 1).expand(x.shape[0], -1)
        for f in self.features:
            if not f.learned:
                features[f.name] = x.new_zeros(1, 1, *f.shape).expand(*x.shape[:2], *f.shape)
                continue
            table = parameters[f"tables.{f.name}"].to(x.dtype)
            if place is not None:
                features[f.name] = table[place]
            else:
                features[f.name] = table[: x.shape[1]].expand(x.shape[0], -1, *f.shape)
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MatrixMixer:
        kept = {name: p.detach() for name, p in self.named_parameters(recurse=False) if name in FLOAT32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = before.to(parameter.device, torch.float32)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(torch.float32)
        return self

    def extra_repr(self) -> str:
        form = "data dependent" if self.data_dependent else f"fixed, up to {self.settings.max_length}"
        return f"{self.matrix_class.__name__}, {form}, {self.settings.nheads} heads"


class Hydra(MatrixMixer):
    """The quasiseparable mixer: reads both ways in linear time. Loads the weights of the released layer as they are.

    Options as in MatrixMixer; (B, L, d_model) in and out.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        **options: Any,
    ) -> None:
        sizes: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        super().__init__(d_model, "quasiseparable", **sizes, headdim=headdim, ngroups=ngroups, **options)


class SelfAttention(MatrixMixer):
    """The Transformer's multi-head self-attention: the bare block with the attention matrix, biases and all."""

    def __init__(self, d_model: int, headdim: int = 64, bias: bool = True, **factory: Any) -> None:
        super().__init__(
            d_model, "attention", d_state=headdim, headdim=headdim, expand=1, bare=True, bias=bias, **factory
        )


def _as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part may go unseen into an operation of several: no hook waits for it, and nothing took its place."""
    replaced = "forward" in vars(module)  # as accelerate's hooks do
    return type(module) is kind and not (replaced or module._forward_hooks or module._forward_pre_hooks)


def check_input(u: Tensor, d_model: int) -> None:
    """Raise ValueError or TypeError if u is not (B, L, d_model) of floating point numbers."""
    if u.ndim != 3 or u.shape[2] != d_model or 0 in u.shape:
        raise ValueError(f"u must be (batch, length, d_model = {d_model}), none of them 0, got {tuple(u.shape)}")
    if not u.is_floating_point():
        raise TypeError(f"u must be floating point, got {u.dtype}")


def _taken(inputs: Inputs, layout: Layout) -> Inputs:
    """What the matrices of a layout's rows are built from."""
    features = {name: layout.take(t) for name, t in inputs.features.items()}
    return replace(inputs, x=layout.take(inputs.x), features=features, documents=layout.documents)


def _form(matrix: type[StructuredMatrix], data_dependent: bool | None) -> bool:
    if data_dependent is None:
        return matrix.data_dependent
    if not (matrix.data_dependent if data_dependent else matrix.fixed):
        has, lacks = ("fixed", "data-dependent") if data_dependent else ("data-dependent", "fixed")
        raise ValueError(
            f"{matrix.__name__} has a {has} form alone, no {lacks} one, got data_dependent={data_dependent}"
        )
    return data_dependent


def _check_sizes(
    d_model: int, d_inner: int, headdim: int, ngroups: int, d_state: int, d_conv: int, max_length: int
) -> None:
    sizes = {"d_model": d_model, "headdim": headdim, "ngroups": ngroups, "d_state": d_state, "max_length": max_length}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if d_inner < 1 or d_inner % headdim:
        raise ValueError(f"headdim must divide expand * d_model = {d_inner}, got {headdim}")
    if (d_inner // headdim) % ngroups:
        raise ValueError(f"ngroups must divide the {d_inner // headdim} heads, got {ngroups}")
    if d_conv < 1 or d_conv % 2 == 0:
        raise ValueError(f"d_conv must be odd, so that the convolution has a centre, got {d_conv}")
