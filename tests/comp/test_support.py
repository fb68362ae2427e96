import pytest
import transformers

from edgebolt.comp.support import check_supported


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.MixtralConfig(), r"mixtral has 8 experts a layer .*Prune a dense model: .*'llama'"),
        (lambda: transformers.Qwen2MoeConfig(), r"qwen2_moe has 60 experts a layer \(num_experts\)"),
        (lambda: transformers.T5Config(), r"t5 is an encoder-decoder.*Prune an encoder or a decoder alone"),
        (lambda: transformers.BartConfig(), r"bart is an encoder-decoder"),
        (lambda: transformers.Phi3Config(), r"phi3 has its projections fused .*Rewrite the checkpoint with separate"),
        (
            lambda: transformers.OPTConfig(),
            r"'opt' cannot be pruned yet; these can: .*edgebolt.common.anatomy.FAMILIES",
        ),
        (
            lambda: transformers.BertConfig(add_cross_attention=True, is_decoder=True),
            r"bert model has cross-attention",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_a_way_out(config, message):
    with pytest.raises(NotImplementedError, match=message):
        check_supported(config())


def test_quantized_weights_are_refused():
    config = transformers.LlamaConfig()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(NotImplementedError, match=r"weights are quantized.*Prune the model before it is quantized"):
        check_supported(config)


def test_a_pruned_model_is_of_its_dense_family():
    from edgebolt.comp.pruned_models import CompLlamaConfig

    assert check_supported(CompLlamaConfig()) == check_supported(transformers.LlamaConfig()) == "llama"
