"""experiments/claims.yaml: every claim is computed, and the verdict follows the number."""

import pytest
import yaml

from flora.files import ROOT
from flora.results import claims

CLAIMS = yaml.safe_load((ROOT / "experiments" / "claims.yaml").read_text())["claims"]
# BERT-large: 24 blocks of four square matrices of 1024, two of 1024 x 4096; 335,141,888 parameters with the pooler.
SQUARE, MLP, BERT = 24 * 2 * 1024, 24 * 2 * (1024 + 4096), 335141888
COUNTED = ("trainable_params", "head_params", "total_params")
EXPECTED = [
    100 * (1 - 8 * 2 * SQUARE / BERT),
    100 * (1 - 16 * 2 * SQUARE / BERT),
    100 * (1 - 4 * (4 * SQUARE + MLP) / BERT),
    100 * (1 - 8 * (4 * SQUARE + MLP) / BERT),
]


@pytest.mark.parametrize(("claim", "expected"), zip(CLAIMS, EXPECTED, strict=False))
def test_the_claim_about_bert_large(claim, expected):
    assert claim["counted"][0] == "model=bert_large"
    assert claims.compute(claim) == pytest.approx(expected, rel=1e-12)


def test_verdicts_follow_the_numbers(monkeypatch):
    values = {
        claim["claimed"]: claim["claimed"] + factor * claim["within"]
        for factor, claim in zip([2, 0.9, -0.9] * 9, CLAIMS, strict=False)
    }
    monkeypatch.setattr(claims, "compute", lambda claim: values[claim["claimed"]])
    monkeypatch.setattr(claims, "key", lambda claim: str(claim["claimed"]))  # no two that the same value would fit
    rows = [line.split(" | ") for line in claims.claims({}).markdown().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(CLAIMS)
    for row, claim in zip(rows, CLAIMS, strict=True):
        off = abs(values[claim["claimed"]] - claim["claimed"])
        assert (row[4] == "holds") == (off <= claim["within"])
        assert row[0].removeprefix("| ") == claim["claim"]


def test_what_was_counted_is_kept_until_its_configs_change(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(claims, "compute", lambda claim: counted.append(claim) or 100 / 3)
    first = claims.claims({})
    assert len(counted) == len({claims.key(claim) for claim in CLAIMS})
    path = tmp_path / "claims.csv"
    path.write_text(first.csv())
    kept = claims.read_values(path)
    assert claims.claims(kept, count_missing=False) == first
    assert len(counted) == len(first.values), "nothing is counted again"

    gone = claims.key(CLAIMS[0])
    del kept[gone]
    assert claims.claims(kept, count_missing=False) is None
    assert claims.claims(kept) == first
    assert claims.key(CLAIMS[0] | {"counted": [*CLAIMS[0]["counted"], "adapter.lora_dropout=0.5"]}) != gone
    assert claims.key(CLAIMS[0] | {"claimed": 1, "within": 2, "source": "?"}) == gone


def test_what_is_counted_again_is_written_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_count", lambda overrides: dict.fromkeys(COUNTED, 3))
    path = tmp_path / "claims.csv"
    path.write_text(claims.claims({}).csv())
    assert claims.claims(claims.read_values(path)).csv() == path.read_text()


def test_every_claim_names_its_source_and_what_it_assumes():
    for claim in CLAIMS:
        assert claim["source"]
        assert claim["assumes"]
        assert claim["value"] in ("fewer", "share", "extra", "count", "of_model")
        assert ("against" in claim) == (claim["value"] in ("fewer", "share", "extra"))


def test_a_printed_number_is_set_beside_what_is_counted():
    (claim,) = [claim for claim in CLAIMS if isinstance(claim["counted"], int)]
    # ConvNeXt-V2-L without its classifier of 1000 classes: 197,956,840 (timm's 198.0M) less 1536 x 1000 + 1000.
    assert claims.compute(claim) == pytest.approx(100 * (1 - 40_490_000 / (197_956_840 - 1_537_000)), rel=1e-12)


def test_no_claim_is_counted_from_a_budget_that_is_set_to_it():
    words = [word for claim in CLAIMS for side in ("counted", "against") for word in listed(claim.get(side))]
    assert words
    assert not [word for word in words if word.startswith(("adapter.budget", "adapter.allocation"))]


def listed(side):
    return side if isinstance(side, list) else []
