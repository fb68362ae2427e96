"""Generation as a prediction of a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
from torch import Tensor, nn

from edgebolt.common.decoding import TokenChoice
from edgebolt.hat.adapter import HatAdapter
from edgebolt.hat.client import Generation, HatClient

__all__ = ["HatModule"]


class HatModule(L.LightningModule):
    """``trainer.predict(HatModule(model, adapter, address), prompts)`` generates texts with a cloud's help.

    A batch is a list of prompts, each a string (with a tokenizer), a list of ids or a tensor, as
    ``DataLoader(prompts, batch_size=1, collate_fn=list)`` gives them, or a tensor ``[texts, length]``. Prompts are
    generated one after the other: this is one device.

    Args:
        model: a decoder.
        adapter: Λ; None drafts nothing.
        address: of the cloud, ``host:port``; None runs its layers in this process.
        tokenizer: of strings.
        new_tokens: of a text at most.
        choice: of tokens; by default the likeliest.
        **options: of :class:`HatClient`.

    Example::

        >>> from torch.utils.data import DataLoader
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.hat import GenerationMetrics
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> config = LlamaConfig(**sizes, vocab_size=20, eos_token_id=None)  # a random model ends its texts at random
        >>> module = HatModule(LlamaForCausalLM(config), new_tokens=4, device_layers=1)
        >>> quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        >>> metrics = GenerationMetrics(table=False)
        >>> trainer = L.Trainer(callbacks=[metrics], **quiet)
        >>> found = trainer.predict(module, DataLoader([[3, 1, 4], [1, 5]], collate_fn=list))
        >>> [len(text.tokens) for batch in found for text in batch], metrics.values["generate/texts"]
        ([4, 4], 2.0)
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: HatAdapter | None = None,
        address: str | None = None,
        tokenizer: Any = None,
        new_tokens: int = 128,
        choice: TokenChoice | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.tokenizer = model, adapter, tokenizer
        self.address, self.new_tokens, self.choice, self.options = address, new_tokens, choice, options
        self.client: HatClient | None = None
        self._request = 0

    def on_predict_start(self) -> None:
        """Open the link."""
        self._request = 0
        self.client = HatClient(self.address, self.model, self.adapter, **self.options)

    def on_predict_end(self) -> None:
        """Close it."""
        if self.client is not None:
            self.client.close()
            self.client = None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Generation]:
        """Generate a batch's texts."""
        if self.client is None:
            raise RuntimeError("The link is open during trainer.predict alone.")
        found = []
        for prompt in batch:
            ids = self._ids(prompt)
            found.append(self.client.generate(ids, self.new_tokens, self.choice, request=self._request))
            self._request += 1
        return found

    def _ids(self, prompt: str | Tensor | Sequence[int] | Iterable[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("A prompt is a string, and HatModule has no tokenizer: pass tokenizer=.")
            return [int(token) for token in self.tokenizer(prompt)["input_ids"]]
        if isinstance(prompt, Tensor):
            return [int(token) for token in prompt.flatten().tolist()]
        return [int(token) for token in prompt]
