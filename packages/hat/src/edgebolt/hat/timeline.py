"""What happened when in one text: on the device, and on the link or in the cloud."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from edgebolt.hat.dialogue import Timings

__all__ = ["Span", "draw_timeline"]

_STYLES = {
    ("device", "prompt"): ("prompt: the device's layers", "tab:blue"),
    ("device", "adapter"): ("prompt: Λ reads it", "tab:cyan"),
    ("device", "draft"): ("draft", "tab:green"),
    ("device", "ahead"): ("look-ahead", "gold"),
    ("device", "verify"): ("verification", "tab:red"),
    ("away", "prompt"): ("chunk on the link, in the cloud", "lightsteelblue"),
    ("away", "draft"): ("draft on the link, in the cloud", "darkseagreen"),
}


class Span(NamedTuple):  # no dataclass: Lightning, which walks through predictions, takes no frozen one
    """Something that took a while.

    Args:
        lane: ``"device"``, or ``"away"``: on the link or in the cloud, from when an upload was handed to the link
            until the device has read the answer.
        work: ``"prompt"`` (a chunk), ``"adapter"`` (Λ reads the prompt), ``"draft"``, ``"ahead"`` (look-ahead) or
            ``"verify"`` (the head on what came back, and what follows from it); away, ``"prompt"`` or ``"draft"``.
        start: seconds from the text's beginning.
        end: seconds from the text's beginning.
        tokens: of a chunk; of an upload, its rows; of a look-ahead, its steps; of a verification, those that the text
            grew by.

    Example::

        >>> span = Span("device", "draft", start=0.50, end=0.53, tokens=3)
        >>> round(span.seconds, 2)
        0.03
    """

    lane: str
    work: str
    start: float
    end: float
    tokens: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


def draw_timeline(timings: Timings, path: str | os.PathLike[str], rounds: int = 8, title: str = "") -> Figure:
    """Draw a text's timeline: above until its first token, below, on a scale of its own, the first rounds.

    Args:
        timings: of the text (``HatClient.last.timings``).
        path: where to save; the ending says the format. Its folder is made if missing.
        rounds: that are shown.
        title: of the picture.

    Raises:
        ModuleNotFoundError: without matplotlib; the message names the extra.
        ValueError: for a text that has no token yet, or ``rounds`` below 1.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.hat import HatClient
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> with HatClient(None, LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)), device_layers=1) as client:
        ...     timings = client.generate([3, 1, 4], new_tokens=5).timings
        >>> figure = draw_timeline(timings, "timeline.png")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The timeline needs matplotlib: pip install 'edgebolt-hat[plot]'") from error
    if not timings.tokens or rounds < 1:
        raise ValueError(
            f"{len(timings.tokens)} tokens, rounds={rounds}: draw a text with tokens, and a round or more."
        )
    verified = [span for span in timings.spans if span.work == "verify"]  # the first: of the first token
    shown = verified[1 : rounds + 1]
    figure = Figure(figsize=(12.0, 5.6 if shown else 3.2), layout="constrained")
    panels = figure.subplots(2 if shown else 1, 1, squeeze=False)[:, 0]
    first = timings.first
    _panel(panels[0], timings.spans, 0.0, first, verified[:1])
    panels[0].set_title(f"the first token, after {first:.2f} s", fontsize="medium", loc="left")
    if shown:
        last = shown[-1].end
        _panel(panels[1], timings.spans, first, last, shown)
        count, begun = sum(span.tokens for span in shown), f"the first {len(shown)}" if len(shown) > 1 else "the first"
        said = f"{begun} of {len(verified) - 1} rounds: {count} tokens, {(last - first) / count * 1e3:.0f} ms each"
        panels[1].set_title(said, fontsize="medium", loc="left")
    panels[-1].set_xlabel("seconds")
    _legend(figure, timings.spans)
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure


def _panel(panel: Any, spans: Iterable[Span], start: float, end: float, verified: Sequence[Span]) -> None:
    """Everything between two times, with the tokens of each verification."""
    inside = [span for span in spans if span.end > start and span.start < end]
    for work in ("prompt", "draft"):
        away = [span for span in inside if (span.lane, span.work) == ("away", work)]
        for span, (row, rows) in zip(away, _rows(away), strict=True):
            _bar(panel, span, 0.1 + 0.8 * row / rows, 0.8 / rows, end - start, labelled=True)
    for span in inside:
        if span.lane == "device":
            _bar(panel, span, 1.1, 0.8, end - start, labelled=span.work == "prompt")
    for span in verified:
        panel.axvline(span.end, color="tab:red", linewidth=0.8, linestyle=":")
        panel.text(span.end, 2.05, f"+{span.tokens}", color="tab:red", ha="center", va="bottom", fontsize="small")
    panel.set_yticks([0.5, 1.5], ["link and cloud", "device"])
    panel.set_ylim(0, 2.3)
    panel.set_xlim(start - (end - start) * 0.01, end + (end - start) * 0.02)


def _rows(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """For each span a row, and how many rows there are, so that those at the same time do not hide each other."""
    ends: list[float] = []
    found = []
    for span in spans:
        row = next((row for row, end in enumerate(ends) if end <= span.start), len(ends))
        ends[row:] = [span.end, *ends[row + 1 :]]
        found.append(row)
    return [(row, len(ends)) for row in found]


def _bar(panel: Any, span: Span, bottom: float, height: float, scale: float, labelled: bool) -> None:
    _, color = _STYLES[span.lane, span.work]
    panel.bar(span.start, height, span.seconds, bottom, align="edge", color=color, edgecolor="white", linewidth=0.5)
    if labelled and span.seconds > 0.02 * scale:  # else the number does not fit
        place = (span.start + span.end) / 2, bottom + height / 2
        panel.text(*place, str(span.tokens), ha="center", va="center", fontsize="x-small", clip_on=True)


def _legend(figure: Figure, spans: Iterable[Span]) -> None:
    from matplotlib.patches import Patch

    kinds = {(span.lane, span.work) for span in spans}
    patches = [Patch(color=color, label=label) for kind, (label, color) in _STYLES.items() if kind in kinds]
    title = "a number in a bar: tokens sent; +n: tokens that the text grew by"
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize="small", title=title,
                  title_fontsize="small", frameon=False)  # fmt: skip
