"""Federated runs on real devices, through Flower: its SuperLink and SuperNodes carry our orders and answers."""

from edgebolt.flower.client_app import client_app
from edgebolt.flower.engine import FlowerEngine
from edgebolt.flower.server_app import server_app

__all__ = ["FlowerEngine", "client_app", "server_app"]
