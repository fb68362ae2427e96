"""Text for federated fine-tuning: models and data by name, and LightningModules with LoRA."""

from edgebolt.common.text.causal_lm import CausalLM
from edgebolt.common.text.classification import TextClassificationData, TokenizedTexts
from edgebolt.common.text.classifier import TextClassifier
from edgebolt.common.text.fine_tuning import FineTuning
from edgebolt.common.text.instruction_data import InstructionData, TokenizedInstructions
from edgebolt.common.text.instructions import Instruction, load_instructions
from edgebolt.common.text.sources import find_model, load_pretrained, load_tokenizer, packaged_file
from edgebolt.common.text.texts import Texts, load_texts

__all__ = [
    "CausalLM",
    "FineTuning",
    "Instruction",
    "InstructionData",
    "TextClassificationData",
    "TextClassifier",
    "Texts",
    "TokenizedInstructions",
    "TokenizedTexts",
    "find_model",
    "load_instructions",
    "load_pretrained",
    "load_texts",
    "load_tokenizer",
    "packaged_file",
]
