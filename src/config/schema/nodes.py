"""What every node of the configuration is made of: number types, closed and open nodes."""

from __future__ import annotations

import re
from os.path import expanduser
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**63 - 1  # a larger whole number fits into no tensor


def is_folder_name(text: str) -> str:
    """Refuse a name that is none, or leads out of the folder."""
    if not re.fullmatch(r"[^./\x00-\x1f][^/\x00-\x1f]{0,99}", text):
        raise ValueError("must be the name of a folder: no slash, no dot in front, at most 100 characters")
    return text


def figure_of(example: str, *patterns: str) -> AfterValidator:
    """Refuse what is no figure of a stage's result: neither the `example` nor of one of the `patterns`."""

    def is_figure(text: str) -> str:
        if text != example and not re.fullmatch("|".join(patterns), text):
            raise ValueError(f"must be a figure of this stage's result.json, as {example}")
        return text

    return AfterValidator(is_figure)


Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrNone = Annotated[int, Field(ge=0, le=LARGEST)]
Length = Annotated[int, Field(ge=2, le=LARGEST)]  # tokens of a text of which one is predicted from another
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Norm = Annotated[float, Field(gt=0, allow_inf_nan=True)]  # infinite: nothing is clipped
FolderName = Annotated[str, AfterValidator(is_folder_name)]
Location = Annotated[str, AfterValidator(expanduser)]  # a folder or a name on the hub; no shell expands the ~ after a =
Schedule = Literal["linear", "cosine", "constant_with_warmup"]


class Node(BaseModel):
    """A group of keys: no other key, no other type, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Target(Node):
    """An object that Hydra instantiates: `_target_` and the arguments it takes."""

    model_config = ConfigDict(extra="allow")

    path_of_target: str = Field(alias="_target_")
    partial: bool = Field(default=False, alias="_partial_")


class Typed(Node):
    """An object that Hydra instantiates, whose arguments are declared."""

    path_of_target: str = Field(alias="_target_")
    partial: bool = Field(default=False, alias="_partial_")
