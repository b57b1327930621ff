"""``certify gate``: exit codes for CI, and the same numbers in the table, in JSON and in JUnit XML."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree as Tree

import pytest
from reports import made_up

from analysis.gates import QUANTITIES, Gate, GateResult, judge
from analysis.records import Evaluation
from certify.errors import SoundnessAlarm
from cli import grids, junit, words
from cli.main import main
from cli.parsing import share

Capture = pytest.CaptureFixture[str]

CHEAP = "--radius 0.02,8/255 --samples 40 --steps 5 --restarts 1"


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        ("--min-certified 0", 0),
        ("--min-certified 1", 1),
        ("--min-certified 100% --min-clean 0.1", 1),
        ("--min-clean 0.1 --min-attacked 10%", 0),
        ("--min-clean 1", 1),
        ("", 2),
        ("--min-clean 1.01", 2),
    ],
)
def test_exit_codes(folder: Path, capsys: Capture, wanted: str, code: int) -> None:
    assert main(f"gate net {CHEAP} {wanted}".split()) == code
    captured = capsys.readouterr()
    assert bool(captured.err) == (code == 2)
    if code < 2:
        assert ("failed" in captured.out) == (code == 1)


def test_table_json_and_junit_say_the_same(folder: Path, capsys: Capture) -> None:
    code = main(f"gate net {CHEAP} --min-certified 0.999 --min-clean 0.2 --junit j.xml --json j.json".split())
    table = capsys.readouterr().out
    results = json.loads((folder / "j.json").read_text())["results"]
    gates = [GateResult.from_dict(data) for data in results["gates"]]
    assert code == 1
    assert [gate.passed for gate in gates] == [True, False, False]
    suites = Tree.parse(folder / "j.xml").getroot()
    assert suites.attrib == {"name": "certify gate", "tests": "3", "failures": "2", "errors": "0", "skipped": "0"}
    (suite,) = suites
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [words.claim(gate) for gate in gates]
    for gate, case in zip(gates, cases, strict=True):
        (said,) = case
        assert said.tag == ("system-out" if gate.passed else "failure")
        for cell in (f"{gate.measured}", f"{gate.measured.count} of {gate.measured.total}"):
            assert cell in (said.text or "")
            assert cell in table
    assert table.splitlines()[-1].startswith("2 of 3 gates failed: net certified at radius 0.02; net certified at")
    evaluation = Evaluation.from_dict(results["networks"]["net"])
    assert judge("net", evaluation, [Gate("clean", Fraction(1, 5)), Gate("certified", Fraction(999, 1000))]) == (
        *gates,
    )


def test_junit_says_how_the_numbers_came_about_and_nothing_that_changes(folder: Path, capsys: Capture) -> None:
    for name in ("one.xml", "two.xml"):
        main(f"gate net {CHEAP} --seed 3 --min-attacked 0.9 --min-certified 0.5 --junit {name}".split())
    assert (folder / "one.xml").read_bytes() == (folder / "two.xml").read_bytes()
    properties = {item.get("name"): item.get("value") for item in Tree.parse(folder / "one.xml").iter("property")}
    assert properties["radius"] == "0.02, 8/255"
    assert properties["norm"] == "linf"
    assert properties["samples"] == "40 of 450 test images of digits (seed 3)"
    assert properties["seed"] == "3"
    assert properties["method"] == "ibp, crown"
    assert {"version of python", "version of torch", "version of kafcert"} <= set(properties)
    assert not any("time" in name for element in Tree.parse(folder / "one.xml").iter() for name in element.attrib)


def test_a_network_that_cannot_be_bounded_can_be_gated_by_attacks(folder: Path, capsys: Capture) -> None:
    own = "--data digits --model usernets:recurrent"
    assert main(f"gate {own} {CHEAP} --min-attacked 0".split()) == 0
    assert "certificates" not in capsys.readouterr().out


def test_an_alarm_outranks_every_gate(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def alarmed(*_: object, **__: object) -> None:
        raise SoundnessAlarm("sample 3 is certified and attacked")

    monkeypatch.setattr("analysis.evaluation.evaluate", alarmed)
    assert main(f"gate net {CHEAP} --min-certified 0 --junit j.xml".split()) == 6
    assert not (folder / "j.xml").exists()


def test_an_interruption_is_no_verdict(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.evaluation.evaluate", interrupted)
    assert main(f"gate net {CHEAP} --min-certified 0 --junit j.xml".split()) == 130
    assert not (folder / "j.xml").exists()


def test_hostile_names_stay_names() -> None:
    name = '<net> & "x" \x01\udcff ]]>'
    found = made_up((name,), 20, layers=0).networks[0].evaluation
    results = judge(name, found, [Gate(quantity, Fraction(1, 2)) for quantity in QUANTITIES])
    suites = Tree.fromstring(junit.text({name: found}, results, "samples of <b>"))
    assert [suite.get("name") for suite in suites] == ['<net> & "x" ?? ]]>']
    assert len(suites.findall(".//testcase")) == len(results) == len(grids.gates(results).rows)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.6", "3/5"), ("60%", "3/5"), ("60 %", "3/5"), ("3/5", "3/5"), ("1", "1"), ("0%", "0"), ("200/3%", "2/3")],
)
def test_shares_are_read_exactly(text: str, value: str) -> None:
    assert share(text, "min-clean") == Fraction(value)


def test_wanted_shares_are_never_rounded() -> None:
    found = made_up(("net",), 20, layers=0).networks[0].evaluation
    for wanted, text in ((Fraction(2, 3), "200/3"), (Fraction("0.12345"), "12.345"), (Fraction(3, 5), "60")):
        (result,) = judge("net", found, [Gate("clean", wanted)])
        assert f">= {text}" in grids.gates([result]).rows[0]
        assert re.search(rf"at least {re.escape(text)} %", words.measure(result))
