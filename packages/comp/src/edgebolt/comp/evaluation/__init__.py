"""What a pruned model is worth: perplexity, zero-shot accuracy, speed and memory."""

from edgebolt.comp.evaluation.memory import MeasuredMemory, measured_memory
from edgebolt.comp.evaluation.perplexity import PerplexityResult, perplexity
from edgebolt.comp.evaluation.questions import TASKS, Question, load_questions
from edgebolt.comp.evaluation.speed import SpeedResult, decoding_speed, decoding_speeds
from edgebolt.comp.evaluation.zero_shot import ZeroShotResult, zero_shot

__all__ = [
    "TASKS",
    "MeasuredMemory",
    "PerplexityResult",
    "Question",
    "SpeedResult",
    "ZeroShotResult",
    "decoding_speed",
    "decoding_speeds",
    "load_questions",
    "measured_memory",
    "perplexity",
    "zero_shot",
]
