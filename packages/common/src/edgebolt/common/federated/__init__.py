"""Federated learning inside a Lightning ``Trainer``: one epoch is one communication round."""

from edgebolt.common.federated.algorithm import (
    Aggregator,
    Algorithm,
    Closing,
    Configure,
    Selector,
    Submodel,
    Uniform,
    WeightedMean,
)
from edgebolt.common.federated.client import ClientCallback, ErrorFeedback, KeepModel, KeepMoments, ReportLoss
from edgebolt.common.federated.client_index import ClientIndex
from edgebolt.common.federated.deadline import Deadline
from edgebolt.common.federated.device import Device
from edgebolt.common.federated.fedavg import FedAvg, FedAvgStrategy
from edgebolt.common.federated.fedprox import FedProx, FedProxStrategy, Proximal
from edgebolt.common.federated.oort import Oort
from edgebolt.common.federated.partition import IID, ByKey, Dirichlet, Partition, Shards, Sizes
from edgebolt.common.federated.results import common_target, read_rounds, time_to
from edgebolt.common.federated.results_plot import compare
from edgebolt.common.federated.results_table import compare_table
from edgebolt.common.federated.round_plot import plot_round
from edgebolt.common.federated.server import Server
from edgebolt.common.federated.strategy import FederatedStrategy
from edgebolt.common.federated.summary import FederatedSummary
from edgebolt.common.federated.visit import Closed, Evaluation, Outcome, Update, Visit
from edgebolt.common.tables import print_table

__all__ = [
    "IID",
    "Aggregator",
    "Algorithm",
    "ByKey",
    "ClientCallback",
    "ClientIndex",
    "Closed",
    "Closing",
    "Configure",
    "Deadline",
    "Device",
    "Dirichlet",
    "ErrorFeedback",
    "Evaluation",
    "FedAvg",
    "FedAvgStrategy",
    "FedProx",
    "FedProxStrategy",
    "FederatedStrategy",
    "FederatedSummary",
    "KeepModel",
    "KeepMoments",
    "Oort",
    "Outcome",
    "Partition",
    "Proximal",
    "ReportLoss",
    "Selector",
    "Server",
    "Shards",
    "Sizes",
    "Submodel",
    "Uniform",
    "Update",
    "Visit",
    "WeightedMean",
    "common_target",
    "compare",
    "compare_table",
    "plot_round",
    "print_table",
    "read_rounds",
    "time_to",
]
