"""The layer as a Flax NNX module, with its router and its parameters: pip install '.[nnx]' from a clone.

    moe = MoE(64, 128, num_experts=8, top_k=2, rngs=nnx.Rngs(0))
    y = moe(x)                                                # [..., 64] to [..., 64]
    y, balance = nnx.capture(moe, LoadBalancingLoss)(x)       # and what the layer sows, where it is asked for

A layer sows its losses, without weights, and its counts, each as a variable type of its own, which `nnx.capture` takes.
It sows only inside `nnx.capture`; elsewhere losses and counts cost nothing. The layer may stand at any depth, also
inside `nnx.scan`, `nnx.remat` and `nnx.jit`. `optax.tree.sum(balance)` adds a loss over the layers.
"""

import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("ferrum_jax.nnx needs flax: pip install '.[nnx]' from a clone") from error

from ..core.settings import as_bool, as_int, one_of
from ..core.types import MoESharding, RouterOutput
from ..kernels import IMPLEMENTATIONS
from ..ops.grouped import as_precision
from ..ops.losses import NORMALIZATIONS, expert_counts, load_balancing_loss, router_z_loss, update_routing_bias
from ..ops.routing import route_topk
from ..ops.scoring import checked_settings as checked_routing
from .arguments import checked_exchange, checked_settings, preset_of
from .axes import as_dtype, shape_of
from .layer import moe_mlp
from .layouts import AXES, MoEParams
from .nnx_parameters import HALVES, attributes_of, load_params, params_of, quantize_experts
from .nnx_variables import DroppedPairs, ExpertCounts, LoadBalancingLoss, RouterZLoss, ScoreBias
from .parameters import Initializer, halves, matrices
from .presets import Preset
from .shared import product, shared_mlp

_BY_FAN_IN = jax.nn.initializers.lecun_normal()

_PARTITIONED = ("E", "H", "F")
_ROUTER = ("router", "router_bias", "score_bias")  # whole along E on every device: the choice is among all experts
_BIASES = ("router_bias", "score_bias", "b_gate_up", "b_down")


class MoE(nnx.Module):
    """A Mixture-of-Experts layer: a router, `num_experts` gated MLPs, and perhaps an MLP that serves every token.

    A `Preset` says what the layer does: one of `ferrum_jax.presets`, or settings by name. If both are given, a setting
    replaces the preset's. The parameters are attributes with the names and shapes of
    `ferrum_jax.checkpoint.MoEParams`, None where the preset has none; `score_bias` is a `ScoreBias`, the others are
    `nnx.Param`s; matrices that are quantised (`from_params`, `quantize`) are `Quantized`, which nothing trains. Where
    `partition` divides F, gate and up are parameters of their own, so that no matrix moves: w_gate[E, H, F] and w_up
    in place of w_gate_up, b_gate[E, F] and b_up in place of b_gate_up.

    Args:
      hidden_width: H, entries of a token.
      expert_width: F, hidden entries of an expert.
      preset: settings; without one, `num_experts` and `top_k` must be given.
      shared_width: hidden entries of the shared MLP; default: the preset's `shared_experts` times F.
      dtype: of the experts' products and the result, float16, bfloat16 or float32; default: the dtype of x and the
        parameters, or float32 where these differ.
      param_dtype: of the parameters, except the router's, and except the score bias, which is float32.
      router_dtype: of the router's parameters, and of x in the router's product. Sums and logits are float32.
      kernel_init, router_init: initialisers of matrices, such as `jax.nn.initializers`. Experts are initialised one by
        one, so an expert's fan-in is its own. Default: `lecun_normal`, variance 1 / fan-in. Biases start at 0.
      partition: which mesh axes (or flax's logical axis names) divide the parameters' axes "E", "H" and "F", such as
        {"E": "expert"}. The router's matrix and biases stay whole along E. Parameters get it as metadata
        `out_sharding`, and are sharded from the start if a mesh is set (`jax.set_mesh`). In an Explicit mesh this
        divides the experts' work too, as `moe_mlp` says.
      normalization: of the loss that is sown, as in `load_balancing_loss`, with the layer's `scoring` if that is
        "sigmoid", else "softmax". For "deepseek", x is [..., T, H], leading axes are sequences, and the experts that
        count are those chosen without the score bias.
      flow, block_size, implementation, sharding: as in `moe_mlp`; `sharding` divides the experts' part of the layer.
      exchange, capacity, chunks: as in `moe_mlp`. With a capacity, look at `DroppedPairs`.
      precision: of float32 products of the experts and of the shared MLP, as in `moe_mlp`. The router's product is
        always in full float32.
      activations: as in `moe_mlp`; for experts that are quantised to "fp8".
      rngs: its stream `params` makes the parameters.
      **settings: fields of `Preset`: num_experts, top_k, scoring, norm_topk_prob, activation, shared_experts,
        router_bias, expert_bias, score_bias and the others.

    Raises:
      TypeError: an unknown setting, one that is missing, one of another type, or a dtype that is none of the three.
      ValueError: a size < 1, settings that `route_topk` or `moe_mlp` refuses, an unknown axis in `partition`, an
        unknown `normalization` or `precision`, a shared gate without shared experts.

    >>> from flax import nnx
    >>> from ferrum_jax import presets
    >>> moe = MoE(16, 4, presets.mixtral, num_experts=6, rngs=nnx.Rngs(0))
    >>> moe.router.shape, moe.w_gate_up.shape, nnx.jit(lambda moe, x: moe(x))(moe, jnp.ones((2, 5, 16))).shape
    ((16, 6), (6, 16, 8), (2, 5, 16))
    """

    router: Any
    w_gate_up: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    router_bias: Any
    score_bias: Any
    b_gate_up: Any
    b_gate: Any
    b_up: Any
    b_down: Any
    shared_w_gate_up: Any
    shared_w_down: Any
    shared_gate: Any

    def __init__(
        self,
        hidden_width: int,
        expert_width: int,
        preset: Preset | None = None,
        *,
        shared_width: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        router_dtype: Any = jnp.float32,
        kernel_init: Initializer = _BY_FAN_IN,
        router_init: Initializer = _BY_FAN_IN,
        partition: Mapping[str, Any] | None = None,
        normalization: str = "huggingface",
        flow: str | None = None,
        block_size: int | None = None,
        precision: str | jax.lax.Precision | None = None,
        activations: str | None = None,
        implementation: str | None = None,
        sharding: MoESharding | None = None,
        exchange: str | None = None,
        capacity: int | None = None,
        chunks: int = 1,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        self.preset = preset_of("MoE", preset, settings)
        self.dtype = None if dtype is None else as_dtype("MoE", "dtype", dtype)
        self.normalization, self.precision, self.activations = normalization, precision, activations
        self.flow, self.block_size, self.implementation = flow, block_size, implementation
        self.sharding, self.exchange, self.capacity, self.chunks = sharding, exchange, capacity, chunks
        self._check_settings()
        partition = dict(partition or {})
        if unknown := partition.keys() - set(_PARTITIONED):
            raise ValueError(f"MoE: partition must name axes of {_PARTITIONED}; got {', '.join(sorted(unknown))}")
        param_dtype = as_dtype("MoE", "param_dtype", param_dtype)
        router_dtype = as_dtype("MoE", "router_dtype", router_dtype)
        size = self._axis_sizes(hidden_width, expert_width, shared_width)
        for name, axes in AXES.items():
            for absent in (name, *HALVES.get(name, ())):
                setattr(self, absent, nnx.data(None))
            if not self._has(name, size["S"]):
                continue
            of_router, shape = name in _ROUTER, shape_of(axes, size)
            of = jnp.float32 if name == "score_bias" else router_dtype if of_router else param_dtype
            if name in _BIASES:
                value = jnp.zeros(shape, of)
            else:
                value = matrices(router_init if of_router else kernel_init, rngs.params(), shape, of)
            # An axis of 2F or 2S entries ("UF", "US") is divided as F is.
            letters = [axis[-1].replace("S", "F") for axis in axes.split()]
            spec = [None if of_router and letter == "E" else partition.get(letter) for letter in letters]
            kind = ScoreBias if name == "score_bias" else nnx.Param
            names = HALVES.get(name, (name,)) if partition.get("F") else (name,)
            for part, array in zip(names, halves(value, len(names)), strict=True):
                setattr(self, part, kind(array, out_sharding=tuple(spec)) if any(spec) else kind(array))

    def _check_settings(self) -> None:
        """Refuse now, with the same errors, what the layer's calls would refuse later."""
        for name in ("shared_gate", "score_bias", "router_bias", "expert_bias", "weight_on_input"):
            as_bool("MoE", name, getattr(self.preset, name))
        as_int("MoE", "shared_experts", self.preset.shared_experts, least=0)
        one_of("MoE", "normalization", self.normalization, NORMALIZATIONS)
        as_precision("MoE", self.precision, jnp.float32)
        one_of("MoE", "activations", self.activations, (None, "float8_e4m3fn"))
        num_experts = as_int("MoE", "num_experts", self.preset.num_experts)
        checked_routing("route_topk", num_experts, **self.preset)
        one_of("route_topk", "implementation", self.implementation, (None, *IMPLEMENTATIONS))
        checked_settings("moe_mlp", self.preset.activation, self.flow, self.block_size)
        checked_exchange("moe_mlp", self.exchange, self.capacity, self.chunks, True)

    def _axis_sizes(self, hidden_width: int, expert_width: int, shared_width: int | None) -> dict[str, int]:
        """The sizes of the axes that `AXES` names."""
        expert_width = as_int("MoE", "expert_width", expert_width)
        shared = self.preset.shared_experts * expert_width if shared_width is None else shared_width
        shared = as_int("MoE", "shared_width", shared, least=0)
        if self.preset.shared_gate and not shared:
            raise ValueError("MoE: shared_gate needs shared_experts or shared_width >= 1; got 0")
        hidden_width = as_int("MoE", "hidden_width", hidden_width)
        return {"1": 1, "U": 2, "H": hidden_width, "E": int(self.preset.num_experts), "F": expert_width, "S": shared}

    def _has(self, name: str, shared_width: int) -> bool:
        """Whether the layer has a parameter."""
        if name in ("shared_w_gate_up", "shared_w_down"):
            return shared_width > 0
        setting = "expert_bias" if name in ("b_gate_up", "b_down") else name
        return getattr(self.preset, setting, True)  # a parameter without a setting is always there

    def __call__(self, x: jax.Array, *, token_mask: jax.Array | None = None) -> jax.Array:
        """The layer: each token through its experts, and through the shared MLP if there is one.

        Inside `nnx.capture` it sows those of `LoadBalancingLoss`, `RouterZLoss`, `ExpertCounts` and `DroppedPairs` that
        are captured.

        Args:
          x: [..., H] float16, bfloat16 or float32; all axes but the last are tokens.
          token_mask: [...] bool; where it is False, the token has no experts, counts in no loss, and is read as
            zeros, whatever it holds.

        Returns:
          [..., H] in the layer's dtype.

        Raises:
          TypeError: an argument of another dtype.
          ValueError: shapes that do not fit.
        """
        x, mask = jnp.asarray(x), None if token_mask is None else jnp.asarray(token_mask)
        if x.ndim == 1:
            return self(x[None], token_mask=None if mask is None else mask[None])[0]
        if mask is not None and mask.shape == x.shape[:-1]:  # if the shapes differ, `route` raises the error
            x = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
        logits = self.logits(x)
        routed = self.route(logits, token_mask=mask)
        # Two different ones of the three dtypes promote to float32.
        x = x.astype(self.dtype or (x.dtype if x.dtype == self.w_down.dtype else jnp.float32))
        out, dropped = self._routed(x, routed)
        # Outside `nnx.capture`, flax's sow is deprecated: it would add an entry to the module at each call.
        if hasattr(self, "__captures__"):
            self._sow(logits, routed.expert_ids, mask, dropped)
        return (out if self.shared_w_down is None else _f32(out) + self._shared(x)).astype(x.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """The router's product with the tokens x[..., H]: [..., E] float32."""
        width = self.router.shape[0]
        as_dtype("MoE", "x", x.dtype)
        if x.ndim < 1 or x.shape[-1] != width:
            raise ValueError(f"MoE: x must be [..., H] with H = {width}, the layer's hidden width; got shape {x.shape}")
        logits = product(x.astype(self.router.dtype), self.router[...], "highest")
        return logits if self.router_bias is None else _plus(logits, self.router_bias[...])

    def route(self, logits: jax.Array, *, token_mask: jax.Array | None = None) -> RouterOutput:
        """The experts of tokens with these logits[..., E], and their weights, by the layer's settings."""
        return self._route(logits, None if self.score_bias is None else self.score_bias[...], token_mask)

    def update_score_bias(self, counts: jax.Array, rate: jax.Array | float = 0.001) -> None:
        """Balance by bias: `update_routing_bias` of the layer's score bias, once per training step.

        Args:
          counts: [E] integers: `ExpertCounts` of the step, added over all calls and devices. For layers stacked by
            `nnx.vmap`, [layers, E].
          rate: a scalar.

        Raises:
          ValueError: the layer has no score bias; shapes that do not fit.
        """
        if self.score_bias is None:
            raise ValueError("MoE: update_score_bias needs a layer with score_bias=True")
        self.score_bias[...] = update_routing_bias(self.score_bias[...], counts, rate)

    # ---- parameters made elsewhere

    @classmethod
    def from_params(cls, params: MoEParams, preset: Preset | None = None, **kwargs: Any) -> Self:
        """A layer with these parameters, for example from `checkpoint.load_moe`. No random parameters are made.

        Args:
          params: arrays of NumPy or JAX. They say the sizes and which parameters there are, whatever the preset says.
            They also say the dtypes, unless `kwargs` does.
          preset, **kwargs: as in `MoE`, without its widths and `rngs`.

        Raises:
          TypeError, ValueError: as `MoE` and `load`.
        """
        hidden_width, num_experts = params.router.shape
        settings = {
            "param_dtype": params.w_gate_up.dtype,
            "router_dtype": params.router.dtype,
            "shared_width": 0 if params.shared_w_down is None else params.shared_w_down.shape[0],
            "num_experts": num_experts,
            "router_bias": params.router_bias is not None,
            "score_bias": params.score_bias is not None,
            "expert_bias": params.b_down is not None,
            "shared_gate": params.shared_gate is not None,
            **kwargs,
        }
        make = functools.partial(cls, hidden_width, params.w_down.shape[1], preset, **settings)
        module = nnx.as_abstract(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        module.load(params)
        return module

    def load(self, params: MoEParams) -> None:
        """Take these parameters. They are cast to the layer's dtypes, and put where the layer's own parameters are.

        A layer without arrays (`nnx.eval_shape`) has its parameters put where its partition says.

        Raises:
          ValueError: a parameter that only one of the two has, or that has another shape; all are named.
        """
        load_params(self, params)

    def params(self) -> MoEParams:
        """The layer's parameters, for `checkpoint.to_layout` or `moe_mlp`. Gate and up become one array."""
        return params_of(self)

    def quantize(self, format: str, **how: Any) -> None:
        """Round the experts' matrices to few bits, in place: they become variables of type `Quantized`.

        The router, biases and the shared MLP stay as they are. Gate and up begin a block each.

        Args:
          format, **how: as in `ferrum_jax.quantize`, without `parts`.

        Raises:
          TypeError, ValueError: as `ferrum_jax.quantize`; ValueError for matrices that are quantised already.
        """
        quantize_experts(self, format, **how)

    # ---- parts

    def _of_experts(self, name: str, dtype: Any) -> Any:
        """A parameter of the experts, as `moe_mlp` takes it."""
        parts = tuple([_cast(getattr(self, attribute), dtype) for attribute in attributes_of(self, name)])
        return parts if len(parts) > 1 else parts[0] if parts else None

    def _route(self, logits: jax.Array, bias: jax.Array | None, token_mask: jax.Array | None) -> RouterOutput:
        return route_topk(logits, **self.preset, bias=bias, token_mask=token_mask, implementation=self.implementation)

    def _routed(self, x: jax.Array, routed: RouterOutput) -> tuple[jax.Array, jax.Array]:
        """What the experts give, and how many pairs were dropped."""
        experts = functools.partial(
            moe_mlp,
            router_logits=None,
            **{name: self._of_experts(name, x.dtype) for name in ("w_gate_up", "w_down", "b_gate_up", "b_down")},
            activation=self.preset.activation,
            flow=self.flow,
            block_size=self.block_size,
            precision=self.precision,
            activations=self.activations,
            implementation=self.implementation,
            sharding=self.sharding,
            exchange=self.exchange,
            capacity=self.capacity,
            chunks=self.chunks,
            return_dropped=True,
        )
        if not self.preset.weight_on_input:
            return experts(x, router_output=routed)
        # Each pair becomes a token of its own, already multiplied by its weight, with one expert of weight 1.
        ids, weights = routed
        rows = (_f32(x)[..., None, :] * weights[..., None]).astype(x.dtype)
        single = RouterOutput(ids[..., None], jnp.ones_like(weights)[..., None])
        out, dropped = experts(rows, router_output=single)
        return jnp.sum(_f32(out), axis=-2), dropped

    def _shared(self, x: jax.Array) -> jax.Array:
        activation = checked_settings("MoE", self.preset.activation, None, None)
        precision = as_precision("MoE", self.precision, x.dtype) if x.dtype == jnp.float32 else None
        variables = [self.shared_w_gate_up, self.shared_w_down, self.shared_gate]
        return shared_mlp(x, [_cast(v, x.dtype) for v in variables if v is not None], activation, precision)

    def _sow(self, logits: jax.Array, ids: jax.Array, token_mask: jax.Array | None, dropped: jax.Array) -> None:
        num_experts = logits.shape[-1]
        counts = expert_counts(ids, num_experts, token_mask=token_mask)
        self.sow(ExpertCounts, "expert_counts", jnp.sum(counts, axis=range(counts.ndim - 1), dtype=jnp.int32))
        self.sow(DroppedPairs, "dropped_pairs", dropped)
        self.sow(RouterZLoss, "router_z_loss", router_z_loss(logits, token_mask=token_mask))
        if self.normalization == "deepseek" and self.score_bias is not None:
            ids = self._route(logits, None, token_mask).expert_ids
        balance = load_balancing_loss(
            logits,
            ids,
            num_experts,
            normalization=self.normalization,
            scoring="sigmoid" if self.preset.scoring == "sigmoid" else "softmax",
            token_mask=token_mask,
        )
        self.sow(LoadBalancingLoss, "load_balancing_loss", balance)


def _cast(parameter: Any, dtype: Any) -> Any:
    return None if parameter is None else parameter.get_value().astype(dtype)


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _plus(logits: jax.Array, bias: jax.Array) -> jax.Array:
    return logits + _f32(bias).reshape((1,) * (logits.ndim - 1) + bias.shape)
