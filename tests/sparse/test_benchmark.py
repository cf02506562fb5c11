"""The benchmark of sparse products: forms are checked before they are timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import sparse
from benchmarks.sparse import Case, measure, table
from fastskip.sparse.linear import CsrLinear, Weights

CASE = Case((24, 48), 0.5, 3)


def test_measures_every_form() -> None:
    found = measure(CASE, rounds=2)
    assert not found.faults and tuple(found.samples) == CASE.forms
    records = [found.record(form) for form in found.samples]
    assert [len(own["samples_ms"]) for own in records] == [2, 2, 2]
    assert records[0]["speedup_vs_dense"] == 1 and records[0]["bytes"] == 4 * 24 * 48
    assert all(own["median_ms"] > 0 and own["device"] and own["torch"] for own in records)
    assert len(table(records).splitlines()) == 2 + len(records)


def test_a_wrong_form_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CsrLinear, "forward", lambda self, x: torch.zeros(len(x), 24))
    found = measure(CASE, rounds=1)
    assert list(found.faults) == [Weights.CSR] and Weights.CSR not in found.samples
    assert "allowed" in found.faults[Weights.CSR]


def test_main_fails_if_one_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparse, "cases", lambda device, shapes: [CASE])
    assert sparse.main([]) == 0
    assert "24 x 48" in capsys.readouterr().out

    def wrong(self: CsrLinear, x: Tensor) -> Tensor:
        return x[:, :24]

    monkeypatch.setattr(CsrLinear, "forward", wrong)
    assert sparse.main(["--save"]) == 1
    assert "csr is wrong" in capsys.readouterr().err


def test_main_reports_a_wrong_dense_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its time there is no speed-up of the others to print."""
    monkeypatch.setattr(sparse, "cases", lambda device, shapes: [CASE])
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x[:, :24])
    assert sparse.main([]) == 1
    printed = capsys.readouterr()
    assert "dense is wrong" in printed.err and "24 x 48" not in printed.out
