"""Where there is a GPU: the model on it, and the cloud's delay for a model of Vicuna-7B's sizes."""

import copy

import pytest
import torch
from tiny_hat import CHOICE, autoregressive, llama, prompt

from edgebolt.hat import HatAdapter, HatClient
from edgebolt.hat.simulation import SPECBENCH_7B, measured_delay

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 8}


def test_a_measured_delay_has_a_value_for_each_count():
    found = measured_delay(SMALL, layers=2, tokens=(1, 4, 16), repeats=2, device="cpu", dtype=torch.float32)
    assert list(found) == [1, 4, 16] and all(seconds > 0 for seconds in found.values())


@pytest.mark.gpu
def test_a_text_on_a_gpu_is_the_models():
    model = copy.deepcopy(llama())
    expected = autoregressive(prompt(9), 24)  # before: on the processor, float64
    on_gpu = model.cuda()
    found = HatClient(None, on_gpu, HatAdapter(on_gpu), device_layers=1).generate(prompt(9), 24, CHOICE, stops=())
    assert [*prompt(9), *found.tokens] == expected


@pytest.mark.gpu
def test_the_cloud_of_a_7b_model():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 8}
    found = measured_delay(sizes, layers=30, tokens=(1, 8, 64, 256, 512, 1024), device="cuda", dtype=torch.float16)
    modelled = SPECBENCH_7B.cloud
    for tokens, seconds in found.items():
        stage = modelled.stages * modelled.stage(tokens)
        print(f"{torch.cuda.get_device_name()}: g({tokens}) = {seconds * 1e3:.1f} ms; modelled {stage * 1e3:.1f} ms")
    assert found[1] < found[1024]
