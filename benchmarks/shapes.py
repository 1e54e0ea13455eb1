"""The shapes that are timed, and the model that each comes from."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one workload: `[batch, sequence, num_heads * head_dim]` by `[num_heads * head_dim, embed]`."""

    name: str
    batch: int
    sequence: int
    num_heads: int
    head_dim: int
    embed: int
    source: str
    kept: float | None = None  # the fraction of each sequence's tokens to select; None: no selection

    @property
    def rows(self) -> int:
        """Rows of the product, M."""
        return self.batch * self.sequence

    @property
    def top_k(self) -> int:
        """Tokens kept of each sequence."""
        return max(1, round((self.kept or 1) * self.sequence))

    def with_rows(self, rows: int) -> Shape:
        """The same with so many rows at most, then in one sequence."""
        return self if rows >= self.rows else self._replace(batch=1, sequence=rows)


ABSORB_Q = "DeepSeek-V3, query into the latent space: num_attention_heads 128, qk_nope_head_dim 128, kv_lora_rank 512"
ABSORB_O = "DeepSeek-V3, output from the latent space: num_attention_heads 128, kv_lora_rank 512, v_head_dim 128"

# name, batch, sequence, num_heads, head_dim, embed, source, kept
SHAPES = (
    Shape("deepseek-q", 1, 256, 128, 128, 512, ABSORB_Q),
    Shape("deepseek-q-16", 16, 1, 128, 128, 512, f"{ABSORB_Q}; decoding 16 sequences"),
    Shape("deepseek-q-1", 1, 1, 128, 128, 512, f"{ABSORB_Q}; decoding one"),
    Shape("deepseek-o", 1, 256, 128, 512, 128, ABSORB_O),
    Shape("deepseek-o-16", 16, 1, 128, 512, 128, f"{ABSORB_O}; decoding 16 sequences"),
    Shape("deepseek-o-1", 1, 1, 128, 512, 128, f"{ABSORB_O}; decoding one"),
    Shape("rg-lru", 1, 2048, 10, 256, 256, "RecurrentGemma-2B, RG-LRU gates: lru_width 2560, num_attention_heads 10"),
    Shape("xlstm", 1, 1024, 4, 512, 512, "xLSTM 1.3B (2405.04517), an sLSTM gate: embedding_dim 2048, num_heads 4"),
    Shape("monarch", 8, 512, 64, 64, 64, "Monarch (2204.00595), one block-diagonal factor of a 4096 x 4096 matrix"),
    Shape("vit", 32, 197, 12, 64, 64, "ViT-B/16, heads 12 x 64; DynamicViT (2106.02034) keeps 0.7 of a stage", 0.7),
    Shape("mod", 1, 2048, 16, 128, 128, "Mixture-of-Depths (2404.02258), width 2048, capacity 12.5 %", 1 / 8),
    Shape("dense", 4, 512, 1, 1024, 1024, "one head, 1024 x 1024: an ordinary linear layer"),
    Shape("smallest", 1, 1, 2, 8, 8, "no work to speak of: what a call costs"),
)

RG_LRU = "RG-LRU gates (2402.19427)"
GPU_SHAPES = (
    Shape("deepseek-q-1024", 1, 1024, 128, 128, 512, ABSORB_Q),
    Shape("deepseek-q-4096", 1, 4096, 128, 128, 512, ABSORB_Q),
    Shape("deepseek-o-1024", 1, 1024, 128, 512, 128, ABSORB_O),
    Shape("deepseek-o-4096", 1, 4096, 128, 512, 128, ABSORB_O),
    Shape("rg-lru-2b", 4, 2048, 10, 256, 256, f"RecurrentGemma-2B, {RG_LRU}: lru_width 2560, num_attention_heads 10"),
    Shape("rg-lru-9b", 2, 2048, 16, 256, 256, f"RecurrentGemma-9B, {RG_LRU}: lru_width 4096, num_attention_heads 16"),
    Shape("xlstm", 4, 2048, 4, 512, 512, "xLSTM 1.3B (2405.04517), an sLSTM gate: embedding_dim 2048, num_heads 4"),
    Shape("monarch-64", 4, 2048, 64, 64, 64, "Monarch (2204.00595), one block-diagonal factor of 4096 x 4096"),
    Shape("monarch-32", 8, 2048, 32, 32, 32, "Monarch (2204.00595), one block-diagonal factor of 1024 x 1024"),
    Shape("vit", 64, 197, 12, 64, 64, "ViT-B/16, heads 12 x 64; DynamicViT (2106.02034) keeps 0.7 of a stage", 0.7),
    Shape("dense", 2, 2048, 1, 4096, 4096, "one head, 4096 x 4096: an ordinary linear layer"),
    Shape("mod", 4, 2048, 16, 128, 128, "Mixture-of-Depths (2404.02258), width 2048, capacity 12.5 %", 1 / 8),
    Shape("deepseek-q-64", 64, 1, 128, 128, 512, f"{ABSORB_Q}; decoding 64 sequences"),
    Shape("deepseek-q-16", 16, 1, 128, 128, 512, f"{ABSORB_Q}; decoding 16 sequences"),
    Shape("deepseek-q-1", 1, 1, 128, 128, 512, f"{ABSORB_Q}; decoding one"),
    Shape("deepseek-o-64", 64, 1, 128, 512, 128, f"{ABSORB_O}; decoding 64 sequences"),
    Shape("deepseek-o-16", 16, 1, 128, 512, 128, f"{ABSORB_O}; decoding 16 sequences"),
    Shape("deepseek-o-1", 1, 1, 128, 512, 128, f"{ABSORB_O}; decoding one"),
    Shape("importance", 8, 8192, 32, 128, 128, "1024 tokens of 8192, of each of 8 sequences, width 4096", 1 / 8),
    Shape("selection", 8, 8192, 1, 1, 1, "8 rows of 8192 scores, 1024 kept of each", 1 / 8),
)
