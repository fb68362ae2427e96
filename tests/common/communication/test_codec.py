import pytest
import torch

from edgebolt.common.communication import Codec, Dense, Float16, Message, MessageError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def over_the_wire(message):
    return Message.from_bytes(message.to_bytes())


def state(*dtypes):
    generator = torch.Generator().manual_seed(0)
    return {str(dtype): (torch.randn(3, 4, generator=generator) * 10).to(dtype) for dtype in dtypes}


def test_codec_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Codec()


@pytest.mark.parametrize("codec", [Dense(), Float16()])
class TestEveryCodec:
    def test_names_itself(self, codec):
        assert codec.encode({}).header["codec"] == codec.name
        codec.check_name(codec.encode({}))

    def test_refuses_the_message_of_another(self, codec):
        for header in ({}, {"codec": "other"}, {"codec": None}, {"codec": [codec.name]}):
            with pytest.raises(MessageError, match="same codec"):
                codec.decode(Message({}, header))

    def test_keeps_names_shapes_and_dtypes(self, codec):
        tensors = {
            **state(*FLOATS, *OTHERS),
            "scalar": torch.tensor(1.5),
            "empty": torch.ones(0, 2),
            "é": torch.ones(1),
        }
        decoded = codec.decode(over_the_wire(codec.encode(tensors)))
        assert {n: (t.shape, t.dtype) for n, t in decoded.items()} == {
            n: (t.shape, t.dtype) for n, t in tensors.items()
        }

    def test_integers_are_exact(self, codec):
        tensors = {"big": torch.tensor([2**62 + 1, -(2**63)]), **state(*OTHERS)}
        decoded = codec.decode(over_the_wire(codec.encode(tensors)))
        assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())

    def test_leaves_its_input_alone(self, codec):
        tensors = state(*FLOATS)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        names = list(tensors)
        decoded = codec.decode(over_the_wire(codec.encode(tensors)))
        for tensor in decoded.values():
            tensor.zero_()
        assert list(tensors) == names
        assert all(torch.equal(tensor, copies[name]) for name, tensor in tensors.items())

    def test_the_rest_of_the_header_does_not_matter(self, codec):
        tensors = state(torch.float32)
        message = codec.encode(tensors).with_header(visit={"client": 3}, report=None)
        assert torch.equal(
            codec.decode(message)["torch.float32"], codec.decode(codec.encode(tensors))["torch.float32"]
        )

    def test_memory_is_not_needed(self, codec):
        message = codec.encode(state(torch.float32))
        assert torch.equal(
            codec.decode(message, {"stale": 1})["torch.float32"], codec.decode(message, None)["torch.float32"]
        )


class TestDense:
    def test_exact(self):
        tensors = state(*FLOATS)
        tensors["special"] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
        decoded = Dense().decode(over_the_wire(Dense().encode(tensors)))
        for name, tensor in tensors.items():
            assert torch.equal(decoded[name].view(torch.uint8), tensor.view(torch.uint8))

    def test_does_not_copy(self):
        tensors = state(torch.float32)
        assert Dense().decode(Dense().encode(tensors))["torch.float32"] is tensors["torch.float32"]

    def test_decoded_dict_is_the_callers_own(self):
        message = Dense().encode(state(torch.float32))
        Dense().decode(message).clear()
        assert len(Dense().decode(message)) == 1


class TestFloat16:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_rounding_to_float16(self, dtype):
        values = torch.cat([torch.linspace(-65504, 65504, 5001), torch.logspace(-9, 4, 5001)]).to(dtype)
        decoded = Float16().decode(over_the_wire(Float16().encode({"w": values})))["w"]
        assert torch.equal(decoded, values.to(torch.float16).to(dtype))

    def test_error_bounds_of_the_docstring(self):
        values = torch.logspace(-9, 4.8, 10_001, dtype=torch.float64)
        values = values[values <= 65504]
        error = (Float16().decode(Float16().encode({"w": values}))["w"] - values).abs()
        normal = values >= 2**-14
        assert bool((error[normal] <= values[normal] * 2**-11).all())
        assert bool((error[~normal] <= 2**-25).all())

    def test_halves_the_bytes_of_float32(self):
        tensors = {"w": torch.ones(100, 100)}
        assert Dense().encode(tensors).nbytes - Float16().encode(tensors).nbytes == pytest.approx(20_000, abs=40)

    def test_float16_and_integers_are_not_copied(self):
        tensors = {"half": torch.ones(3, dtype=torch.float16), "count": torch.tensor(3)}
        decoded = Float16().decode(Float16().encode(tensors))
        assert decoded["half"] is tensors["half"]
        assert decoded["count"] is tensors["count"]

    def test_overflow_stays_visible(self):
        assert Float16().encode({"w": torch.tensor([65519.0])}).is_finite()
        message = Float16().encode({"w": torch.tensor([65520.0, -1e30])})
        assert not message.is_finite()
        assert Float16().decode(message)["w"].tolist() == [float("inf"), -float("inf")]

    def test_header_is_one_word_if_all_are_alike(self):
        tensors = {"a": torch.ones(1), "b": torch.ones(2), "n": torch.tensor(1)}
        assert dict(Float16().encode(tensors).header) == {"codec": "float16", "dtype": "float32"}
        assert dict(Float16().encode({"n": torch.tensor(1)}).header) == {"codec": "float16"}

    def test_other_floating_dtypes_are_refused(self):
        with pytest.raises(TypeError, match=r"'w' has dtype torch.float8_e5m2: convert it"):
            Float16().encode({"w": torch.ones(1).to(torch.float8_e5m2)})

    def test_header_names_the_exceptions(self):
        tensors = {"a": torch.ones(1), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.float64)}
        header = Float16().encode(tensors).header
        assert header["dtype"] == "float32"
        assert header["exceptions"] == {"c": "float64"}

    def test_order_of_the_tensors_does_not_change_the_bytes(self):
        tensors = state(*FLOATS)
        backwards = dict(reversed(tensors.items()))
        assert Float16().encode(tensors).to_bytes() == Float16().encode(backwards).to_bytes()

    @pytest.mark.parametrize(
        ("tensors", "fields", "words"),
        [
            ({"w": torch.ones(1)}, {"dtype": "float32"}, "travelled as torch.float32"),
            ({"w": torch.ones(1).half()}, {}, r"header\['dtype'\] must be there"),
            ({"w": torch.tensor(1)}, {"dtype": "float32"}, r"header\['dtype'\] must be there"),
            ({"w": torch.ones(1).half()}, {"dtype": None}, "had dtype None"),
            ({"w": torch.ones(1).half()}, {"dtype": "int64"}, "had dtype 'int64'"),
            ({"w": torch.ones(1).half()}, {"dtype": ["float32"]}, r"had dtype \['float32'\]"),
            ({"w": torch.ones(1).half()}, {"dtype": "float32", "exceptions": {"v": "float64"}}, "must name floating"),
            ({"w": torch.ones(1).half()}, {"dtype": "float32", "exceptions": ["w"]}, "must name floating"),
            ({"w": torch.ones(1).half()}, {"dtype": "float32", "exceptions": {"w": "bool"}}, "had dtype 'bool'"),
            ({"n": torch.tensor(1)}, {"exceptions": {"n": "float64"}}, "must name floating"),
        ],
    )
    def test_inconsistent_messages(self, tensors, fields, words):
        with pytest.raises(MessageError, match=words):
            Float16().decode(Message(tensors, {"codec": "float16", **fields}))
