"""Linear routers that learn: what training computes, where rates go, and what is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.loading import watching_routers
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.routing import Decision, RoutingContext
from fastskip.study.training import Parts, Settings, train
from fastskip.study.training.gates import Gates, fresh_routers, weights_file
from fastskip.study.training.learner import Learner
from fastskip.study.training.measuring import batches_of, skipped_shares
from fastskip.verification.exact import compute_in_double
from tests.checkpoints import VOCAB
from tests.models import tiny_llava
from tests.training.conversations import examples, processor, recompute

LINEAR = {"layers": "1:4", "kind": "linear", "weights": "to come", "threshold": 0.25}
CAPPED = {
    "layers": "1:3",
    "kind": "linear",
    "weights": "to come",
    "capacity": 0.6,
    "tokens": ["image", "text"],
}


def policy_of(folder: Path, *routers: Any, **more: Any) -> SkipPolicy:
    document = {"schema_version": 1, "routers": list(routers), **more}
    return fresh_routers(SkipPolicy.from_dict(document), 4, 32, folder)


def model_of(policy: SkipPolicy, dtype: torch.dtype = torch.float32) -> Any:
    return fastskip.apply_(tiny_llava(vocab=VOCAB, dtype=dtype), policy)


def batch() -> dict[str, Tensor]:
    (found,) = batches_of(examples(4), processor(), Settings(batch=4), 1)
    return found


@pytest.mark.parametrize("skip", [["ffn"], ["attention"], ["block"]])
@pytest.mark.parametrize("kind", ["threshold", "capacity", "parallel"])
def test_training_computes_what_the_trained_router_will(
    skip: list[str], kind: str, tmp_path: Path
) -> None:
    rule = {**(CAPPED if kind == "capacity" else LINEAR), "skip": skip}
    parallel = [{"layers": [2], "kind": "parallel"}] if kind == "parallel" else []
    model = model_of(policy_of(tmp_path, rule, arrangements=parallel), torch.float64)
    compute_in_double(model.model.language_model, lambda handle: None)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    with torch.no_grad(), fastskip.record_routing(model) as record:
        expected = model(**given).logits
    assert 0 < record.rate < 1
    gates = Gates(model, 0.5)
    with watching_routers(model, gates.gate):
        actual = model(**given).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real])


BESIDE = [
    {"layers": [2, 3], "kind": "similarity", "threshold": 0.6, "skip": ["block"]},
    {"layers": [0], "kind": "random", "rate": 0.5, "skip": ["block"], "kv": "omit"},
]
"""Routers that stay as they are, above and below a linear one in layer 1."""


@pytest.mark.parametrize("skip", [["ffn"], ["attention"], ["block"]])
def test_others_decide_beside_it_as_they_will(skip: list[str], tmp_path: Path) -> None:
    rule = {**LINEAR, "layers": [1], "skip": skip}
    model = model_of(policy_of(tmp_path, BESIDE[0], rule, BESIDE[1]), torch.float64)
    compute_in_double(model.model.language_model, lambda handle: None)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    with torch.no_grad(), fastskip.record_routing(model) as record:
        expected = model(**given).logits
    assert all(0 < rate < 1 for rate in record.rates().values())
    gates = Gates(model, 0.5)
    with watching_routers(model, gates.gate):
        actual = model(**given).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real])


def test_what_stands_beside_it_is_kept(tmp_path: Path) -> None:
    rule = {**LINEAR, "layers": [1], "skip": ["ffn"]}
    model = model_of(policy_of(tmp_path / "start", BESIDE[0], rule, BESIDE[1]))
    started = fastskip.plan_of(model).policy.routers
    settings = Settings(parts=Parts.ROUTERS, rate=0.5, steps=2, batch=4)
    train(model, processor(), examples(), tmp_path / "run", settings)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["policy.json", weights_file(1)]
    found = SkipPolicy.from_file(tmp_path / "run" / "policy.json").routers
    assert (found[0], found[2]) == (started[0], started[2])
    before, after = ((tmp_path / name / weights_file(1)).read_bytes() for name in ("start", "run"))
    assert before != after


class Scaled:
    """A router of which every candidate runs, and counts as much as it is told."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def decide(self, context: RoutingContext) -> Decision:
        count = len(context.hidden)
        return Decision(torch.zeros(count, dtype=torch.bool), factor=self.factors[:count])


@pytest.mark.parametrize("skip", [["ffn"], ["attention"], ["block"]])
def test_gradients_of_factors(skip: list[str], tmp_path: Path) -> None:
    """Those of differences: the loss in double precision, a factor moved both ways."""
    rule = {"layers": [1, 3], "kind": "my.own", "skip": skip, "tokens": ["text", "generated"]}
    factors = torch.rand(400, dtype=torch.float64).requires_grad_()
    plain = tiny_llava(vocab=VOCAB, dtype=torch.float64)
    routers = {"my.own": Scaled(factors)}
    model: Any = fastskip.apply_(plain, {"schema_version": 1, "routers": [rule]}, routers=routers)
    compute_in_double(model.model.language_model, lambda handle: None)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    labels = given.pop("labels")

    def loss() -> Tensor:
        logits = model(**given, token_classes=torch.where(labels >= 0, 2, 1)).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])

    (gradient,) = torch.autograd.grad(loss(), factors)
    step = torch.finfo(torch.float64).eps ** (1 / 3)
    for index in (0, 7, 40):
        ends = []
        for moved in (step, -step):
            with torch.no_grad():
                factors[index] += moved
            ends.append(loss().detach())
            with torch.no_grad():
                factors[index] -= moved
        # The best step leaves an error of about its square, in units of the loss.
        difference = (ends[0] - ends[1]) / (2 * step)
        allowed = 100 * step**2 * max(1.0, float(ends[0]))
        assert abs(float(difference - gradient[index])) < allowed
        assert abs(float(gradient[index])) > 10 * allowed


@pytest.mark.parametrize("rate", [0.6, 0.9])
def test_the_wanted_rate_is_reached_and_loads_back(rate: float, tmp_path: Path) -> None:
    model = model_of(policy_of(tmp_path / "start", {**LINEAR, "skip": ["ffn"]}))
    settings = Settings(parts=Parts.ROUTERS, rate=rate, steps=60, batch=8, pressure=100)
    data = examples(16)
    held_out = batches_of(examples(40)[16:], processor(), settings, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    started = skipped_shares(model, held_out)
    trained = train(model, processor(), data, tmp_path / "run", settings)
    reached = skipped_shares(model, held_out)
    assert abs(reached[-1] - rate) < abs(started[-1] - rate) / 4
    assert sorted(reached) == [-1, 1, 2, 3]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.grad is not None for p in model.parameters())

    folder = tmp_path / "run"
    assert (folder / weights_file(0)).is_file()
    again = model_of(SkipPolicy.from_file(folder / "policy.json"))
    assert skipped_shares(again, held_out) == reached
    assert trained.policy == fastskip.plan_of(again).policy
    assert trained.policy.provenance["training"]["rate"] == rate
    trained.save(tmp_path / "whole", processor())
    loaded = fastskip.load_model(tmp_path / "whole")
    assert skipped_shares(loaded, held_out) == reached


def test_adapters_bring_the_routers_of_their_policy(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = model_of(policy_of(tmp_path / "start", {**LINEAR, "skip": ["ffn"]}))
    held_out = batches_of(examples(), processor(), Settings(), 1)
    trained = train(model, processor(), examples(), None, Settings(parts=Parts.LORA, steps=1))
    trained.save(tmp_path / "adapters")
    expected = skipped_shares(model_of(SkipPolicy.coerce(trained.policy)), held_out)
    shutil.rmtree(tmp_path / "start")
    moved = (tmp_path / "adapters").rename(tmp_path / "elsewhere")
    base = model_of(SkipPolicy.from_file(moved / "fastskip_policy.json"))
    assert skipped_shares(base, held_out) == expected


@pytest.mark.parametrize("beside", [[], BESIDE], ids=["alone", "beside others"])
@pytest.mark.parametrize("skip", [["ffn"], ["attention"], ["block"]])
def test_gradients_where_activations_are_computed_again(
    skip: list[str], beside: list[Any], tmp_path: Path
) -> None:
    rule = {**LINEAR, "layers": [1] if beside else "1:4", "skip": skip}
    model, found = model_of(policy_of(tmp_path, rule, *beside)).train(), []
    for wanted in (True, False):
        recompute(model, wanted=wanted)
        gates = Gates(model, 0.5)
        with watching_routers(model, gates.gate):
            loss = Learner(model, gates, 10.0)(**batch())["loss"]
        loss.backward()
        grads = {name: p.grad for name, p in gates.named_parameters() if p.grad is not None}
        found.append(grads)
    light, whole = found
    assert len(light) == 2 * (1 if beside else 3) and all(
        gradient.any() for gradient in whole.values()
    )
    for name, gradient in light.items():
        assert torch.equal(gradient, whole[name]), name


def test_capacities_need_no_rate(tmp_path: Path) -> None:
    model = model_of(policy_of(tmp_path, {**CAPPED, "skip": ["block"]}))
    before = model._fastskip.decoder.routers[0].terms(1).weight.clone()
    settings = Settings(parts=Parts.ROUTERS, steps=3, batch=4)
    trained = train(model, processor(), examples(), tmp_path / "run", settings)
    after = model._fastskip.decoder.routers[0].terms(1).weight
    assert not torch.equal(before, after) and len(trained.losses) == 3
    # What runs is rounded up, sequence by sequence.
    shares = skipped_shares(model, batches_of(examples(), processor(), settings, 2))
    assert all(0.3 < share <= 0.4 for share in shares.values())


def test_a_run_goes_on(tmp_path: Path) -> None:
    found = []
    for name in ("straight", "cut"):
        model = model_of(policy_of(tmp_path / name, {**LINEAR, "skip": ["ffn"]}))
        out, options = tmp_path / name / "run", {"rate": 0.5, "batch": 4, "save_every": 2}
        settings = Settings(parts=Parts.ROUTERS, steps=4, resume=True, **options)  # type: ignore[arg-type]

        def stop(step: int, steps: int, loss: float, name: str = name) -> None:
            if name == "cut" and step == 3:
                raise KeyboardInterrupt

        try:
            train(model, processor(), examples(), out, settings, on_step=stop)
        except KeyboardInterrupt:
            train(model, processor(), examples(), out, settings)
        found.append((out / weights_file(0)).read_bytes())
    assert found[0] == found[1]


RUN = """
import sys
from pathlib import Path
from tests.training.test_routers import *

folder = Path(sys.argv[1])
settings = Settings(parts=Parts.ROUTERS, rate=0.5, steps=2, batch=4, learning_rate=0.1, warmup=0)
model = model_of(policy_of(folder, {**LINEAR, "skip": ["block"]}))
train(model, processor(), examples(), folder / "run", settings)
"""


def test_every_process_trains_the_same(tmp_path: Path) -> None:
    """Whatever order the sets of a process have: those of its seeds 1 and 3 differ."""
    found = []
    for seed in ("1", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", RUN, str(tmp_path / seed)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found.append((tmp_path / seed / "run" / weights_file(0)).read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("routers", "settings", "message"),
    [
        ([], {"rate": 0.5}, "no routers to train"),
        (
            [{"layers": [1], "kind": "random", "rate": 0.5, "skip": ["ffn"]}],
            {"rate": 0.5},
            r"routers\[0\].kind",
        ),
        ([{**LINEAR, "skip": ["attention"], "kv": "omit"}], {"rate": 0.5}, r"routers\[0\].kv"),
        (
            [
                {**LINEAR, "layers": [1], "skip": ["ffn"]},
                {"layers": [2], "kind": "paper.exit", "skip": ["block"], "kv": "omit"},
            ],
            {"rate": 0.5},
            r"routers\[1\].kind: got 'paper.exit'; allowed: linear, beside which",
        ),
        ([{**LINEAR, "skip": ["ffn"]}], {}, "rate: got None"),
    ],
)
def test_routers_that_cannot_learn(
    routers: list[Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = model_of(policy_of(tmp_path, *routers))
    with pytest.raises(PolicyError, match=message):
        chosen = Settings(parts=Parts.ROUTERS, steps=1, **settings)
        train(model, processor(), examples(), tmp_path / "run", chosen)
