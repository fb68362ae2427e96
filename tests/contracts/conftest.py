import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

# The helpers of this folder (runs, toys, algorithms ...) are plain modules beside the tests: importlib mode puts no
# folder on the path, and the folder may have been copied elsewhere.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    """Lightning's advice that is no news here: hundreds of lines of it."""
    for message in ("Be aware that when using `ckpt_path`", ".isinstance.treespec, LeafSpec.. is deprecated",
                    ".*was called without a model", "Checkpoint directory .* exists and is not empty"):  # fmt: skip
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def quiet_and_single_threaded():
    """No banners, one thread, and the handler of Ctrl-C that Lightning takes away when it is pressed."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    lightning = ["lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.cloud_io"]
    foreign = ["pytorch_lightning", "pytorch_lightning.utilities.rank_zero"]  # takes over once it is imported
    loggers = [logging.getLogger(name) for name in (*lightning, *foreign, "edgebolt.common.federated.loop")]
    levels = [logger.level for logger in loggers]
    torch.set_num_threads(1)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
