"""The causal attention mixer, for hybrids and for the papers' Transformer baseline.

Rotary positions (Su et al. 2021, arXiv 2104.09864) and, as an option, grouped-query attention
(Ainslie et al. 2023, arXiv 2305.13245), parallel by heads: under context parallelism an all-to-all
turns a slice of the sequence into the whole sequence of fewer heads. The core is torch's
`scaled_dot_product_attention`: megatron-core's local core refuses packed rows.

Rows are cut at the document boundaries, and every document is one causal call. So there is no mask,
no time spent on pairs of tokens of different documents, and no memory that grows with the square of
the row. The price is one kernel per document, and the lengths have to be known on the host. Whoever
has the boundaries there says so once (`know_documents`), and no layer waits for the device.

With `attention_window` a token sees the last tokens of its document, itself included, and with
`attention_sinks` also the document's first ones, which attention leans on (Xiao et al. 2023, arXiv
2309.17453). `visible` is the rule. A document that is longer is computed in blocks of the window's
length, each of which sees the block before and the sinks, so time and memory are linear in its
length. In decoding what no later token sees leaves the cache.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.attention_span import (
    ALL,
    Span,
    attend_to_cache,
    extend_cache,
    forget_unseen,
    visible,
)
from xlstm_mcore.mixers.base import Mixer, by_sequence
from xlstm_mcore.sizes.dimensions import attention_heads

# Boundaries on a device -> the lengths of their documents, for as long as the boundaries are there.
_known_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()


class AttentionMixer(Mixer):
    """Causal attention with rotary positions that restart with every document.

    See `Mixer` for the arguments. The cache holds this layer's past: `length`, the number of
    tokens so far, `k` and `v` `[b, kv_heads, sinks + room, head_dim]` (k rotated), and `start [b]`,
    the first token of the current document of each row. Behind `sinks` places the tokens from
    number `first` on stand in their order. The sinks of a document come to the places before when
    they leave these. Without a window all tokens stay, and `first` is 0.

    Whoever knows how long the text may become puts `capacity` there before the first call, and
    nothing is copied afterwards; without it the room doubles whenever it is full. With a window
    the room is that of two windows and the sinks, and half of it is freed whenever it is full.
    """

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config, pg_collection, prefix)
        heads, kv_heads = attention_heads(config)
        self.head_dim = config.hidden_size // heads
        self.num_heads = heads // self.region.size
        self.num_kv_heads = kv_heads // self.region.size
        self.rotary_base = config.rotary_base
        self.span = Span(config.attention_window, config.attention_sinks)

        q, kv = heads * self.head_dim, kv_heads * self.head_dim
        self.in_proj = self.input_projection(
            {"q_proj.weight": q, "k_proj.weight": kv, "v_proj.weight": kv}
        )
        self.out_proj = self.output_projection(q)

    def forward(
        self, x: Tensor, batch: int, boundaries: Tensor | None, cache: dict | None = None
    ) -> Tensor:
        """Mix along the sequence, see `Mixer`."""
        widths = [n * self.head_dim for n in (self.num_heads, *[self.num_kv_heads] * 2)]
        x = self.gathered(x)
        qkv = by_sequence(self.in_proj(x)[0], batch)
        q, k, v = (
            self.context.to_heads(t).transpose(0, 1).unflatten(-1, (-1, self.head_dim))
            for t in qkv.split(widths, dim=-1)
        )  # [b, s, heads/cp, d]
        past = cache.get("length", 0) if cache is not None else 0
        start = document_starts(q, boundaries, past, cache.get("start") if past else None)
        positions = past + torch.arange(q.shape[1], device=q.device) - start
        angles = rotary_angles(positions, self.head_dim, self.rotary_base)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            extend_cache(cache, k, v, self.span)
        if past:
            out = attend_to_cache(q, start, cache, self.span)
        else:
            out = attend(q, k, v, boundaries, self.span)
        if cache is not None:
            cache["start"] = start[:, -1].expand(q.shape[0])
            forget_unseen(cache, self.span)
        out = self.context.from_heads(out.flatten(2).transpose(0, 1))
        return self.out_proj(out.flatten(0, 1))[0]


def attend(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor | None, span: Span = ALL) -> Tensor:
    """Causal attention inside documents.

    Args:
        q: `[b, s, heads, d]`.
        k: `[b, s, kv_heads, d]`; head `i` of q uses head `i * kv_heads // heads`.
        v: `[b, s, kv_heads, d]`.
        boundaries: Bool `[b, s]`, True at the first token of a document, or None.
        span: What of its document a token sees.

    Returns:
        `[b, s, heads, d]`.
    """
    if boundaries is None:
        return _document(q, k, v, span)
    # Splitting and joining have cheap gradients. The gradient of each of many slices would be a
    # tensor of the whole size.
    lengths = document_lengths(boundaries)
    documents = zip(*(t.flatten(0, 1).split(lengths) for t in (q, k, v)), strict=True)
    parts = [_document(*(t.unsqueeze(0) for t in document), span) for document in documents]
    return torch.cat(parts, dim=1).view(q.shape)


def _document(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """Attention inside one document that fills the rows."""
    if span.window is not None and q.shape[1] > span.window + span.sinks:
        return _in_windows(q, k, v, span.window, span)
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        is_causal=True,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _in_windows(q: Tensor, k: Tensor, v: Tensor, window: int, span: Span) -> Tensor:
    """Attention inside a document that is longer than a window, a block of `window` tokens each.

    A block sees itself, the block before and the sinks. Tokens are filled up to whole blocks behind
    the document's end, which no token of it sees.
    """
    b, length, heads, _ = q.shape
    blocks = -(-length // window)
    behind = blocks * window - length
    place = torch.arange(blocks * window, device=q.device).view(blocks, window)
    query = place[:, :, None]
    near = torch.cat((place - window, place), dim=1)[:, None]
    far = place.flatten()[: span.sinks]
    first = torch.zeros_like(query)
    # A sink that is near already must not count twice.
    sinks = visible(query, far, first, span) & (far < near[:, :, :1])
    mask = torch.cat((sinks, visible(query, near, first, span)), dim=2)

    def keys(x: Tensor) -> Tensor:  # [b, blocks, sinks + 2 window, heads, d]
        if x.shape[2] != heads:  # the kernel that takes a mask and keeps no scores wants as many
            x = x.repeat_interleave(heads // x.shape[2], dim=2)
        cut = F.pad(x, (0, 0, 0, 0, window, behind)).unflatten(1, (blocks + 1, window))
        sinks = x[:, None, : span.sinks].expand(-1, blocks, -1, -1, -1)
        return torch.cat((sinks, cut[:, :-1], cut[:, 1:]), dim=2)

    queries = F.pad(q, (0, 0, 0, 0, 0, behind)).unflatten(1, (blocks, window))
    out = F.scaled_dot_product_attention(
        *(t.flatten(0, 1).transpose(1, 2) for t in (queries, keys(k), keys(v))),
        attn_mask=mask.repeat(b, 1, 1)[:, None],
    )
    return out.transpose(1, 2).reshape(b, blocks * window, heads, -1)[:, :length]


def know_documents(boundaries: Tensor, on_host: Tensor) -> None:
    """Tell the lengths of the documents of a tensor on a device, so that no layer has to ask it.

    Args:
        boundaries: Bool `[b, s]`, the tensor that the model is called with.
        on_host: The same values in host memory.
    """
    _known_lengths[boundaries] = document_lengths(on_host)


def document_lengths(boundaries: Tensor) -> list[int]:
    """Lengths of the documents of `boundaries [b, s]`, row after row; no document spans rows."""
    if boundaries in _known_lengths:
        return _known_lengths[boundaries]
    first = boundaries.clone()
    first[:, 0] = True
    starts = first.flatten().nonzero().squeeze(1).tolist()
    ends = [*starts[1:], boundaries.numel()]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def document_starts(
    x: Tensor, boundaries: Tensor | None, past: int, start: Tensor | None
) -> Tensor:
    """Where the document of each new token begins, counted from the first cached token.

    Args:
        x: The new tokens, `[b, s, ...]`.
        boundaries: Bool `[b, s]`, or None.
        past: Number of cached tokens.
        start: `[b]`, where the documents of the last cached tokens begin, or None for 0.

    Returns:
        Int64 `[b, s]`, or `[1, 1]` when all are 0.
    """
    if boundaries is None and start is None:
        return torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    if boundaries is None:
        return start[:, None].expand(x.shape[:2])
    places = past + torch.arange(x.shape[1], device=x.device)
    marks = torch.where(boundaries, places, 0)
    if start is not None:
        marks[:, 0] = torch.maximum(marks[:, 0], start)
    return marks.cummax(dim=1).values


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[b, s, 1, head_dim / 2]` (fp64) of `positions [b, s]`.

    They are fp64 because at position 10^6 an angle in fp32 is off by 0.06.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None, None] * base ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs `(i, i + d/2)` of `x [b, s, heads, d]` by their positions' angles."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype) for t in angles)
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
