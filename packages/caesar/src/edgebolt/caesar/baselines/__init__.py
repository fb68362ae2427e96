"""What Caesar is compared with, on the same codecs and the same byte coding."""

from edgebolt.caesar.baselines.capability import CAC, FIC, FlexCom, LinkRatios
from edgebolt.caesar.baselines.fed_qsgd import FedQSGD
from edgebolt.caesar.baselines.pyramidfl import GradientRatios, PyramidFL, ReportNorm
from edgebolt.caesar.baselines.stc import STC, KeepReceived, MissedSteps

__all__ = [
    "CAC",
    "FIC",
    "STC",
    "FedQSGD",
    "FlexCom",
    "GradientRatios",
    "KeepReceived",
    "LinkRatios",
    "MissedSteps",
    "PyramidFL",
    "ReportNorm",
]
