import lightning as L
import pytest
import torch
from tiny_hat import llama
from torch.utils.data import DataLoader

from edgebolt.hat import GenerationMetrics, HatClient, HatModule

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
PROMPTS = [[7, 8, 9], [10], [11, 12]]


def predicted(prompts, **options):
    module, metrics = HatModule(llama(), new_tokens=6, device_layers=2, **options), GenerationMetrics(table=False)
    batches = L.Trainer(callbacks=[metrics], **QUIET).predict(module, DataLoader(prompts, 2, collate_fn=list))
    return [text for batch in batches for text in batch], metrics.values


def test_a_prediction_is_what_the_client_generates():
    texts, values = predicted(PROMPTS)
    with HatClient(None, llama(), device_layers=2) as client:
        alone = [client.generate(prompt, 6, request=number).tokens for number, prompt in enumerate(PROMPTS)]
    assert [text.tokens for text in texts] == alone
    assert values["generate/texts"] == 3 and values["generate/tokens"] == sum(map(len, alone))
    assert values["generate/accept_length"] == 1 and values["generate/hit_rate"] == 0  # nothing was drafted
    first = sum(text.timings.first for text in texts) / 3
    assert values["generate/ttft"] == pytest.approx(first, rel=1e-4)


def test_tensors_and_strings_are_prompts_too():
    ids = [text.tokens for text in predicted([[7, 8], [9, 10]])[0]]
    assert [text.tokens for text in predicted([torch.tensor([7, 8]), torch.tensor([9, 10])])[0]] == ids

    def tokenizer(text):
        return {"input_ids": [int(part) for part in text.split()]}

    assert [text.tokens for text in predicted(["7 8", "9 10"], tokenizer=tokenizer)[0]] == ids
    with pytest.raises(ValueError, match="has no tokenizer"):
        predicted(["7 8"])


def test_the_table_is_printed(capsys):
    module = HatModule(llama(), new_tokens=3, device_layers=2)
    L.Trainer(callbacks=[GenerationMetrics()], **QUIET).predict(module, DataLoader([[7, 8]], collate_fn=list))
    assert "ttft" in capsys.readouterr().out


def test_a_step_outside_of_a_prediction_is_refused():
    with pytest.raises(RuntimeError, match=r"during trainer\.predict alone"):
        HatModule(llama()).predict_step([[1]], 0)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="use one of"):
        HatClient(None, llama(), device_layers=2, rows="int4")
