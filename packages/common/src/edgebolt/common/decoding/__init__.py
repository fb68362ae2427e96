"""Decoding with drafts: caches, packed layers, trees, the target's choice and verification."""

from edgebolt.common.decoding.caches import cache_bytes, cache_length, crop, keep, new_cache
from edgebolt.common.decoding.delays import BatchDelay, Link, MovingAverage
from edgebolt.common.decoding.ends import Embedding, Head, longest_text
from edgebolt.common.decoding.layer_stack import LayerStack, Segment, segment_attention
from edgebolt.common.decoding.token_choice import Processor, TokenChoice
from edgebolt.common.decoding.trees import DraftTree
from edgebolt.common.decoding.verification import Verified, committed, verify

__all__ = [
    "BatchDelay",
    "DraftTree",
    "Embedding",
    "Head",
    "LayerStack",
    "Link",
    "MovingAverage",
    "Processor",
    "Segment",
    "TokenChoice",
    "Verified",
    "cache_bytes",
    "cache_length",
    "committed",
    "crop",
    "keep",
    "longest_text",
    "new_cache",
    "segment_attention",
    "verify",
]
