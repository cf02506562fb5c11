"""The vision tower as a graph. Without CUDA a replay is the work again, its results copied to where
those of the first run lie, as a graph would leave them."""

import copy
import gc
import weakref
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

import fastskip
from fastskip.generation import tower as towers
from fastskip.generation.tower import KEPT, MOST_IMAGES, TowerGraph, TowerGraphs
from tests.agreement import generate
from tests.batches import Batch, random_batch
from tests.models import Kind, tiny_llava

KINDS: tuple[Kind, ...] = (
    "llava",
    "llava_next_vicuna",
    "llava_onevision",
    "qianfan_ocr",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "janus",
    "ovis2",
    "fast_vlm",
)


def replayed(work: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Stands for a CUDA graph."""
    graph: TowerGraph = work.__self__  # type: ignore[attr-defined]
    work()
    there = graph._output

    def replay() -> None:
        work()
        for old, new in zip(tensors_of(there), tensors_of(graph._output), strict=True):
            old.copy_(new)
        graph._output = there

    return replay


def tensors_of(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found or ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.fixture(autouse=True)
def fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "capture", replayed)


@pytest.fixture(params=KINDS)
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_llava(request.param)


def prepared(plain: PreTrainedModel) -> Any:
    model = fastskip.apply_(copy.deepcopy(plain), impl="torch")
    graphs_of(model).captures = True
    return model


def graphs_of(model: Any) -> TowerGraphs:
    graphs: TowerGraphs = model._fastskip.tower
    return graphs


def batch_of(plain: PreTrainedModel, seed: int, images: tuple[int, ...] = (1, 1)) -> Batch:
    return random_batch(plain, seed=seed, images=images)


def other_images(batch: Batch, seed: int) -> Batch:
    """The same prompts about other pictures of the same sizes."""
    generator = torch.Generator().manual_seed(seed)
    images = tuple(
        (torch.randn(pixels.shape, generator=generator), size) for pixels, size in batch.images
    )
    return Batch(**{**vars(batch), "images": images})


def check(plain: PreTrainedModel, model: Any, batch: Batch) -> None:
    expected = plain.generate(**batch.inputs(), max_new_tokens=4, do_sample=False)
    assert torch.equal(generate(model, batch), expected[:, batch.columns :])


def test_one_graph_serves_other_images_of_the_same_size(plain: PreTrainedModel) -> None:
    model, batch = prepared(plain), batch_of(plain, 1)
    for number in range(4):
        check(plain, model, other_images(batch, number))
        assert len(graphs_of(model)) == min(number, 1)
    check(plain, model, batch)
    assert len(graphs_of(model)) == 1


def test_another_number_of_images_is_another_graph() -> None:
    plain = tiny_llava()
    model = prepared(plain)
    for images in ((1, 1), (1, 1), (2, 1), (2, 1), (1, 1), (2, 1)):
        check(plain, model, batch_of(plain, 2, images))
    assert len(graphs_of(model)) == 2


def test_without_memory_for_a_graph_the_tower_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(work: Callable[[], None], device: torch.device, pool: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(towers, "capture", capture)
    plain = tiny_llava()
    model = prepared(plain)
    for _ in range(4):
        check(plain, model, batch_of(plain, 1))
    assert len(graphs_of(model)) == 0


def test_few_are_kept() -> None:
    plain = tiny_llava()
    model = prepared(plain)
    for count in range(1, KEPT + 3):
        for _ in range(2):
            check(plain, model, batch_of(plain, 3, (count,)))
    assert len(graphs_of(model)) == KEPT


@pytest.mark.parametrize("captures", [None, False])
def test_off_where_there_is_no_gpu_or_so_wanted(captures: bool | None) -> None:
    plain = tiny_llava()
    model = fastskip.apply_(copy.deepcopy(plain), impl="torch")
    graphs_of(model).captures = captures
    for _ in range(3):
        check(plain, model, batch_of(plain, 1))
    assert len(graphs_of(model)) == 0


def test_weights_that_move() -> None:
    plain = tiny_llava()
    model, batch = prepared(plain), batch_of(plain, 1)
    for _ in range(2):
        check(plain, model, batch)
    (before,) = graphs_of(model)._graphs.values()
    for changed in (plain, model):
        weight = changed.model.vision_tower.pre_layrnorm.weight
        weight.data = 3 * weight.detach()
    for _ in range(3):
        check(plain, model, batch)
    (after,) = graphs_of(model)._graphs.values()
    assert after is not before


@pytest.mark.parametrize("where", ["tower", "layer"])
def test_a_users_hook_is_called_every_time(where: str) -> None:
    plain = tiny_llava()
    model, batch = prepared(plain), batch_of(plain, 1)
    for _ in range(2):
        check(plain, model, batch)
    tower = model.model.vision_tower
    calls: list[nn.Module] = []
    module = tower if where == "tower" else tower.encoder.layers[0]
    handle = module.register_forward_hook(lambda own, *_: calls.append(own))
    for number in range(1, 4):
        check(plain, model, batch)
        assert len(calls) == number
    assert len(graphs_of(model)) == 0
    handle.remove()
    for _ in range(3):
        check(plain, model, batch)
    assert len(graphs_of(model)) == 1


def test_results_outside_of_generate_are_their_callers() -> None:
    plain = tiny_llava()
    model, batch = prepared(plain), batch_of(plain, 1)
    for _ in range(3):
        check(plain, model, batch)
    with torch.no_grad():
        found = [
            model.get_image_features(pixel_values=other_images(batch, n).inputs()["pixel_values"])
            for n in range(3)
        ]
    first, second, third = (torch.stack(list(each.pooler_output)) for each in found)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_gradients_and_many_images_are_not_captured() -> None:
    plain = tiny_llava()
    model = prepared(plain)
    for _ in range(3):
        check(plain, model, batch_of(plain, 1, (MOST_IMAGES + 1,)))
    graphs, forward = graphs_of(model), type(plain.model.vision_tower).forward
    pixels = batch_of(plain, 1).inputs()["pixel_values"]
    with torch.enable_grad():
        for _ in range(3):
            found = graphs.run(model.model.vision_tower, forward, {"pixel_values": pixels})
    assert found.last_hidden_state.requires_grad
    for sizes in ([[8, 8]], torch.ones(1, 2)):  # what no key of a graph can hold
        given = {"pixel_values": pixels, "sizes": sizes}
        with torch.inference_mode():
            for _ in range(3):
                found = graphs.run(model.model.vision_tower, lambda _, **given: given, given)
                assert found == given
    assert len(graphs) == 0


def test_copies_start_without_graphs() -> None:
    plain = tiny_llava()
    model, batch = prepared(plain), batch_of(plain, 1)
    for _ in range(2):
        check(plain, model, batch)
    twin = copy.deepcopy(model)
    assert graphs_of(twin).captures
    assert len(graphs_of(twin)) == 0
    for _ in range(2):
        check(plain, twin, batch)
    assert len(graphs_of(twin)) == len(graphs_of(model)) == 1


def test_casts_of_autocast_are_not_baked_in() -> None:
    """They are freed where it ends."""
    plain = tiny_llava()
    model, batch = prepared(plain), batch_of(plain, 1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, batch)
    assert len(graphs_of(model)) == 0
    check(plain, model, batch)


class Adapted(nn.Linear):
    """Does something that no weight shows, as adapters do."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def test_modules_that_nobody_knows() -> None:
    plain = tiny_llava()
    for layer in plain.model.vision_tower.encoder.layers:
        layer.mlp.fc2.__class__ = Adapted
    model, batch = prepared(plain), batch_of(plain, 1)
    for factor in (1.0, 1.0, 1.0, 0.5):
        Adapted.factor = factor
        check(plain, model, batch)
    assert len(graphs_of(model)) == 0
    Adapted.factor = 1.0


def test_encoders_that_copy_from_the_host() -> None:
    plain = tiny_llava("got_ocr2")
    model, batch = prepared(plain), batch_of(plain, 1)
    for _ in range(3):
        check(plain, model, batch)
    assert len(graphs_of(model)) == 0


def test_a_model_goes_with_its_last_user() -> None:
    """Without a garbage collection: weights are much memory."""
    plain = tiny_llava()
    model = prepared(plain)
    for _ in range(3):
        check(plain, model, batch_of(plain, 1))
    assert len(graphs_of(model)) == 1
    held = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert held() is None
    finally:
        gc.enable()


def test_another_thread_runs_the_tower_itself() -> None:
    """Inside `generate` of the first one, whose graph has memory of its own."""
    plain = tiny_llava()
    model, batch = prepared(plain), batch_of(plain, 1)
    pixels = batch.inputs()["pixel_values"]
    found: list[Tensor] = []

    def look(*_: Any) -> None:
        thread = Thread(target=lambda: found.append(features_of(model, pixels)))
        thread.start()
        thread.join()

    with torch.no_grad():
        expected = features_of(plain, pixels)
    for _ in range(3):
        hook = model.get_decoder().register_forward_pre_hook(look)
        generate(model, batch)
        hook.remove()
    assert found and all(torch.equal(own, expected) for own in found)


@torch.no_grad()
def features_of(model: Any, pixels: Tensor) -> Tensor:
    return torch.cat(model.get_image_features(pixels).pooler_output)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_host_has_read_a_prompt_before_the_tower_runs(beams: int) -> None:
    """Else it would wait for the tower; beams share what it gives, which comes before them."""
    plain = tiny_llava()
    model = prepared(plain)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, inputs: seen.append(model._fastskip.ids is not None)
    )
    batch = batch_of(plain, seed=7)
    tokens = model.generate(**batch.inputs(), max_new_tokens=3, do_sample=False, num_beams=beams)
    expected = plain.generate(**batch.inputs(), max_new_tokens=3, do_sample=False, num_beams=beams)
    assert torch.equal(tokens, expected)
    encodes_ahead = hasattr(GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation")
    assert seen == [beams == 1 or not encodes_ahead]
