"""Gates as JUnit XML, which CI servers show: a suite per network, a case per gate and radius. No times: same bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Tree

from analysis.gates import GateResult
from analysis.manifest import versions
from analysis.records import Evaluation
from cli import theme, words

#: What XML 1.0 cannot hold, not even escaped.
_UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(found: Mapping[str, Evaluation], results: Sequence[GateResult], samples: str) -> bytes:
    """Return the file's content; ``samples`` is a sentence about the samples."""
    root = Tree.Element("testsuites", {"name": "certify gate", **_counts(results)})
    for network, evaluation in found.items():
        own = [result for result in results if result.network == network]
        suite = Tree.SubElement(root, "testsuite", {"name": _clean(network), **_counts(own)})
        properties = Tree.SubElement(suite, "properties")
        for name, value in _facts(evaluation, samples).items():
            Tree.SubElement(properties, "property", {"name": name, "value": _clean(value)})
        for result in own:
            _case(suite, result)
    Tree.indent(root)
    return Tree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _case(suite: Tree.Element, result: GateResult) -> None:
    names = {"classname": _clean(result.network), "name": words.claim(result)}
    case, said = Tree.SubElement(suite, "testcase", names), words.measure(result)
    if result.passed:
        Tree.SubElement(case, "system-out").text = said
    else:
        Tree.SubElement(case, "failure", {"message": said, "type": "gate"}).text = said


def _counts(results: Sequence[GateResult]) -> dict[str, str]:
    failed = sum(not result.passed for result in results)
    return {"tests": str(len(results)), "failures": str(failed), "errors": "0", "skipped": "0"}


def _facts(found: Evaluation, samples: str) -> dict[str, str]:
    """All that is needed to measure the numbers again."""
    return {
        "radius": ", ".join(theme.radius(row.radius) for row in found.rows),
        "norm": found.norm,
        "samples": samples,
        "seed": str(found.seed),
        "method": ", ".join(found.methods) or "none",
        "arithmetic": found.arithmetic,
        "attack": found.attack,
        **{f"version of {name}": value for name, value in versions().items()},
    }


def _clean(value: str) -> str:
    return _UNSPEAKABLE.sub("?", value)
