"""``python -m edgebolt.hat cloud`` serves the middle layers, ``python -m edgebolt.hat chat`` is a device."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from edgebolt.common.decoding import LayerStack, TokenChoice
from edgebolt.common.text import load_pretrained, load_tokenizer
from edgebolt.hat.adapter import HatAdapter
from edgebolt.hat.client import HatClient
from edgebolt.hat.cloud_engine import CloudEngine, Limits
from edgebolt.hat.cloud_model import CloudModel
from edgebolt.hat.cloud_server import CloudServer
from edgebolt.hat.conversation import Drafting
from edgebolt.hat.dialogue import UploadRefusedError
from edgebolt.hat.fingerprint import fingerprint
from edgebolt.hat.row_format import FORMATS
from edgebolt.hat.split_model import split
from edgebolt.hat.tls import DeviceKeys, ServerKeys

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def parser() -> argparse.ArgumentParser:
    """Of both commands."""
    found = argparse.ArgumentParser(prog="python -m edgebolt.hat", description="HAT: a language model split in two.")
    commands = found.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--model", required=True, help="folder, 'smollm2' or name on the hub, the same on both sides")
    both.add_argument("--device-layers", type=int, default=2, help="layers of the device; the same on both sides")
    both.add_argument("--dtype", choices=DTYPES, default="float32")
    both.add_argument("--tls-cert", help="certificate chain of this side, PEM")
    both.add_argument("--tls-key", help="its private key, PEM")
    cloud = commands.add_parser("cloud", parents=[both], help="serve the middle layers")
    cloud.add_argument("--client-ca", help="authority whose certificates devices must have, PEM")
    cloud.add_argument("--host", default="127.0.0.1")
    cloud.add_argument("--port", type=int, default=50051)
    cloud.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cloud.add_argument("--threads", type=int, help="of torch")
    cloud.add_argument("--batch-tokens", type=int, default=512, help="rows of a batch; 0: no limit")
    cloud.add_argument("--cache-gib", type=float, default=4.0, help="of all conversations' keys and values")
    chat = commands.add_parser("chat", parents=[both], help="talk to the model")
    chat.add_argument("--cloud", required=True, help="host:port")
    chat.add_argument("--ca", help="authority of the cloud's certificate, PEM")
    chat.add_argument("--adapter", help="of HatAdapter.save; without it nothing is drafted")
    chat.add_argument("--rows", choices=FORMATS, help="of hidden states on the link; by default --dtype")
    chat.add_argument("--threshold", type=float, default=Drafting().threshold, help="below which a draft ends")
    chat.add_argument("--new-tokens", type=int, default=128, help="of an answer at most")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    chat.add_argument("--seed", type=int, default=0)
    chat.add_argument("--prompt", help="ask this alone, then leave")
    return found


def keys(args: argparse.Namespace, kind: Any, authority: str) -> Any:
    """Certificates of the command line, or None; some but not all are an error."""
    ca = getattr(args, authority.removeprefix("--").replace("-", "_"))
    given = {"--tls-cert": args.tls_cert, "--tls-key": args.tls_key, authority: ca}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: certificates go with all of {', '.join(given)}.")
    return kind(*given.values())


async def serve(args: argparse.Namespace) -> None:
    """Until a signal ends it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    certificates = keys(args, ServerKeys, "--client-ca")
    model = load_pretrained("AutoModelForCausalLM", args.model, dtype=DTYPES[args.dtype])
    parts = split(model, args.device_layers)
    name, longest, width = fingerprint(parts), parts.longest, parts.width
    middle = parts.middle.to(args.device)
    del model, parts  # the device's layers and the head are not needed here
    engine = CloudEngine(CloudModel(middle), Limits(args.batch_tokens or None, int(args.cache_gib * 2**30)))
    server = CloudServer(engine, width, name, longest)
    port = await server.start(args.host, args.port, certificates)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    link = "with certificates" if certificates else "in plain text, on this machine alone"
    print(f"{len(middle.layers)} layers of {args.model} at {args.host}:{port}, {link}. Ctrl-C ends it.", flush=True)
    await stop.wait()
    print("Answering what has come in …", flush=True)
    await server.stop()


def talk(args: argparse.Namespace) -> None:
    """Ask and print, until the input ends."""
    from transformers import TextStreamer

    certificates = keys(args, DeviceKeys, "--ca")
    model = load_pretrained("AutoModelForCausalLM", args.model, dtype=DTYPES[args.dtype])
    tokenizer = load_tokenizer(args.model)
    adapter = None if args.adapter is None else HatAdapter.load(args.adapter, model)
    parts = replace(split(model, args.device_layers), middle=LayerStack([]))  # the cloud has the middle
    del model
    choice, drafting = TokenChoice(args.temperature, seed=args.seed), Drafting(args.threshold)
    with HatClient(args.cloud, parts, adapter, rows=args.rows, keys=certificates, drafting=drafting) as client:
        said: list[dict[str, str]] = []
        for number, question in enumerate([args.prompt] if args.prompt else _questions()):
            said.append({"role": "user", "content": question})
            if tokenizer.chat_template:
                ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
            else:
                ids = tokenizer(question)["input_ids"]
            screen: Any = TextStreamer(tokenizer, skip_special_tokens=True)
            for tokens in client.stream(ids, args.new_tokens, choice, request=number):
                screen.put(torch.tensor(tokens))
            screen.end()
            found = client.last
            said.append({"role": "assistant", "content": tokenizer.decode(found.tokens, skip_special_tokens=True)})
            print(
                f"[{len(found.tokens)} tokens; the first after {found.timings.first:.2f} s, then "
                f"{found.timings.between * 1e3:.0f} ms each; {found.accept_length:.2f} a round; "
                f"{found.sent / 1e3:.0f} kB up, {found.received / 1e3:.0f} kB down]",
                file=sys.stderr,
            )


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question:
            yield question


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 2 for an error that the message explains."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        if args.command == "cloud":
            asyncio.run(serve(args))
        else:
            talk(args)
    except (ValueError, OSError, OverflowError, UploadRefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
