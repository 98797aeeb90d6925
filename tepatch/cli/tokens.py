"""The tokens that ``tepatch verify`` compares models over: from a file, or from text by the checkpoint's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tepatch.errors import CheckpointError, PlanError, Problem

SAMPLE = """\
The lighthouse at the end of the bay was built in 1871, after three ships had been lost on the rocks in a single
winter. It stands 42 metres above the sea, and on a clear night its lamp can be seen from more than twenty miles
away. For almost a century a keeper lived there with his family; he wound the clockwork each evening, trimmed the
wick at midnight, and wrote the weather into a thick grey book. "Wind from the north-west, snow before morning,"
says the entry for the third of January 1902, and then, in a smaller hand: "Nobody came today." When the light was
changed to electricity, the clockwork was taken to a museum, and the last keeper, who was 64 years old, moved to the
village. Visitors may climb the 199 steps between May and September. The view from the gallery is worth the effort:
to the east lie the dunes and the old harbour, to the west there is nothing but water, and on some afternoons, if
the tide is low, a few dark shapes can still be made out among the stones.
"""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_FORMS = "[1, 2, 3], [[1, 2], [3, 4]], or numbers with spaces between them"
_LARGEST = 2**31 - 1


def choose_tokens(folder: Path, *, tokens: Path | None, text: Path | None, max_tokens: int) -> list[list[int]]:
    """Token ids ``[batch, tokens]`` from the file ``tokens``, else from the text file, else from ``SAMPLE``.

    Each sequence is cut to ``max_tokens``. Raises ``PlanError`` for a file that cannot be used and
    ``CheckpointError`` where a tokenizer is needed and ``folder`` has none, or one that asks to run code.
    """
    if tokens is not None:
        ids = parse_tokens(_read(tokens), where=str(tokens))
    else:
        ids = [_tokenize(folder, SAMPLE if text is None else _read(text))]
    return [sequence[:max_tokens] for sequence in ids]


def parse_tokens(text: str, *, where: str) -> list[list[int]]:
    """Token ids from a JSON list, a JSON list of equally long lists, or whitespace-separated numbers."""
    values: Any
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (ValueError, RecursionError) as error:  # RecursionError: a JSON file of nothing but brackets
        raise PlanError(Problem(where=where, what=f"not token ids: {error}", expected=_FORMS)) from None
    sequences = values if values and isinstance(values[0], list) else [values]
    for sequence in sequences:
        if not isinstance(sequence, list) or not all(map(_is_id, sequence)):
            raise PlanError(Problem(where=where, what="not token ids", expected=_FORMS, found=_short(sequence)))
    lengths = sorted({len(sequence) for sequence in sequences})
    if len(lengths) > 1 or lengths == [0]:
        what = "no token at all" if lengths == [0] else "sequences of different lengths"
        raise PlanError(Problem(where=where, what=what, expected=_FORMS, found=f"lengths {lengths}"))
    return sequences


def _tokenize(folder: Path, text: str) -> list[int]:
    # Looked for first: without its files, transformers may make a tokenizer with next to no vocabulary.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(_no_tokenizer(folder, "there is no tokenizer beside the weights"))
    from transformers import AutoTokenizer

    from tepatch.hf.config import asks_to_run_code, code_refused

    try:
        # AutoTokenizer hands its trust_remote_code on to no other class, and 'tokenizer_class' may name AutoProcessor.
        with code_refused():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ids: list[int] = tokenizer(text)["input_ids"]
    except Exception as error:  # the many kinds of tokenizers have no common error, and the Rust one raises this
        if asks_to_run_code(error):
            raise CheckpointError(_asks_to_run_code(folder)) from error
        what = f"the tokenizer can not be used: {type(error).__name__}: {error}"
        raise CheckpointError(_no_tokenizer(folder, what)) from error
    if not ids:
        raise PlanError(Problem(where=str(folder), what="the tokenizer makes no token of the text"))
    return ids


def _asks_to_run_code(folder: Path) -> Problem:
    found = []
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "config.json"):
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map")
        except (OSError, ValueError, AttributeError, RecursionError):  # no such file, or no object in it
            continue
        found += [f"auto_map = {_short(named)} in {name}"] if named else []
    return Problem(
        where=str(folder),
        what="the tokenizer asks to run code of the checkpoint, and tepatch never runs any",
        expected="a tokenizer that transformers has a class for",
        found=", ".join(found),
        fix="make token ids with a tokenizer that you trust, and pass them with --tokens FILE to tepatch verify",
    )


def _no_tokenizer(folder: Path, what: str) -> Problem:
    return Problem(where=str(folder), what=what, fix="pass token ids with --tokens FILE to tepatch verify")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(Problem(where=str(path), what=f"can not read the file as UTF-8 text: {error}")) from error


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
