"""The recipes' JSON Schema, for completion and checking in editors: recipes/schema.json."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from grpo_lite.recipe import Recipe
from grpo_lite.recipe_checks import OWNED_KEYS
from grpo_lite.upstream import config_fields, installed_versions


def schema_text() -> str:
    """Return the JSON Schema, with upstream's keys as of the versions installed here."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    schema["$comment"] = f"Made by `grpo-lite schema recipes/schema.json` with {versions}; do not edit."
    schema["required"] = [key for key in schema["required"] if key != "name"]  # by default the file's name
    for section in ("lora", "grpo"):
        schema["properties"][section] |= {
            "properties": {
                key: _field_schema(annotation)
                for key, annotation in sorted(config_fields(section).items())
                if key not in OWNED_KEYS
            },
            "additionalProperties": False,
        }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _field_schema(annotation: Any) -> dict[str, Any]:
    try:
        return TypeAdapter(annotation).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
