"""Launch accounting: a skipped sublayer adds none, and what is counted is what runs."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastskip
from benchmarks import launches as launch_table
from benchmarks.gpu.profiling import weight_bytes
from fastskip.cli import app
from fastskip.kernels import launch, tuning
from fastskip.launches import Account, decode_launches, prefill_launches
from fastskip.ops.account import counted
from fastskip.plan import ModelShape, make_plan
from fastskip.policy import SkipPolicy
from tests.batches import random_batch
from tests.device.interpreted import STREAM
from tests.models import tiny_llava
from tests.policies import MIXED, Policy, pair, parallel, policy_of, skip
from tests.routing.routed import random, routed, similarity

# LLaVA-1.5-7B.
SHAPE = ModelShape(
    depth=32,
    hidden_size=4096,
    ffn_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    has_images=True,
    dtype_bytes=2,
    max_positions=4096,
)
TABLE = "nvidia-h200"


def decode(policy: Policy, batch: int = 1) -> Account:
    return decode_launches(make_plan(SkipPolicy.from_dict(policy), SHAPE), batch, 768, TABLE)


def prefill(policy: Policy) -> Account:
    return prefill_launches(make_plan(SkipPolicy.from_dict(policy), SHAPE), 576, 64, 1, TABLE)


def difference(dense: Account, skipping: Account) -> dict[str, int]:
    """Launches that a policy saves, by kernel."""
    names = dense.by_kernel.keys() | skipping.by_kernel.keys()
    none = (0, 0)
    saved = {
        name: dense.by_kernel.get(name, none)[0] - skipping.by_kernel.get(name, none)[0]
        for name in names
    }
    return {name: count for name, count in saved.items() if count}


HALF_PAIRS = policy_of(arrangements=(pair([[i, i + 1] for i in range(0, 16, 2)]),))
DENSE = policy_of()
EVEN = [*range(0, 32, 2)]


def test_a_dense_step_takes_five_launches_a_layer_and_three() -> None:
    account = decode(DENSE)
    assert account.launches == 5 * 32 + 3
    assert account.by_kernel["project_append"][0] == account.by_kernel["attend_step"][0] == 32


@pytest.mark.parametrize("batch", [1, 2, 16, 64])
def test_a_skipped_block_adds_nothing_to_a_step(batch: int) -> None:
    dense, half = decode(DENSE, batch), decode(policy_of(skip(EVEN, "all", "block")), batch)
    per_layer = {name: launches for name, (launches, _) in dense.by_kernel.items() if launches > 4}
    # Half of every kernel that runs a layer, programs included.
    assert difference(dense, half) == {name: count // 2 for name, count in per_layer.items()}
    for name in per_layer:
        (launches, programs), (fewer, left) = dense.by_kernel[name], half.by_kernel[name]
        assert programs * fewer == left * launches, "each launch is as large as it was"


def test_skipped_sublayers_of_a_step() -> None:
    dense = decode(DENSE)
    without_ffn = decode(policy_of(skip(EVEN, ["generated"], "ffn")))
    assert difference(dense, without_ffn) == {"feed": 16, "add_terms": 16}
    gone = decode(policy_of(skip(EVEN, "all", "attention")))
    assert difference(dense, gone) == {"project_append": 16, "attend_step": 16, "add_terms": 16}
    # K and V are still made for later rows of other classes' layers.
    project = decode(policy_of(skip(EVEN, ["generated"], "attention", kv="project")))
    assert difference(dense, project) == {"attend_step": 16, "add_terms": 16}
    assert project.programs < dense.programs
    reuse = decode(policy_of(skip(EVEN[1:], ["generated"], "attention", kv="reuse")))
    saved = difference(dense, reuse)
    assert saved.pop("copy_entries") == -15
    assert saved == {"project_append": 15, "attend_step": 15, "add_terms": 15}


def test_image_rules_leave_a_step_as_it_is() -> None:
    policy = policy_of(skip(":", ["image"], "block", kv="omit"))
    assert decode(policy).by_kernel == decode(DENSE).by_kernel


def test_merged_launches_of_a_step() -> None:
    blocks = decode(policy_of(arrangements=(parallel(":", "shared"),)))
    assert blocks.launches == 3 * 32 + 3
    pairs = decode(policy_of(arrangements=(pair([[n, n + 1] for n in range(0, 32, 2)]),)))
    assert pairs.launches == 5 * 16 + 3


def test_a_prompt() -> None:
    dense, half = prefill(DENSE), prefill(policy_of(skip("0:16", "all", "block")))
    assert difference(dense, half)["attend_rows"] == 16
    assert 2 * half.launches <= dense.launches + 10  # the last layer is short
    text_only = prefill(policy_of(skip(":", ["image"], "ffn")))
    assert text_only.launches <= dense.launches
    assert text_only.programs < dense.programs
    nothing = prefill(policy_of(skip(":", "all", "block")))
    assert set(nothing.by_kernel) == {"head"}


ODD = [*range(1, 32, 2)]


def linear(**fields: object) -> dict[str, object]:
    head = {"layers": ODD, "tokens": "all", "skip": ["block"], "kind": "linear"}
    return head | {"weights": "nowhere.safetensors", "threshold": 0.0} | fields


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize(
    "router",
    [
        random(ODD),
        random(ODD, "all", "block", kv="omit", group="sequence"),
        random(ODD, "all", "block", group="batch", agree="any"),
        random(ODD, "all", "attention"),
        random(ODD, "all", "ffn"),
        similarity(ODD, "all", "block", threshold=0.9),
        similarity([*range(2, 32, 3)], "all", "ffn", threshold=0.1, measure="change"),
        linear(),
    ],
    ids=lambda router: f"{router['kind']} {router['skip'][0]} {router.get('group', 'row')}",
)
def test_a_router_adds_nothing_to_a_step(router: dict[str, object], batch: int) -> None:
    """Decisions ride in residual updates; what rows may skip is launched as in a dense step."""
    dense, own = decode(DENSE, batch), decode(routed(router), batch)
    extra = difference(own, dense)
    # For many rows another kernel may be as quick, which reads no flags; it is one launch as well.
    has_changed = "linear_rows" in extra
    assert extra.pop("linear_rows", 0) + extra.pop("feed", 0) == 0
    # The trace of similarity begins before the layer below the first decision.
    begins_at_the_bottom = router["kind"] == "similarity" and router["layers"] == ODD
    assert extra == ({"route": 1} if begins_at_the_bottom else {})
    # No more programs, each for more tiles where there were many: those that leave cost time too.
    _, alone = own.by_kernel.get("route", (0, 0))
    assert 0 < own.guarded_programs < own.programs - alone
    assert own.programs - alone <= dense.programs or has_changed
    assert dense.guarded_programs == 0


def test_what_a_router_does_add_to_a_step() -> None:
    dense = decode(DENSE)
    # Before the first layer no update has run that could carry the decision.
    assert difference(decode(routed(random(EVEN))), dense) == {"route": 1}
    # The attention's update carries what is decided in the middle of layer 0.
    assert difference(decode(routed(random(EVEN, "all", "ffn"))), dense) == {}
    # Entries of rows that skip come from the layer below.
    reuse = decode(routed(random(ODD, "all", "block", kv="reuse")))
    assert difference(reuse, dense) == {"copy_entries": 16}
    # Classes of which a step has no rows add nothing.
    image = decode(routed(random(ODD, ["image", "text"], "block")))
    assert difference(image, dense) == {} and image.guarded_programs == 0


def test_beside_rules_a_router_costs_its_layers_alone() -> None:
    rules = [skip(EVEN, "all", "block")]
    static = decode(policy_of(*rules))
    own = decode(routed(random(ODD), rules=rules))
    # All that runs is decided on, and the first decision has no update below it.
    assert difference(own, static) == {"route": 1}


def test_what_routers_add_to_a_prompt() -> None:
    """By kernel and routed sublayer; products of chosen rows leave the library for ``linear_rows``,
    which activates on the way."""
    dense, count = prefill(DENSE), len(EVEN)

    def added(*skipped: str, **fields: Any) -> dict[str, int]:
        found = difference(prefill(routed(random(EVEN, "all", *skipped, **fields))), dense)
        assert all(launches % count == 0 for launches in found.values())
        return {name: launches // count for name, launches in found.items()}

    products = {"linear_rows": 2, "library_product": -2}
    assert added("ffn") == {"route": 1, "compact": 1, "activate": -1, **products}
    # K and V of all rows, and queries of those that attend, are two products.
    projected = {"route": 1, "compact": 1, "linear_rows": 2, "library_product": -1}
    assert added("attention", kv="project") == projected
    placed = {"route": 1, "compact": 1, "place_entries": 1, **products}
    assert added("attention", kv="omit") == placed
    both = added("block", kv="omit")
    # One flag for the whole block is compacted at most twice.
    assert 1 <= both.pop("compact") <= 2
    assert both == {
        "route": 1,
        "place_entries": 1,
        "activate": -1,
        "linear_rows": 4,
        "library_product": -4,
    }
    grouped = added("ffn", group="sequence", agree="any")
    assert grouped.pop("decide") == 1


def test_the_device_must_know_the_router() -> None:
    plug_in = {"layers": ODD, "tokens": "all", "skip": ["block"], "kind": "acme.router"}
    with pytest.raises(ValueError, match="plain executor.*acme.router"):
        decode(routed(plug_in))


ROUTED = {
    "random, entries omitted": routed(random("1:", "all", "block", kv="omit", rate=0.5)),
    "similarity in the middle": routed(similarity(":", "all", "ffn", threshold=0.5)),
    "random, entries copied, groups": routed(
        random([1, 3], "all", "attention", kv="reuse", group="sequence")
    ),
}


@pytest.mark.parametrize(
    "name", ["dense", "each class its own rule", "parallel, skipped branches", *ROUTED]
)
def test_what_is_counted_is_what_runs(name: str) -> None:
    policy = policy_of() if name == "dense" else (MIXED | ROUTED)[name]
    model = tiny_llava(depth=4, hidden=64, head_dim=16, heads=2, kv_heads=1)
    # Counted prompts end in text.
    batches = (random_batch(model, seed, images=(1, 1), text=(5, 5)) for seed in range(99))
    batch = next(each for each in batches if (each.token_classes[:, -1] == 1).all())
    fastskip.apply_(model, policy, impl="triton")
    plan = fastskip.plan_of(model)
    image, text = (int((batch.token_classes[0] == code).sum()) for code in (0, 1))
    with tuning.table(STREAM):
        with counted() as once:
            model.generate(**batch.inputs(), max_new_tokens=1, do_sample=False)
        # A shape that comes again would be captured, with idle rows.
        fastskip.set_policy(model, policy)
        with counted() as twice:
            model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False)
        expected = prefill_launches(plan, image, text, 2)
        step = decode_launches(plan, 2, 1024)
    # The last norm and the head of a prompt are Hugging Face's modules.
    names = set(once.by_kernel) | set(expected.by_kernel) - {"head", "library_product", "normalize"}
    for kernel in names - {"library_product", "normalize"}:
        assert once.by_kernel[kernel] == expected.by_kernel[kernel], kernel
    for kernel, (launches, programs) in step.by_kernel.items():
        before = once.by_kernel.get(kernel, (0, 0))
        assert twice.by_kernel[kernel] == (before[0] + launches, before[1] + programs), kernel


def test_on_the_command_line(tmp_path: Path) -> None:
    call = ["plan", "-p", "every_nth_block", "--bandwidth", "4300", "--tflops", "790"]
    found = CliRunner().invoke(app, [*call, "--launches", TABLE])
    assert found.exit_code == 0, found.output
    assert "decode step launches" in found.output and "attend_step" in found.output
    found = CliRunner().invoke(app, [*call, "--launches", TABLE, "--json"])
    counts = json.loads(found.output)["launches"]
    assert counts["dense"]["decode_step"]["launches"] == 5 * 8 + 3
    assert counts["with_policy"]["decode_step"]["launches"] < 5 * 8 + 3
    assert counts["with_policy"]["decode_step"]["guarded_programs"] == 0
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(routed(random("2:", rate=0.5), linear(layers=[1]))))
    call[2] = str(policy)
    found = CliRunner().invoke(app, [*call, "--launches", TABLE, "--json"])
    assert found.exit_code == 0, found.output
    step = json.loads(found.output)["launches"]["with_policy"]["decode_step"]
    assert step["launches"] == 5 * 8 + 3 and step["guarded_programs"] > 0
    found = CliRunner().invoke(app, [*call, "--launches", "abacus"])
    assert found.exit_code != 0 and f"allowed: {', '.join(tuning.slugs())}" in found.output


def test_nothing_runs_in_a_dry_count() -> None:
    with counted(is_dry=True) as account:
        from fastskip.ops import compiled

        compiled.embed(
            torch.empty(2, dtype=torch.int64, device="meta"),
            torch.empty(8, 16, device="meta"),
            torch.empty(2, 16, device="meta"),
        )
    assert account.to_dict() == {
        "launches": 1,
        "programs": 2,
        "guarded_programs": 0,
        "kernels": {"embed": {"launches": 1, "programs": 2}},
    }


def test_the_readme_has_the_counts_of_today() -> None:
    written = (Path(__file__).parents[2] / "README.md").read_text()
    between = written.partition(launch_table.BEGIN)[2].partition(launch_table.END)[0]
    assert between.strip() == launch_table.markdown()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    "policy", [DENSE, policy_of(arrangements=(parallel(":", "shared"),)), HALF_PAIRS], ids=str
)
def test_a_profile_knows_the_weights_of_every_launch(
    policy: Policy, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts: list[launch.Account] = []
    record = launch.recording

    @contextmanager
    def noting(*, is_dry: bool) -> Iterator[launch.Account]:
        with record(is_dry=is_dry) as account:
            accounts.append(account)
            yield account

    monkeypatch.setattr(launch, "recording", noting)
    decode(policy, batch)
    (account,) = accounts
    nbytes = weight_bytes(account)
    counts = Counter(each.kernel.__name__ for each in account.launches if each.kernel)
    layer = 4 * SHAPE.hidden_size**2 + 3 * SHAPE.hidden_size * SHAPE.ffn_size
    weights = SHAPE.depth * layer + SHAPE.vocab_size * SHAPE.hidden_size
    found = sum(each * counts[name] for name, each in nbytes.items())
    assert found == weights * SHAPE.dtype_bytes
