from itertools import pairwise

import pytest
import torch

from edgebolt.common.devices import count_step
from edgebolt.common.lora import adapter_layers, set_depth

LAYERS = 3


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_gradients_exist_exactly_in_the_top_layers(module, batch, depth):
    net = module()
    set_depth(net, depth)
    torch.nn.init.normal_(net.model.get_base_model().classifier.weight)
    net.training_step(batch, 0).backward()
    parameters = dict(net.named_parameters())
    layers = adapter_layers(parameters)
    with_gradient = {layers[name] for name in layers if parameters[name].grad is not None}
    assert with_gradient == set(range(LAYERS - depth, LAYERS))  # Λ(1) = {L-1}, Λ(L) = {0..L-1}
    others = {name for name in parameters if name not in layers and parameters[name].grad is not None}
    assert others == {name for name in parameters if "classifier" in name or "pooler" in name}


def test_what_is_saved_for_backward_and_its_operations_grow_with_the_depth(module, batch):
    net, costs = module(), []
    for depth in range(1, LAYERS + 1):
        set_depth(net, depth)
        costs.append(count_step(net, batch))
    saved = [cost.saved_bytes for cost in costs]
    growth = [after - before for before, after in pairwise(saved)]
    assert saved[0] > 0 and growth[0] > 0.3 * saved[0]  # a layer's activations, not a rounding
    assert max(growth) < 1.05 * min(growth)  # each layer alike
    assert [cost.flops for cost in costs] == sorted({cost.flops for cost in costs})


def test_gradient_checkpointing_with_input_gradients_undoes_the_saving(module, batch):
    net = module()
    set_depth(net, 1)
    lean = count_step(net, batch).saved_bytes
    net.model.get_base_model().enable_input_require_grads()
    assert count_step(net, batch).saved_bytes > 1.5 * lean  # why the docstring warns of it


def test_refusals(module):
    net = module()
    for depth in (0, LAYERS + 1, 1.5, True):
        with pytest.raises(ValueError, match="3 layers carry LoRA; train 1 to 3"):
            set_depth(net, depth)
    with pytest.raises(ValueError, match="Linear has no LoRA layers: add them with"):
        set_depth(torch.nn.Linear(2, 2), 1)
