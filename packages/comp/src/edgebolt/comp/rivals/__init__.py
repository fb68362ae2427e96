"""Other structured pruning methods, written from their papers, to be measured beside COMP."""

from edgebolt.comp.rivals.flap import Flap
from edgebolt.comp.rivals.llm_pruner import LlmPruner
from edgebolt.comp.rivals.magnitude import Magnitude
from edgebolt.comp.rivals.rival import Rival
from edgebolt.comp.rivals.short_gpt import ShortGpt
from edgebolt.comp.rivals.wanda_sp import WandaSp

__all__ = ["RIVALS", "Flap", "LlmPruner", "Magnitude", "Rival", "ShortGpt", "WandaSp"]

RIVALS: dict[str, type[Rival]] = {
    "magnitude": Magnitude,
    "wanda-sp": WandaSp,
    "shortgpt": ShortGpt,
    "flap": Flap,
    "llm-pruner": LlmPruner,
}
