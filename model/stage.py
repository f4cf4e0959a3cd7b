"""One stage of the network as one rank computes it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ops
from model.attention import Attention, Expansion
from model.cache import LatentCache
from model.config import CheckpointError, ModelConfig
from model.context import StepContext
from model.layers import MLP, Linear, RMSNorm
from model.layout import Cell, Layout
from model.moe import ExpertExchange, LocalExperts, MoE
from model.rope import Rope
from model.weights import Rows, Slot, Value, WeightFormat, weight


class Embedding(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(vocabulary, hidden, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.weight", Rows([self.weight])


class Head(nn.Module):
    """The final norm and the projection to the vocabulary."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.projection = Linear(config.hidden_size, config.vocab_size, WeightFormat(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [S, vocabulary] fp32 of hidden states [S, hidden]."""
        return self.projection(self.norm(x)).float()

    def slots(self) -> Iterator[Slot]:
        yield from self.norm.slots("model.norm")
        yield from self.projection.slots("lm_head")


class Layer(nn.Module):
    """Attention, then dense or expert feed-forward, each on top of what came before."""

    def __init__(
        self,
        config: ModelConfig,
        feed_forward: MLP | MoE,
        form: WeightFormat,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(hidden, eps, form.dtype)
        self.attention = Attention(config, form)
        self.feed_forward_norm = RMSNorm(hidden, eps, form.dtype)
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], context: StepContext, cache: Tensor
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotation, context, cache)
        x, normed = self.feed_forward_norm.of_sum(x, attended)
        return x + self.feed_forward(normed)

    def slots(self, name: str) -> Iterator[Slot]:
        yield from self.attention_norm.slots(f"{name}.input_layernorm")
        yield from self.attention.slots(f"{name}.self_attn")
        yield from self.feed_forward_norm.slots(f"{name}.post_attention_layernorm")
        yield from self.feed_forward.slots(f"{name}.mlp")


class Stage(nn.Module):
    """The tensors of one cell, and the forward pass through them.

    All ranks of a stage hold the same layers and meet in `exchange` once for each expert layer;
    each holds its own share of the routed experts. It computes once every tensor has been given
    to `load_tensor` and `finalize` was called; nothing can be loaded after that.

    Weights that come in 8-bit floats, or are made so by `quantize`, stay so with `keep_fp8`, by
    default everywhere but on CPUs: there they are widened to `dtype` when they are loaded.

    Attributes:
        dtype: of the hidden states, and `width`, of one of them.
        rope: cosines and sines of positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        cell: Cell,
        dtype: torch.dtype,
        device: torch.device | str,
        exchange: ExpertExchange,
        quantize: str | None = None,
        keep_fp8: bool | None = None,
    ) -> None:
        super().__init__()
        if keep_fp8 is None:
            keep_fp8 = torch.device(device).type != "cpu"
        held, form = layout.experts(cell.rank), WeightFormat(dtype, quantize, keep_fp8)

        def feed_forward(layer: int) -> MLP | MoE:
            if config.is_dense(layer):
                return MLP(config.hidden_size, config.intermediate_size, form)
            return MoE(config, held, form, exchange)

        with torch.device(device):
            self.embedding = (
                Embedding(config.vocab_size, config.hidden_size, dtype)
                if layout.has_embedding(cell.stage)
                else None
            )
            self.layers = nn.ModuleList(
                Layer(config, feed_forward(layer), form) for layer in layout.layers(cell.stage)
            )
            self.head = Head(config, dtype) if layout.has_head(cell.stage) else None
        self.dtype, self.width = dtype, config.hidden_size
        self._cell = cell
        self._first_layer = layout.layers(cell.stage).start
        self.rope = Rope(config.rope, config.qk_rope_head_dim, device)
        self._slots = dict(self._all_slots())
        self._missing = set(self._slots)

    def _all_slots(self) -> Iterator[Slot]:
        if self.embedding is not None:
            yield from self.embedding.slots("model.embed_tokens")
        for index, layer in enumerate(self.layers, start=self._first_layer):
            assert isinstance(layer, Layer)
            yield from layer.slots(f"model.layers.{index}")
        if self.head is not None:
            yield from self.head.slots()

    def load_tensor(self, name: str, tensor: Value) -> None:
        """Takes one tensor of a checkpoint, under its name there, to its place.

        It may be kept as it is: nobody may change it afterwards.

        Raises:
            KeyError: not a tensor of this cell.
            CheckpointError: not the shape that the configuration calls for, or 8-bit floats
                where the others of its kind are none.
        """
        place = self._slots[name]
        shape = (tensor if isinstance(tensor, Tensor) else tensor.data).shape
        if shape != place.shape:
            raise CheckpointError(
                f"{name}: shape {tuple(shape)} where config.json calls for {place.shape}"
            )
        place.put(tensor)
        self._missing.discard(name)

    def finalize(self) -> None:
        """Ends the loading: weights take the form that the device computes with.

        Raises:
            CheckpointError: a tensor of this cell was not loaded.
        """
        if self._missing:
            raise CheckpointError(
                f"cell {self._cell}: {len(self._missing)} tensors were not loaded, "
                f"{min(self._missing)} among them; is the checkpoint complete?"
            )
        self._slots.clear()  # they would keep the weights as they were loaded
        for module in self.modules():
            if isinstance(module, Linear | Expansion | LocalExperts):
                module.pack()

    def forward(self, inputs: Tensor, context: StepContext, cache: LatentCache) -> Tensor:
        """One step through the stage; writes the rows of the step to the cache.

        Args:
            inputs: token ids [T] int64 on the first stage, else hidden states [T, hidden].
            context: the step, of T rows.
            cache: this rank's, for the layers of this stage.

        Returns:
            Hidden states [T, hidden]; on the last stage logits [S, vocabulary] fp32 of the
            context's `logit_rows`.
        """
        if context.decode is not None:
            ops.plan_pages(context.decode.pages, context.decode.lengths)
        x = inputs if self.embedding is None else self.embedding(inputs)  # [T, hidden]
        rotation = self.rope(context.positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, context, cache.layer(index))
        return x if self.head is None else self.head(x[context.logit_rows])
