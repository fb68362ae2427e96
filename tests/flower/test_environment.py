import pytest


def test_flower_is_here():
    pytest.importorskip(
        "flwr", reason="flwr needs an environment of its own (docs/flower.md): tests/flower are left out"
    )
