import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tiny_hat.py: importlib mode puts no folder on the path
