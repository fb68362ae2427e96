"""Every ```python block of the README and the docs runs as it stands, in the order of the page."""

import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.text import fine_tuning

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md"))
    if "```python" in page.read_text()
)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # of a packaged model two layers will do: examples/legend.py has all of it
    monkeypatch.setattr(fine_tuning, "load_pretrained", partial(fine_tuning.load_pretrained, num_hidden_layers=2))
    torch.manual_seed(0)
    x, y = torch.randn(400, 8), torch.randint(3, (400,))
    names = {
        "L": L,
        "module": Classifier(),
        "loader": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        "val_loader": DataLoader(TensorDataset(x, y), batch_size=100),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    if page.name == "comp.md" or page.parent.name == "comp":  # no rounds: its report has what was asked for
        assert 0.18 < names["report"].ratio < 0.22
        return
    if page.name == "hat.md" or page.parent.name == "hat":
        assert names["same"]
        return
    strategy = names["strategy"]
    trainer = L.Trainer(max_epochs=2, strategy=strategy, logger=False, enable_checkpointing=False)
    trainer.fit(names["module"], names["loader"])
    assert len(strategy.history) == 2  # the page's last strategy trains
