"""The mapping language: from a YAML file to rules. Knows names and shapes, no plan, no model, no torch."""

from tepatch.mapping.read import parse_mapping, read_mapping
from tepatch.mapping.rules import Mapping

__all__ = ["Mapping", "parse_mapping", "read_mapping"]
