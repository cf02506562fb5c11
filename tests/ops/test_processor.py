"""What is read of the CPU, on CPUs of all makers."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastskip.ops import processor

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n"
AMD = INTEL.replace("GenuineIntel", "AuthenticAMD").replace("Intel(R) Xeon(R)", "AMD EPYC")
ARM = "processor\t: 0\nCPU implementer\t: 0x41\n"


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    facts = (processor.has_amx, processor.has_avx512, processor.has_mkl_for_others)
    for fact in facts:
        fact.cache_clear()
    yield
    for fact in facts:
        fact.cache_clear()


@pytest.mark.parametrize(
    ("text", "name", "has_mkl", "expected"),
    [
        (INTEL, "", True, False),
        (AMD, "", True, True),
        (AMD, "", False, False),
        (ARM, "aarch64", False, False),
        (None, "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True, False),
        (None, "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", True, True),
    ],
)
def test_whose_library_it_is(
    text: str | None,
    name: str,
    has_mkl: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(path: Path, encoding: str) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert processor.has_mkl_for_others() is expected


def test_tiles_are_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True}, raising=False)
    assert [processor.has_amx(kind) for kind in kinds] == [True, True, False, False]
    processor.has_amx.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as torch had it before
    assert not any(processor.has_amx(kind) for kind in kinds)
