"""The devices' side; `flwr run` brings it to every SuperNode."""

from task import Net, loader

from edgebolt.common.federated import FedAvg
from edgebolt.flower import client_app


def my_data(context):
    client = context.node_config["partition-id"]
    return loader(100 + 20 * client, seed=1 + client)


app = client_app(Net, my_data, FedAvg())
