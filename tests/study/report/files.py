"""Result files in the form that eval, bench and search give them, made of a few numbers."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from fastskip.policy import SkipPolicy

DEPTH = 8
LABELS = ("dense", "image_ffn", "every_nth_block", "block_pairs", "parallel_blocks")
CIRCUMSTANCES: dict[str, Any] = {
    "model": "/models/a/small",
    "dtype": "float32",
    "device": "A processor",
    "threads": 1,
    "versions": {"fastskip": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
    "date": "2026-11-26T05:00:00+00:00",
    "model_fingerprint": "0123456789abcdef",
}
EVIL = '<script>alert("x")</script> & $x^2$'
ROUTED: dict[str, Any] = {
    "schema_version": 1,
    "rules": [],
    "routers": [
        {
            "layers": "2:6",
            "tokens": ["text"],
            "skip": ["ffn"],
            "kind": "similarity",
            "threshold": 0.98,
        }
    ],
}
REMOVING: dict[str, Any] = {
    "schema_version": 1,
    "rules": [],
    "removals": [
        {"after_layer": 1, "tokens": ["image"], "keep": {"by": "attention", "ratio": 0.5}}
    ],
}


def policy(label: str) -> dict[str, Any]:
    return SkipPolicy.preset(label).to_dict()


def eval_document(count: int = 8) -> dict[str, Any]:
    items = [
        {
            "question": f"how many circles? ({number})",
            "references": ["2"],
            "kind": "question" if number % 2 else "caption",
            "metric": "exact",
            "image": f"images/{number}.png",
            "images": [f"images/{number}.png"],
            "history": [],
        }
        for number in range(count)
    ]
    items[1]["question"] = EVIL
    judgements = []
    for place, label in enumerate(LABELS[:4]):
        judged = [
            {
                **{name: item[name] for name in ("kind", "question", "references", "metric")},
                # the third policy is wrong on every second item
                "answer": EVIL if place == 2 and number % 2 else "2",
                "score": 0.0 if place == 2 and number % 2 else 1.0,
            }
            for number, item in enumerate(items)
        ]
        judgements.append(
            {
                "label": label,
                "policy": policy(label),
                "evaluation": {"judged": judged},
                "agreement": {"tokens": [1.0] * count, "divergence": [0.01 * place] * count},
                "flops": 1000 - 100 * place,
                "speed": {"ttft_s": 0.02 + 0.001 * place, "tpot_s": 0.005 - 0.0005 * place},
            }
        )
    return {
        "schema_version": 1,
        "kind": "eval",
        "circumstances": CIRCUMSTANCES,
        "new_tokens": 16,
        "items": items,
        "judgements": judgements,
    }


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.95 * median, "high": 1.1 * median}


def bench_document() -> dict[str, Any]:
    contenders: list[dict[str, Any]] = []
    named = [("Hugging Face", "hf"), *((label, "fastskip") for label in LABELS[:3])]
    for place, (label, source) in enumerate(named):
        is_own = source == "fastskip"
        is_policy = is_own and label != "dense"
        contenders.append(
            {
                "label": label,
                "source": source,
                "policy": policy(label) if is_own else None,
                "prefill_s": spread(0.100 - 0.02 * place),
                "decode_s": spread(0.009 + 0.001 * place),
                "ttft_s": spread(0.110 - 0.02 * place),
                "tpot_s": spread(0.010 + 0.001 * place),
                "tokens_per_s": 90.0,
                "peak_bytes": None,
                "kv_bytes": 1_600_000 if is_own else None,
                "flops": 123,
                "floor_s": {"prefill": 0.03, "decode": 0.002} if is_own else None,
                "ideal_share": {"prefill": 0.91, "decode": 0.87} if is_policy else None,
                "speedup": {"ttft": spread(1.4), "tpot": spread(0.9)} if is_policy else None,
                "verdict": {"ttft": "faster", "tpot": "slower"} if is_policy else None,
                "as_hf": None,
                "left_out": None,
            }
        )
    nothing = dict.fromkeys(contenders[0])
    left_out = {"label": "compiled", "source": "hf-compiled", "left_out": "no compiler"}
    contenders.append(nothing | left_out)
    names = ("batch", "n_image", "n_text", "text_before", "new_tokens", "rounds")
    return {
        "schema_version": 1,
        "kind": "bench",
        "circumstances": CIRCUMSTANCES,
        "workload": dict(zip(names, (1, 576, 64, 8, 32, 7), strict=True)) | {"texts": []},
        "ceilings": {"bandwidth_bytes_per_s": 2e10, "flops_per_s": 1e11},
        "contenders": contenders,
    }


def search_document() -> dict[str, Any]:
    changes: list[dict[str, Any]] = [
        {"tokens": "image", "skip": ["ffn"], "kv": None, "arrangement": None},
        {"tokens": "image", "skip": ["attention"], "kv": "project", "arrangement": None},
        {"tokens": "image+text+generated", "skip": [], "kv": None, "arrangement": "parallel"},
    ]
    sensitivity = [
        {
            "layer": layer,
            **change,
            "kl": 10.0 ** (-layer - place),
            "similarity": 0.9,
            "saved": 0.02,
        }
        for place, change in enumerate(changes)
        for layer in range(DEPTH)
        if (layer, place) != (0, 2)
    ]
    candidates = []
    for place, (name, source) in enumerate(
        zip(LABELS, ("dense", "search", "uniform", "peer", "random"), strict=True)
    ):
        score = {"mean": 1 - 0.05 * place, "low": 0.9 - 0.05 * place, "high": 1.0}
        change = {"mean": -0.05 * place, "low": -0.1 * place, "high": 0.05 - 0.05 * place}
        candidates.append(
            {
                "name": name,
                "source": source,
                "policy": policy(name),
                "cost": 1 - 0.1 * place,
                "flops": 1 - 0.15 * place,
                "ttft_s": None,
                "tpot_s": 0.008 - 0.001 * place,
                "calibration_kl": 0.01 * place,
                "score": score,
                "change": change,
                "agreement": {"tokens": 1 - 0.02 * place, "kl": 0.1 * place},
                "is_on_front": place < 3,
                "is_recommended": place == 1,
                "file": f"policies/{name}.json" if place else None,
            }
        )
    last = {**candidates[3], "name": "removing", "policy": REMOVING}
    candidates.append(last | {"ttft_s": None, "tpot_s": None})
    return {
        "schema_version": 1,
        "kind": "search",
        "circumstances": CIRCUMSTANCES,
        "budget": {"quantity": "tpot", "least": 1.5, "most_s": None, "text": "TPOT 1.5x faster"},
        "sensitivity": sensitivity,
        "candidates": candidates,
        "comparisons": [
            {"name": "block_pairs", "source": "peer", "mean": 0.1, "low": 0.02, "high": 0.2}
        ],
        "left_out": [{"name": "fastv", "reason": "takes too much"}],
        "settings": {"seed": 7, "tried": {"search": 3}},
        "conclusion": {"recommended": "image_ffn", "text": "image_ffn meets the budget."},
    }


def write(folder: Path, document: dict[str, Any]) -> Path:
    """The folder with one result file in it, and small pictures for an eval."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{document['kind']}.json").write_text(json.dumps(document))
    for item in document.get("items", ()):
        picture = folder / item["image"]
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (200, 30, 30)).save(picture)
    return folder
