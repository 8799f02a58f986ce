"""Keys and values of a decode, and attention of a few blocks to all that is before them."""

from __future__ import annotations

import torch

from .. import decoder, reference

CHUNK = 32  # queries of a prefill that share their keys, where blocks are shorter


class KVCache:
    """Keys and values of the committed tokens, in buffers of full length: a forward writes behind them, and only `commit`
    makes what it wrote part of the prefix. keys, values: [layers, bsz, kv_heads, capacity, head_dim].

    length: committed tokens, an int; or int64 [1] on the device, so that one graph serves every prefix.
    rows: int64 [n], the sequences that a forward is about; None: all, in order.
    turns: cos and sin of all positions, [capacity, R]; None until a model gives them.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ):
        shape = (layers, batch, heads, capacity, head_dim)
        # Zeros: a masked key has weight 0, and 0 times whatever memory holds may be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length: int | torch.Tensor = 0
        self.rows: torch.Tensor | None = None
        self.turns: tuple[torch.Tensor, torch.Tensor] | None = None

    def select(self, rows: torch.Tensor | None = None, length: int | torch.Tensor | None = None) -> KVCache:
        """The same buffers for some sequences, or with another length."""
        part = KVCache.__new__(KVCache)  # torch 2.11 does not trace through copy.copy
        part.keys, part.values, part.turns, part.rows = self.keys, self.values, self.turns, rows
        part.length = self.length if length is None else length
        return part

    def check(self, input_ids: torch.Tensor) -> None:
        _, batch, _, capacity, _ = self.keys.shape
        batch = batch if self.rows is None else len(self.rows)
        if input_ids.shape[0] != batch:
            raise ValueError(f"input_ids must have the batch size of kv_cache, {batch}, got {input_ids.shape[0]}")
        if not isinstance(self.length, torch.Tensor) and self.length + input_ids.shape[1] > capacity:
            raise ValueError(
                f"kv_cache has room for {capacity} tokens, got {self.length} and {input_ids.shape[1]} more"
            )

    def extend(
        self,
        layer: int,
        qkv: torch.Tensor,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        at: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalises and turns the heads of qkv [n, T, ...] (`reference.qk_norm_rope`) and writes keys and values behind the
        prefix of `at` int64 [1] tokens. Returns the queries, and keys and values of prefix and both, or the whole buffers
        where the length is on the device. Raises ValueError where they have a gradient, which the buffers would keep from
        then on."""
        if qkv.requires_grad:
            raise ValueError("kv_cache must be used under torch.no_grad(), got keys with a gradient")
        buffers = self.keys[layer], self.values[layer]
        query = decoder.qk_norm_rope(qkv, query_weight, key_weight, eps, cos, sin, self.rows, at, *buffers)
        keys, values = (self._upto(buffer, qkv.shape[1]) for buffer in buffers)
        return query, keys, values

    def _upto(self, buffer, tokens: int) -> torch.Tensor:
        if isinstance(self.length, torch.Tensor):
            return buffer
        buffer = buffer[:, :, : self.length + tokens]
        return buffer if self.rows is None else buffer.index_select(0, self.rows)

    def commit(self, tokens: int) -> None:
        self.length += tokens


def attend(query, keys, values, past: int, block_length: int) -> torch.Tensor:
    """Block-causal attention, [n, T, heads D]: a token sees its own block and all earlier ones.

    query [n, heads, T, D] at the positions from `past` on, the end of a block; keys, values [n, kv_heads, L, D] at those
    from 0 on, L = past + T. No mask of T x T is made: a chunk of queries has its own call, over what it sees.
    """
    tokens = query.shape[2]
    chunk = max(1, CHUNK // block_length) * block_length
    parts = []
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        own = chunk == block_length
        seen = None if own else reference.sees(past, begin, end, past + end, block_length, query.device)
        prefix = keys[:, :, : past + end], values[:, :, : past + end]
        parts.append(reference.attention(query[:, :, begin:end], *prefix, seen))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 1) if parts else query.transpose(1, 2).flatten(2)
