"""Peers' rules against restatements that share no code with them."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastskip
from fastskip.demo import checkpoint_path
from fastskip.families import shape_of
from fastskip.policy import RouterRule, SkipPolicy, TokenClass
from fastskip.prompts import processor_for
from fastskip.study.calls import placed
from fastskip.study.evaluation.exam import Exam
from fastskip.study.paper.measuring import Effort, asked, items_of
from fastskip.study.search.block_influence import block_influence
from fastskip.study.search.calibrating import Calibrator
from fastskip.study.search.changes import policy_of
from fastskip.study.search.greedy_removal import greedy_removal
from fastskip.study.search.matching import LeftOut, Match, least_first
from fastskip.study.search.peers import Known, _removals, peers, without_blocks
from fastskip.study.search.seeking import milder
from fastskip.study.search.visual_contribution import FROZEN, frozen_in
from fastskip.study.similarity import similarities

ITEMS = items_of(asked(7, Effort(questions=3, captions=0)))


@pytest.fixture(scope="module")
def plain() -> Any:
    from transformers import LlavaForConditionalGeneration

    found = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    return found.eval()


@pytest.fixture(scope="module")
def exam(plain: Any) -> Exam:
    return Exam(
        ITEMS, processor_for(checkpoint_path()), config=plain.config, batch_size=4, new_tokens=6
    )


def test_block_influence_is_one_minus_the_mean_cosine(plain: Any, exam: Exam) -> None:
    inputs = exam.inputs(0)
    found = block_influence(similarities(plain, [inputs], new_tokens=0))
    with torch.inference_mode():
        states = plain(**placed(inputs, plain), output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    # the last state has the final norm in it, so the last block is left to the others
    for layer in range(len(states) - 2):
        a, b = states[layer][real].double(), states[layer + 1][real].double()
        cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        assert found[layer] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)
    assert least_first({0: 0.2, 1: 0.1, 2: 0.2, 3: 0.05}) == [3, 1, 0, 2]


@pytest.mark.parametrize(("depth", "published"), [(32, (7, 15, 23)), (40, (9, 19, 29))])
def test_rows_are_removed_where_peers_publish_it(depth: int, published: tuple[int, ...]) -> None:
    """PyramidDrop before the first layer of each later quarter, FastV before layer 2."""
    every = _removals(depth)
    pyramid = SkipPolicy.preset("pyramid_drop", stages=list(published), ratio=0.5)
    assert pyramid in every["pyramid_drop"]
    assert SkipPolicy.preset("fastv", after=1, ratio=0.5) in every["fastv"]
    shallow = [rule for each in _removals(3)["pyramid_drop"] for rule in each.removals]
    assert shallow and all(0 <= rule.after_layer < 2 for rule in shallow)


def test_sleb_is_told_where_dense_meets_the_budget(plain: Any) -> None:
    match = Match(shape_of(plain.config), lambda policy: 1.0, 1.0, lambda policy: 0.0)
    found = [
        each for each in peers(match, Known({}, {}, lambda policy: 0.0)) if each.name == "sleb"
    ]
    assert found == [LeftOut("sleb", "dense meets the budget")]


@pytest.mark.parametrize("limit", [0.1, 0.6, 0.9995, 1 - 1e-9])
@pytest.mark.parametrize("points", [0, 1, 2, 40])
def test_milder_budgets_have_names_of_their_own(limit: float, points: int) -> None:
    found = milder(limit, points)
    assert len(found) == points and all(limit < share < 1 for share in found.values())
    assert all(float(name.removeprefix("search at ")) > 0 for name in found)


def test_milder_budgets_are_named_briefly() -> None:
    assert list(milder(0.6, 2)) == ["search at 0.733", "search at 0.867"]
    assert list(milder(1.0, 2)) == ["search at 1"]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_removal_is_greedy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.random((5, 5))
    own = rng.random(5)

    def loss(gone: Any) -> float:
        return float(sum(own[n] for n in gone) + sum(pairs[a, b] for a in gone for b in gone))

    found = greedy_removal(5, loss, lambda gone: len(gone) >= 3)
    assert found is not None and len(found) == 3
    for count in range(3):
        before, taken = found[:count], loss(found[: count + 1])
        assert all(taken <= loss([*before, n]) for n in range(5) if n not in before)
    assert greedy_removal(2, loss, lambda gone: False) is None
    assert greedy_removal(2, loss, lambda gone: True) == []


def test_contribution_is_how_far_frozen_image_rows_move_the_answer(exam: Exam) -> None:
    """Hooks put image rows back to what they were before the block; K and V stay."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    inputs = placed(exam.inputs(0), model)
    is_image = inputs["input_ids"] == model.config.image_token_index
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=exam.new_tokens)
    width = inputs["input_ids"].shape[1]
    told = out[:, width:]
    ends = (told == model.generation_config.eos_token_id).long()
    asked_for = ends.cumsum(1) - ends == 0
    mask = torch.cat([inputs["attention_mask"], asked_for[:, 1:].long()], 1)
    given = {**inputs, "input_ids": out[:, :-1], "attention_mask": mask}
    given.pop("position_ids", None)
    image = F.pad(is_image, (0, told.shape[1] - 1))

    def logs() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(**given).logits[:, width - 1 :].log_softmax(-1)
        return found

    dense = logs()
    prepared = fastskip.load_model(checkpoint_path(), "dense", dtype="float32")
    calibrator = Calibrator(prepared, exam)
    assert len(calibrator) == int(asked_for.sum())
    contribution = {}
    for layer in (1, 4):

        def put_back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            kept = torch.where(image[..., None], before, after)
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        hook = model.model.language_model.layers[layer].register_forward_hook(
            put_back, with_kwargs=True
        )
        frozen = logs()
        hook.remove()
        p = dense.exp()
        kl = (p * (dense - frozen)).sum(-1)[asked_for].mean()
        found = calibrator.moved(policy_of([(layer, (FROZEN,))]))
        assert found.kl == pytest.approx(float(kl), rel=2e-3, abs=1e-5)
        surprise = -frozen.gather(-1, told[..., None])[..., 0][asked_for].mean()
        assert found.loss == pytest.approx(float(surprise), rel=2e-3, abs=1e-5)
        contribution[layer] = found.kl
    order = least_first(contribution)
    assert contribution[order[0]] <= contribution[order[1]]
    assert frozen_in([1, 4]) == policy_of([(1, (FROZEN,)), (4, (FROZEN,))])


def test_blocks_left_out_fit_text_only_models_too() -> None:
    found = without_blocks([1, 3])
    assert found.to_dict()["rules"][0]["tokens"] == "all" and not without_blocks([]).rules
    assert found == SkipPolicy.from_dict(found.to_dict())
    assert TokenClass.IMAGE in TokenClass


def test_pads_do_not_change_what_is_drawn(plain: Any, exam: Exam) -> None:
    """Draws go by positions, which pads do not take in `generate`."""
    prepared = fastskip.load_model(checkpoint_path(), "dense", dtype="float32")
    assert not exam.inputs(0)["attention_mask"].all()
    alone = Exam(
        ITEMS, processor_for(checkpoint_path()), config=plain.config, batch_size=1, new_tokens=6
    )
    together, one_by_one = Calibrator(prepared, exam), Calibrator(prepared, alone)
    router = RouterRule("1:7", skip="block", kind="random", rate=0.4)
    for policy in (SkipPolicy.preset("random_removal"), SkipPolicy(routers=(router,))):
        expected = one_by_one.moved(policy).kl
        assert expected > 0 and together.moved(policy).kl == pytest.approx(expected, rel=1e-3)
