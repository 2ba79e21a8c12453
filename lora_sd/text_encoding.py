"""Captions -> tokens -> what the UNet reads of them.

A text encoder reads 77 tokens: a start, 75 of the text, an end. Longer texts are read in chunks of
75, each with a start and an end of its own, and the chunks' hidden states are joined, as A1111 and
ComfyUI do. A text that needs fewer chunks is filled up with empty ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

CHUNK_TOKENS = 75


@dataclass(frozen=True)
class TextEmbedding:
    """What the UNet reads of some texts.

    Attributes:
        hidden: (texts, tokens, width), for cross-attention.
        pooled: (texts, width) of SDXL's second encoder, else None.
    """

    hidden: Tensor
    pooled: Tensor | None


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens, without start and end, of any length."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def chunked(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int, chunks: int) -> Tensor:
    """Token ids (texts, chunks, length): each chunk begun, ended and padded; what is longer is cut.

    Args:
        length: of a chunk, with start and end.
    """
    start, end, pad = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    inner = length - 2
    rows = []
    for ids in token_ids(tokenizer, texts):
        for first in range(0, chunks * inner, inner):
            chunk = [start, *ids[first : first + inner], end]
            rows.append(chunk + [pad] * (length - len(chunk)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), chunks, length)


def hidden_states(
    encoder: nn.Module, tokens: Tensor, layer: int, norm: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """(hidden states (texts, chunks * length, width), pooled output of each text's first chunk).

    Args:
        encoder: CLIP, or a wrapper around it that takes the same arguments.
        tokens: (texts, chunks, length), where the encoder is.
        layer: whose output is taken: -1 the last, -2 the one before.
        norm: the encoder's last norm, which comes after that layer; None: none does.
    """
    texts, chunks, length = tokens.shape
    # Chunk after chunk: a scale for each text (of a live adapter) is repeated along the batch.
    rows = tokens.transpose(0, 1).reshape(chunks * texts, length)
    if layer == -1 and norm is not None:  # CLIP's own way
        output = encoder(rows)
        hidden = output.last_hidden_state
    else:
        output = encoder(rows, output_hidden_states=True)
        hidden = output.hidden_states[layer]
        hidden = norm(hidden) if norm is not None else hidden
    joined = (
        hidden.reshape(chunks, texts, length, -1)
        .transpose(0, 1)
        .reshape(texts, -1, hidden.shape[-1])
    )
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    return joined, pooled[:texts]
