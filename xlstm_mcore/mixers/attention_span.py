"""Which tokens of its document a token sees in attention, and the cache of what later ones see."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """What of its document a token sees.

    Attributes:
        window: The last tokens, the token itself included; None for all.
        sinks: The document's first tokens, which are seen outside the window too.
    """

    window: int | None
    sinks: int


ALL = Span(None, 0)


def visible(query: Tensor, key: Tensor, start: Tensor, span: Span) -> Tensor:
    """Whether a query sees a key.

    Args:
        query: Numbers of tokens; all three broadcast.
        key: Numbers of tokens.
        start: The first token of the query's document.
        span: What of its document a token sees.

    Returns:
        Bool, of the common shape.
    """
    seen = (key <= query) & (key >= start)
    if span.window is None:
        return seen
    return seen & ((query - key < span.window) | (key - start < span.sinks))


def extend_cache(cache: dict, k: Tensor, v: Tensor, span: Span) -> None:
    """Put new keys and values `[b, s, kv_heads, d]` behind those in a layer's cache.

    Args:
        cache: See `AttentionMixer`.
        k: The keys.
        v: The values.
        span: What of its document a token sees.
    """
    past, new = cache.get("length", 0), k.shape[1]
    filled = span.sinks + past - cache.setdefault("first", 0)
    capacity = cache.get("capacity", 0)
    if span.window is not None:
        capacity = min(capacity, 2 * span.window)
    for name, tensor in (("k", k), ("v", v)):
        room = cache[name].shape[2] if past else span.sinks
        if filled + new > room:
            b, _, kv_heads, d = tensor.shape
            size = max(filled + new, 2 * room, span.sinks + capacity)
            larger = tensor.new_empty(b, kv_heads, size, d)
            # Places of sinks that are not there yet are masked, and must be numbers all the same.
            larger[:, :, : span.sinks] = 0
            if past:
                larger[:, :, :filled] = cache[name][:, :, :filled]
            cache[name] = larger
        cache[name][:, :, filled : filled + new] = tensor.transpose(1, 2)
    cache["length"] = past + new


def attend_to_cache(q: Tensor, start: Tensor, cache: dict, span: Span) -> Tensor:
    """Attention of the last `s` cached tokens to themselves and the past.

    The mask takes `[b, s, keys]`, which is small because decoding adds one token at a time.

    Args:
        q: `[b, s, heads, d]`.
        start: `[b, s]` or `[1, 1]`, the first token of the document of each.
        cache: With the keys and values of these tokens; its `start` is that of the token before.
        span: What of its document a token sees.

    Returns:
        `[b, s, heads, d]`.
    """
    length, first = cache["length"], cache["first"]
    query = torch.arange(length - q.shape[1], length, device=q.device)[:, None]
    far, near = _sinks(cache, span), torch.arange(first, length, device=q.device)
    key = torch.cat((far, near.expand(len(far), -1)), dim=1)[:, None]  # [b, 1, keys]
    seen = visible(query, key, start[..., None], span)
    seen[:, :, : span.sinks] &= far[:, None] < first  # until then they are among the others
    filled = seen.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        cache["k"][:, :, :filled],
        cache["v"][:, :, :filled],
        attn_mask=seen.unsqueeze(1),
        enable_gqa=q.shape[2] != cache["k"].shape[1],
    )
    return out.transpose(1, 2)


def _sinks(cache: dict, span: Span) -> Tensor:
    """The numbers of the sinks of each row's current document, `[b, sinks]`."""
    start = cache["start"][:, None]
    return start + torch.arange(span.sinks, device=start.device)


def forget_unseen(cache: dict, span: Span) -> None:
    """Take from a cache what no later token sees, once two windows are full.

    Args:
        cache: Of a layer; its `start` is that of the last token.
        span: What of its document a token sees.
    """
    window, sinks, first = span.window, span.sinks, cache["first"]
    filled = cache["length"] - first
    if window is None or filled < 2 * window:
        return
    stays = window - 1
    place = _sinks(cache, span) - first
    leaves = ((place >= 0) & (place < filled - stays))[:, None, :, None]
    place = place.clamp(0, filled - 1)[:, None, :, None]
    for name in ("k", "v"):
        old = cache[name]
        b, kv_heads, room, d = old.shape
        tokens = old[:, :, sinks : sinks + filled]
        leaving = tokens.gather(2, place.expand(b, kv_heads, sinks, d))
        size = sinks + 2 * window
        new = old if room == size else old.new_empty(b, kv_heads, size, d)
        new[:, :, :sinks] = torch.where(leaves, leaving, old[:, :, :sinks])
        new[:, :, sinks : sinks + stays] = tokens[:, :, filled - stays :]
        cache[name] = new
    cache["first"] = cache["length"] - stays
