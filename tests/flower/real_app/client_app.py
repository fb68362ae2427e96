from small_run import Net, client_loader, remembering

from edgebolt.flower import client_app


def my_data(context):
    return client_loader(context.node_config["partition-id"])


app = client_app(Net, my_data, remembering(), accelerator="cpu")
