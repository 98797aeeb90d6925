"""A certificate as one HTML page: the verdict first, then what it rests on.

The page is one file for reading and printing, it needs no network and its policy (CSP) allows none: it admits this
very script and this very style, by their digests. It is whole without the script, which only filters the table.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from tepatch.certification.certificate import FAILURES, FORMAT, Certificate, SideRecord

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_DIGITS = 12
"""Of a digest, in the table; the whole of it is in the JSON."""


def certificate_page(certificate: Certificate) -> str:
    """The page, as text in UTF-8. The same certificate gives the same page."""
    style, script = _resource("certificate.css"), _resource("certificate.js")
    parts = {
        "format": FORMAT,
        "policy": f"default-src 'none'; script-src {_policy(script)}; style-src {_policy(style)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "state": "passed" if certificate.passed else "failed",
        "verdict": _verdict(certificate),
        "summary": _paragraphs(str(certificate).splitlines()[1:]),
        "problems": _problems(certificate),
        "facts": _facts(certificate),
        "files": _files(certificate.destination),
        "tensors": _tensors(certificate),
    }
    # In one pass, so that nothing in the data is ever taken for a placeholder.
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], _resource("certificate.html"))


def _verdict(certificate: Certificate) -> str:
    if not certificate.passed:
        count = len(certificate.problems)
        return f"Failed: {count:,} problem{'' if count == 1 else 's'}"
    statuses = {tensor.status for tensor in certificate.tensors}
    how = "as it was, or exactly as declared" if "converted" in statuses else "bit for bit"
    return f"Passed: every tensor came back {how}"


def _facts(certificate: Certificate) -> str:
    source, destination = certificate.source, certificate.destination
    rows = [
        ("Source", f"{source.location} (layout {source.layout})"),
        ("Destination", f"{destination.location} (layout {destination.layout})"),
        ("Compared", f"{certificate.created} (UTC)"),
        ("Patch", f"{certificate.patch}{f', {certificate.plugin}' if certificate.plugin else ''}"),
        ("Mapping", f"{certificate.mapping}, sha256 {certificate.mapping_sha256}"),
        ("Layout", f"sha256 {certificate.layout_sha256}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in certificate.versions.items())),
        ("Totals", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in certificate.totals.items())),
        ("Certificate", f"sha256 {certificate.sha256} (over its JSON; this shows edits, and is not a signature)"),
    ]
    if certificate.parity is not None:
        rows.append(("Parity", f"{certificate.parity['compared']}: {certificate.parity['verdict']}"))
    return "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows)


def _problems(certificate: Certificate) -> str:
    if not certificate.problems:
        return ""
    items = "".join(f"<li><pre>{escape(str(problem))}</pre></li>\n" for problem in certificate.problems)
    return f"<section><h2>Problems</h2><ol>\n{items}</ol></section>"


def _files(side: SideRecord) -> str:
    return _rows(
        (
            name,
            f"{record.bytes:,}",
            record.sha256[:_DIGITS] or f"header {record.header_sha256[:_DIGITS]}, and each tensor's",
        )
        for name, record in side.files.items()
    )


def _tensors(certificate: Certificate) -> str:
    failed = [tensor.status in FAILURES for tensor in certificate.tensors]
    cells = (
        (
            tensor.name,
            f"{tensor.dtype} {list(tensor.shape)}",
            tensor.outcome,
            "" if tensor.deviation is None or not tensor.bound else f"{tensor.deviation:.3g} of {tensor.bound:.3g}",
            tensor.source_sha256[:_DIGITS],
            tensor.destination_sha256[:_DIGITS],
        )
        for tensor in certificate.tensors
    )
    return _rows(cells, marked=failed)


def _rows(rows: Iterable[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    out = []
    for index, row in enumerate(rows):
        kind = ' class="wrong"' if index < len(marked) and marked[index] else ""
        out.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n")
    return "".join(out)


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{escape(line.strip())}</p>\n" for line in lines)


def _policy(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return (resources.files("tepatch.certification") / name).read_text(encoding="ascii")
