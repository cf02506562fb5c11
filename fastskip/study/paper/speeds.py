"""Times of the models that are compared at equal compute: one caption, batch 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

import fastskip
from fastskip.demo.smaller import load
from fastskip.plan.single_call import SingleCall
from fastskip.study.paper.experiments import Cell, cells
from fastskip.study.paper.results import Speed
from fastskip.timing import race, time_once

BUDGET_S = 60.0


def contenders() -> tuple[Cell, ...]:
    """The cells to time: the dense model, two that skip blocks, and the smaller models."""
    by_name = {cell.name: cell for cell in cells()}
    return tuple(
        by_name[name] for name in ("dense", "half-nothing", "most-nothing", "medium", "small")
    )


def timed(
    chosen: Sequence[Cell],
    inputs: Mapping[str, Any],
    workload: SingleCall,
    rounds: int,
    device: torch.device,
) -> tuple[Speed, ...]:
    """Median times over rounds in which all models run in turn, without further training.

    `inputs`: one prompt on the device, with about the rows of `workload`. FLOPs and cache bytes
    are counted for `workload`, and as many new tokens are timed.
    """
    models = {
        cell.name: fastskip.apply_(load(cell.size).to(device), cell.policy) for cell in chosen
    }
    for model in models.values():
        model.generation_config.eos_token_id = None
    threads = torch.get_num_threads()
    runs = race(
        list(models),
        lambda name: time_once(models[name], inputs, workload.n_new),
        threads=[threads],
        rounds=rounds,
        budget_s=BUDGET_S,
        on_round=lambda: None,
    )
    found = []
    for cell in chosen:
        times, plan = runs[cell.name, threads], fastskip.plan_of(models[cell.name])
        found.append(
            Speed(
                cell.name,
                cell.label,
                ttft_s=median(each.ttft for each in times),
                tpot_s=median(each.decode for each in times),
                kv_bytes=plan.kv_bytes(workload.n_image, workload.n_text, workload.n_new - 1),
                flops=workload.cost(plan).flops,
            )
        )
    return tuple(found)
