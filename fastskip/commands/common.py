"""What the subcommands share: options, checkpoints, devices and policies by name."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class CommandError(ValueError):
    """An argument that a command cannot use; names the option, its value and what is allowed."""


class Dtype(StrEnum):
    """Number format of the weights; AUTO is the checkpoint's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Checkpoint: a folder or a hub name. Default: the demo's small bundled one.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        help="What to skip: a policy file (.json, .yaml) or a preset such as image_ffn or "
        "image_ffn:start=4 (see [bold]fastskip policies[/]). Default: the policy saved with the "
        "checkpoint, else skip nothing.",
        show_default=False,
    ),
]
PoliciesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        help="A policy file or a preset such as image_ffn or image_ffn:start=4; repeat the "
        "option for several. Each is compared with fastskip's dense model, which always runs.",
        show_default=False,
    ),
]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        "-i",
        metavar="FILE",
        help="A JPEG, PNG or WebP file; repeat the option for several images.",
        show_default=False,
    ),
]
ImageFolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that image paths are relative to. Default: that of the file that names them.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="TYPE",
        help="Number format of the weights: auto (as saved), float32, bfloat16 or float16.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE", help='Device, such as "cpu" or "cuda:0". Default: a GPU if there is one.'
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPU threads. Default: torch's choice.")
]
BandwidthOption = Annotated[
    float | None,
    typer.Option(
        metavar="GB/S",
        help="Memory bandwidth for the floors, with --tflops. Default: measured on this machine.",
        show_default=False,
    ),
]
TflopsOption = Annotated[
    float | None,
    typer.Option(
        metavar="TFLOP/S",
        help="Matrix-multiply throughput for the floors, with --bandwidth.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


DENSE = "dense"
"""The preset that skips nothing, and the name of the baseline that policies are compared with."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SLOWEST, FASTEST = 1e-6, 1e9
"""Bounds of ceilings, in GB/s and TFLOP/s: beyond them floors underflow or are not finite."""
_UNFIT = re.compile(
    "the checkpoint has no|size mismatch|mismatched_sizes|conversion of the weights"
)
"""How fastskip and transformers word weights that do not fit: no exception type says it."""


def checkpoint(model: str | None) -> str:
    """The checkpoint given, or the demo's."""
    if model is None:
        from fastskip.demo import checkpoint_path

        model = str(checkpoint_path())
    if not (os.path.isdir(model) or HUB_NAME.fullmatch(model)):
        allowed = "an existing folder, or a hub name such as llava-hf/llava-1.5-7b-hf"
        raise CommandError(f"--model {model}: no such folder; allowed: {allowed}")
    return model


def dtype_for(model: str | None, dtype: Dtype) -> Dtype:
    """The dtype given; for the demo's model float32 by default, as in all its published results."""
    return Dtype.FLOAT32 if model is None and dtype is Dtype.AUTO else dtype


def prepare(threads: int | None = None) -> None:
    """Turn off loading bars, but not warnings; set the number of threads if given."""
    from transformers import logging

    logging.disable_progress_bar()
    if threads is not None:
        import torch

        cores = os.cpu_count() or 1
        if threads > cores:
            raise CommandError(f"--threads {threads}: allowed: 1 to {cores}, the CPUs here")

        torch.set_num_threads(threads)


@contextmanager
def reading(model: str) -> Iterator[None]:
    """Report checkpoint files that are missing, broken or do not fit as a `CommandError`."""
    from safetensors import SafetensorError

    allowed = "a folder or hub checkpoint with config and weights"
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0].removesuffix(".")
        if isinstance(error, json.JSONDecodeError):  # which does not say what was read
            reason = f"one of its JSON files is broken ({reason})"
        raise CommandError(f"--model {model}: {reason}; allowed: {allowed}") from error
    except (RuntimeError, ValueError) as error:
        if not _UNFIT.search(str(error)):
            raise
        reason = " ".join(str(error).removeprefix(f"{model}: ").split())
        problem = f"weights do not fit config.json ({reason})"
        raise CommandError(f"--model {model}: {problem}; allowed: {allowed}") from error


def config_of(model: str) -> Any:
    """The config of a checkpoint that fastskip supports; no weights are read."""
    from transformers import AutoConfig

    from fastskip.families import check_config
    from fastskip.loading import check_whole

    check_whole(model)
    with reading(model):
        try:
            config = AutoConfig.from_pretrained(model)
        except OSError:
            raise
        except ValueError as error:
            # raised if config.json has no model type, or one that transformers does not know
            raise OSError(error) from error
        except Exception as error:
            # values that do not fit, for which transformers has no type of its own
            raise OSError(f"config.json: {' '.join(str(error).split())}") from error
    check_config(config)
    return config


def pictures_of(images: list[Path] | None) -> list[Any]:
    """The images in these files."""
    from fastskip.prompts.images import load_image

    return [load_image(path) for path in images or ()]


def inputs_for(model: str, prompt: str, pictures: list[Any], max_new_tokens: int) -> Any:
    """Processor and model inputs; built before the weights load, so that errors come early."""
    from fastskip.prompts import build_inputs, processor_for

    config = config_of(model)
    processor = processor_for(model)
    return processor, build_inputs(
        processor, prompt, pictures, config=config, max_new_tokens=max_new_tokens
    )


def device_of(name: str | None) -> Any:
    """The device given, else a GPU if there is one.

    A GPU becomes the current device, since its current stream is the one that is timed.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("holds no data")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch build without CUDA
        # the rest of the message is about how torch was built
        reason = re.split(r"\n|\. ", str(error), maxsplit=1)[0]
        count = torch.cuda.device_count()
        allowed = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        raise CommandError(f"--device {name}: {reason}; allowed here: {allowed}") from error


def ceilings_of(
    bandwidth: float | None, tflops: float | None, dtype: Any, device: str | None
) -> Any:
    """Those given, else those measured on this machine."""
    from fastskip.machine import ceilings
    from fastskip.plan.costs import Ceilings

    if bandwidth is None and tflops is None:
        return ceilings(dtype, device_of(device))
    asked = bandwidth or 0, tflops or 0
    if not all(SLOWEST <= each <= FASTEST for each in asked):
        raise CommandError(
            f"--bandwidth {bandwidth} --tflops {tflops}: allowed: both, as numbers from "
            f"{SLOWEST:g} to {FASTEST:g}, or neither (then this machine is measured)"
        )
    return Ceilings(asked[0] * 1e9, asked[1] * 1e12)


def policy_of(policy: str | None) -> Any:
    """The policy given; None leaves the choice to the checkpoint."""
    from fastskip.policy import SkipPolicy
    from fastskip.policy.presets import hint_for, split_preset

    if policy is None:
        return None
    if split_preset(policy) is None and not os.path.isfile(policy):
        missing = f"no such file or preset{hint_for(policy)}"
        what = "is a folder" if os.path.isdir(policy) else missing
        allowed = "a policy file (.json, .yaml), or a preset that `fastskip policies` lists"
        raise CommandError(f"--policy {policy}: {what}; allowed: {allowed}")
    try:
        return SkipPolicy.coerce(policy)
    except OSError as error:
        allowed = "a readable policy file, or a preset"
        raise CommandError(f"--policy {policy}: {error}; allowed: {allowed}") from error


def named_policies(policies: list[str] | None) -> list[tuple[str, Any]]:
    """The policies given, by name, without the dense model, which always runs."""
    named = [(name, policy_of(name)) for name in policies or ()]
    if len({name for name, _ in named}) < len(named):
        raise CommandError(f"--policy {policies}: one is given twice; allowed: each once")
    return [(name, policy) for name, policy in named if name != DENSE]


def resolve_policy(policy: str | None, model: str, config: Any) -> Any:
    """The policy given, else the one that `load_model` would find with the checkpoint."""
    from fastskip.checkpoint_files import choose_policy

    return choose_policy(policy_of(policy), model, config, {})


def load(
    model: str, policy: Any, dtype: Dtype, device: str | None, *, impl: str | None = None
) -> Any:
    """The prepared model."""
    import fastskip

    place = device_of(device)
    with reading(model):
        return fastskip.load_model(model, policy=policy, dtype=dtype.value, device=place, impl=impl)


def load_plain(model: str, config: Any, dtype: Dtype, device: str | None) -> Any:
    """Hugging Face's own model, unprepared."""
    from fastskip.loading import load_unprepared
    from fastskip.sparse.checkpoint import LAYOUT_FILE

    place = device_of(device)
    if os.path.isfile(os.path.join(model, LAYOUT_FILE)):
        problem = "has sparse weights, which Hugging Face's own model cannot read"
        raise CommandError(f"--model {model}: {problem}; allowed: what prune --stored dense writes")
    with reading(model):
        return load_unprepared(model, config, place, dtype=dtype.value)
