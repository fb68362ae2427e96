"""What FLUDE is compared with, on the same devices, failures and deadlines."""

from edgebolt.flude.baselines.impatient import ImpatientFedAvg, OortFedAvg
from edgebolt.flude.baselines.mifa import MIFA
from edgebolt.flude.baselines.safa import SAFA

__all__ = ["MIFA", "SAFA", "ImpatientFedAvg", "OortFedAvg"]
