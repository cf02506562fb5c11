"""Sizes for end-to-end runs in the interpreter, where each program costs milliseconds."""

from dataclasses import replace

from fastskip.kernels.tuning import Entry, Table

_PRODUCTS = ("project_append", "feed", "project_append_feed", "add_terms", "apply_terms", "head")


def _table(product: dict[str, int]) -> Table:
    configs = dict.fromkeys(_PRODUCTS, product) | {
        "attend_step": {
            "BLOCK_S": 64,
            "STAGES": 2,
            "PROGRAMS": 8,
            "FUSED_COMBINE": 1,
            "num_warps": 4,
        },
        "attend_rows": {"BLOCK_Q": 32, "BLOCK_S": 64, "STAGES": 2, "num_warps": 4},
    }
    entries = {name: [Entry(None, None, config)] for name, config in configs.items()}
    return Table("tests", "tests", None, None, entries)


# Matrix instructions, few and large programs.
_TENSOR = {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_E": 64, "STAGES": 2, "num_warps": 4}
TENSOR = _table(_TENSOR)
# Weights stream by, four rows at a time.
STREAM = _table({"BLOCK_M": 128, "BLOCK_N": 4, "BLOCK_E": 64, "STAGES": 2, "num_warps": 4})


def shared(parts: int) -> Table:
    """Products of whole prompts by our own kernel, and tiles that ``parts`` programs share."""
    rows = {"BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_E": 64, "GROUP": 8, "STAGES": 2, "num_warps": 4}
    few, many = {"by": "few_rows"}, {"by": "row_gemm"}
    return replace(
        STREAM,
        entries={
            **STREAM.entries,
            "choice": [Entry(8, None, few), Entry(None, None, many)],
            "choice_scattered": [Entry(8, None, few), Entry(None, None, many)],
            "linear_rows": [Entry(None, None, rows)],
            "linear_rows_split": [Entry(None, None, {"SPLITS": parts})],
            "add_terms_split": [Entry(None, None, {"SPLITS": parts})],
            "feed_half": [Entry(None, None, {**_TENSOR, "SPLITS": parts})],
            "project_append_half": [Entry(None, None, {**_TENSOR, "SPLITS": parts})],
        },
    )
