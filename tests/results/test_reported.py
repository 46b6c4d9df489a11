"""results/reported: the published numbers, each with its source and how sure it is."""

import csv
import math
import statistics
from collections import Counter

import pytest
import yaml

from flora.files import ROOT

REPORTED = ROOT / "results" / "reported"
FACTS = ROOT.parent / "shared" / "paper" / "tables.yaml"  # beside a working copy, where there is one
TABLES = ("table1_convnext_v2_l", "table3_glue_debertav3_base", "table4_llava_1_5_7b", "related_commonsense_reasoning")


def rows(name):
    with (REPORTED / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def everything():
    return {path.stem: rows(path.stem) for path in sorted(REPORTED.glob("*.csv"))}


def test_every_number_names_its_source_and_confidence_and_every_gap_says_why():
    for name, rows in everything().items():
        assert rows, name
        for row in rows:
            if row["value"]:
                assert math.isfinite(float(row["value"]))
                assert row["source"], (name, row)
                assert row["confidence"], (name, row)
            else:
                assert row["note"], (name, row)


def test_how_many_numbers_there_are():  # as counted by hand in the sources: rows x columns
    counts = {name: sum(bool(row["value"]) for row in rows) for name, rows in everything().items()}
    assert counts["table1_convnext_v2_l"] == 12 * 12
    assert counts["table3_glue_debertav3_base"] == (13 + 8 + 8 + 8) * 9
    assert counts["table3_glue_lora_dash"] == 13 * 9
    assert counts["table3_glue_roberta"] == 8 * 9
    assert counts["table4_llava_1_5_7b"] == 3 * 8
    assert counts["related_commonsense_reasoning"] == (11 + 8) * 9
    assert counts["table2_internvit_6b"] == counts["table5_training_cost"] == 0


@pytest.mark.parametrize("name", TABLES)
def test_printed_averages_are_the_means_of_their_columns_unless_a_note_says_otherwise(name):
    groups = {}
    for row in rows(name):
        groups.setdefault((row["group"], row["method"], row["params"]), []).append(row)
    for key, group in groups.items():
        (average,) = (row for row in group if row["column"] == "avg")
        values = [float(row["value"]) for row in group if row["column"] != "avg" and row["value"]]
        if values and "columns" not in average["note"].replace("the 11 columns", ""):
            assert float(average["value"]) == pytest.approx(statistics.fmean(values), abs=0.0501), key


def test_disagreements_between_sources_are_noted_beside_both_numbers():
    glue = {(r["group"], r["method"], r["column"]): r for r in rows("table3_glue_debertav3_base")}
    dash = {(r["group"], r["method"], r["column"]): r for r in rows("table3_glue_lora_dash")}
    for key in glue.keys() & dash.keys():
        if glue[key]["value"] != dash[key]["value"]:
            assert f"prints {dash[key]['value']}" in glue[key]["note"], key
    assert "88.09" in glue["r2", "FLoRA", "RTE"]["note"]


def numbers(node):
    """Every number of a tree of lists and dicts."""
    if isinstance(node, dict):
        return [n for value in node.values() for n in numbers(value)]
    if isinstance(node, list):
        return [n for value in node for n in numbers(value)]
    return [float(node)] if isinstance(node, int | float) and not isinstance(node, bool) else []


@pytest.mark.skipif(not FACTS.exists(), reason="the collected facts lie beside the working copy only")
def test_every_number_of_the_collected_facts_is_there():
    facts = yaml.safe_load(FACTS.read_text())

    def values(tree):
        if isinstance(tree, dict):
            own = numbers(tree["values"]) if "values" in tree else []
            return own + [n for key, value in tree.items() if key != "values" for n in values(value)]
        return [n for value in tree for n in values(value)] if isinstance(tree, list) else []

    def have(*names):
        return Counter(float(row["value"]) for name in names for row in rows(name) if row["value"])

    glue = facts["table_3_glue_debertav3_base"]
    assert have("table1_convnext_v2_l") == Counter(values(facts["table_1_convnext_v2_l"]["rows"]))
    assert have("derived_from_table_1") == Counter(numbers(facts["derived_from_table_1"]))
    assert have("table3_glue_debertav3_base") == Counter(values(glue["groups"]))
    roberta = [glue["other_backbones_flora_rows"][name] for name in ("roberta_base", "roberta_large")]
    assert have("table3_glue_roberta") == Counter(numbers(roberta))
    dash = values(glue["alternative_r2_group"]) + values(glue["alternative_r8_lora"])
    assert have("table3_glue_lora_dash") == Counter(dash)
    assert have("table4_llava_1_5_7b") == Counter(values(facts["table_4_llava_1_5_7b"]["rows"]))
    related = facts["related_flora_results"]
    assert have("related_commonsense_reasoning") == Counter(values(related["commonsense_reasoning"]["rows"]))
    successor = Counter(numbers(related["liera_convnext_v2_b"]["content"]))
    assert not successor - have("related_liera_convnext_v2_b")
    assert have("computed_params") == Counter(numbers(facts["computed_params"]))
