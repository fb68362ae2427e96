"""Damaged and forged messages: what a peer that is broken, or means harm, may send."""

import copy

import torch

from edgebolt.common.communication import Message, MessageError

NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 63, 64, 255, 2**16, 2**31, 2**40, 2**47, 2**62, 1.5, None, True, "x", [], {}]


def mutate(message, rng):
    """A copy with one to three changes in tensors or header."""
    tensors = {name: tensor.clone() for name, tensor in message.tensors.items()}
    header = copy.deepcopy(dict(message.header))
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.5 and tensors:
            _damage(tensors, rng)
        else:
            _forge(header, rng)
    return Message(tensors, header)


def _damage(tensors, rng):
    name = list(tensors)[rng.integers(len(tensors))]
    tensor = tensors[name]
    kind = rng.integers(5)
    if kind == 0 and tensor.numel():  # a flipped bit
        data = tensor.view(-1).view(torch.uint8)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # cut off
        tensors[name] = tensor.reshape(-1)[: rng.integers(tensor.numel() + 1)]
    elif kind == 2:  # more than is announced
        tensors[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[: rng.integers(1, 9)]])
    elif kind == 3:
        del tensors[name]
    else:
        tensors[name] = tensor.to([torch.uint8, torch.float16, torch.int64, torch.float32][rng.integers(4)])


def _forge(header, rng):
    """Replace, add or take away a value somewhere."""
    places = [(header, key) for key in header]
    for holder, key in places:
        child = holder[key]
        places += (
            [(child, k) for k in (child if isinstance(child, dict) else range(len(child)))]
            if isinstance(child, dict | list)
            else []
        )
    if not places:  # an earlier change took all away
        return
    holder, key = places[rng.integers(len(places))]
    if rng.random() < 0.15:
        del holder[key]
    elif isinstance(holder[key], list) and rng.random() < 0.5:
        holder[key] = [*holder[key], NUMBERS[rng.integers(len(NUMBERS))]]
    elif isinstance(holder[key], str) and rng.random() < 0.5:
        holder[key] = ["all", "bitmap", "list", "golomb", "global", "tensor"][rng.integers(6)]
    else:
        holder[key] = copy.deepcopy(NUMBERS[rng.integers(len(NUMBERS))])


def survive(codec, messages, rng, count, memory):
    """Decode ``count`` mutated messages; returns how many were refused and the largest result, in bytes."""
    refused = largest = 0
    for index in range(count):
        message = mutate(messages[index % len(messages)], rng)
        try:
            decoded = codec.decode(Message.from_bytes(message.to_bytes()), memory if index % 2 else None)
        except MessageError:
            refused += 1
        else:
            largest = max(largest, sum(tensor.nbytes for tensor in decoded.values()))
    return refused, largest
