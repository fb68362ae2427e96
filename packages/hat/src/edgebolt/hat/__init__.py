"""HAT: a language model split over device and cloud, with drafts on the device."""

from edgebolt.hat.adapter import HatAdapter
from edgebolt.hat.batching import next_batch
from edgebolt.hat.chunk_size import chunk_size
from edgebolt.hat.client import Generation, HatClient
from edgebolt.hat.cloud_engine import Answer, CloudEngine, Job, Limits
from edgebolt.hat.cloud_model import CloudModel
from edgebolt.hat.cloud_server import CloudServer
from edgebolt.hat.conversation import Conversation, Drafting
from edgebolt.hat.dialogue import Chunking, Dialogue, Timings, UploadRefusedError
from edgebolt.hat.distillation import HatDistillation, accept_length
from edgebolt.hat.fingerprint import fingerprint
from edgebolt.hat.generation_metrics import GenerationMetrics
from edgebolt.hat.grpc_link import DeviceRefusedError, GrpcLink
from edgebolt.hat.hat_module import HatModule
from edgebolt.hat.link import CloudLink, InProcess, LinkLostError
from edgebolt.hat.medusa import MEDUSA_TREE, MedusaConversation, MedusaHeads
from edgebolt.hat.row_format import FORMATS, RowFormat
from edgebolt.hat.split_model import InputModel, SplitModel, split
from edgebolt.hat.timeline import Span, draw_timeline
from edgebolt.hat.tls import DeviceKeys, ServerKeys
from edgebolt.hat.upload import Upload

__all__ = [
    "FORMATS",
    "MEDUSA_TREE",
    "Answer",
    "Chunking",
    "CloudEngine",
    "CloudLink",
    "CloudModel",
    "CloudServer",
    "Conversation",
    "DeviceKeys",
    "DeviceRefusedError",
    "Dialogue",
    "Drafting",
    "Generation",
    "GenerationMetrics",
    "GrpcLink",
    "HatAdapter",
    "HatClient",
    "HatDistillation",
    "HatModule",
    "InProcess",
    "InputModel",
    "Job",
    "Limits",
    "LinkLostError",
    "MedusaConversation",
    "MedusaHeads",
    "RowFormat",
    "ServerKeys",
    "Span",
    "SplitModel",
    "Timings",
    "Upload",
    "UploadRefusedError",
    "accept_length",
    "chunk_size",
    "draw_timeline",
    "fingerprint",
    "next_batch",
    "split",
]
