"""The words that mmMamba's published figures were asked with, where they are not VLMEvalKit's own.

They are those of `mmmamba-edge eval`; multiple choice is one form for all datasets of that kind.
"""

import re
import string
from collections.abc import Mapping
from typing import Any

from mmmamba_edge.evaluation import gqa, mme, pope, scienceqa, textvqa

# What follows the questions of a dataset.
SUFFIXES = {
    "MME": mme.SUFFIX,
    "POPE": pope.SUFFIX,
    "GQA_TestDev_Balanced": gqa.SUFFIX,
    "TextVQA_VAL": textvqa.SUFFIX,
    "MMVet": "",
}
CHINESE_CHOICE = "\n请直接回答选项字母。"


def has_prompt(dataset: str, kind: str) -> bool:
    """Whether `prompt_text` knows this dataset; `kind` is VLMEvalKit's type of it."""
    return kind == "MCQ" or dataset in SUFFIXES


def prompt_text(line: Mapping[str, Any], dataset: str, kind: str) -> str:
    """The text for a row of a dataset.

    Args:
        line: its fields: question, and for multiple choice hint and the options A, B, ...
        dataset: its name.
        kind: VLMEvalKit's type of it.
    """
    question = _field(line, "question")
    if kind == "MCQ":
        hint = _field(line, "hint")
        options = [f"{a}. {_field(line, a)}" for a in string.ascii_uppercase if _field(line, a)]
        text = "\n".join([*([hint] if hint else []), question, *options])
        chinese = re.search("[\u4e00-\u9fff]", text)
        return text + (CHINESE_CHOICE if chinese else scienceqa.SUFFIX)
    if dataset == "POPE":
        question = question.replace(" Please answer yes or no.", "")
    return question + SUFFIXES[dataset]


def _field(line: Mapping[str, Any], name: str) -> str:
    """A field as text; empty where it is missing or not a number, pandas' sign for missing."""
    value = line[name] if name in line else None
    return "" if value is None or value != value else str(value)
