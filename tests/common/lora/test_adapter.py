import copy
import json

import pytest
import torch
from families import CONFIGS, causal, classifier
from tiny_text import bert

from edgebolt.common.lora import add_lora, export_adapter, ranks_of

LAYERS = 3


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 10)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_and_head_are_trained_and_nothing_else(kind):
    model = add_lora(classifier(kind), ranks=[1, 2, 3])
    assert ranks_of(model) == [1, 2, 3]
    heads = ("classifier.", "score.", "pooler.")
    assert all("lora_" in name or any(head in name for head in heads) for name in trainable(model))
    assert any(head in name for name in trainable(model) for head in heads)
    assert len([name for name in trainable(model) if "lora_A" in name]) == (3 if kind == "gpt2" else 6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_peft_loads_an_export_with_the_same_logits(kind, tmp_path):
    from peft import PeftModel

    base = classifier(kind).eval()
    model = perturb(add_lora(copy.deepcopy(base), ranks=[1, 2, 3])).eval()
    tokens = torch.arange(4, 16).view(2, 6)
    export_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not torch.equal(loaded(tokens).logits, base(tokens).logits)
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models_keep_their_head(kind, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel  # noqa: F401

    base = causal(kind).eval()
    model = perturb(add_lora(copy.deepcopy(base), ranks=2, targets=["query", "mlp"])).eval()
    assert all("lora_" in name for name in trainable(model))
    export_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    tokens = torch.arange(4, 16).view(2, 6)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_an_export_replaces_an_earlier_one_and_takes_a_module(module, tmp_path):
    net = module()
    export_adapter(net, tmp_path)
    first = (tmp_path / "adapter_model.safetensors").read_bytes()
    perturb(net)
    export_adapter(net, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != first


def test_peft_models_of_others_are_exported_too(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = bert().eval()
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])  # PEFT wraps the head itself
    model = perturb(get_peft_model(copy.deepcopy(base), config)).eval()
    export_adapter(model, tmp_path)
    tokens = torch.arange(4, 16).view(2, 6)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_refusals():
    for ranks in (0, [1, 2], [1, 2, 0], [1, 2, 2.5]):
        with pytest.raises(ValueError, match="one for each layer"):
            add_lora(bert(), ranks=ranks)
    for wrong in ({"targets": []}, {"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="targets="):
            add_lora(bert(), **wrong)
    with pytest.raises(ValueError, match="holds 0 PEFT models"):
        export_adapter(torch.nn.Linear(2, 2), "nowhere")
