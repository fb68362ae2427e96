"""A module's tensors before the run, and their digest: all devices must begin alike."""

from __future__ import annotations

import hashlib

import lightning as L
import torch

from edgebolt.common.communication import Tensors

__all__ = ["digest", "federated_tensors"]


def federated_tensors(module: L.LightningModule) -> Tensors:
    """What is federated of a module, as its devices have it from the beginning; the server takes the same.

    Trainable parameters, and persistent floating buffers without infinities.
    """
    persistent = module.state_dict().keys()
    floating = {n: b for n, b in module.named_buffers() if n in persistent and b.is_floating_point()}
    averaged = {name: buffer for name, buffer in floating.items() if bool(buffer.isfinite().all())}
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in {**trained, **averaged}.items()}


def digest(module: L.LightningModule, initial: Tensors) -> str:
    """One line for a module's parameters and persistent buffers.

    Args:
        module: whose frozen tensors are as they were in the beginning.
        initial: the others, as they were then.

    Example::

        >>> module = L.LightningModule()
        >>> digest(module, {}) == digest(module, federated_tensors(module))
        True
    """
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    tensors = {**dict(module.named_parameters()), **buffers, **initial}
    found = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        found.update(f"{name} {flat.dtype} {tuple(tensors[name].shape)}\n".encode())
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
