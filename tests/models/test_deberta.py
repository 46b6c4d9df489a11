"""DeBERTa's relative positions: computed for a few lengths, the same for all."""

import pytest
import torch
import transformers
from torch import nn

from flora.models.deberta import positions_kept

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def deberta(**options):
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], **options)
    return transformers.DebertaV2Model(config).eval()


@pytest.mark.parametrize("options", [{"position_buckets": 4, "max_relative_positions": 32}, {}], ids=["buckets", "all"])
def test_outputs_are_those_of_transformers_bit_for_bit(monkeypatch, options):
    network = deberta(**options)
    lengths = [7, 5, 8, 9, 16, 1, 2, 30]
    texts = [torch.randint(1, 50, (3, length)) for length in lengths]
    with torch.no_grad():
        expected = [network(text).last_hidden_state for text in texts]
        computed, plain = [], network.encoder.get_rel_pos
        monkeypatch.setattr(network.encoder, "get_rel_pos", counted(plain, computed))
        with positions_kept(nn.Sequential(network)):
            given = [network(text).last_hidden_state for text in texts]
    assert computed == [8, 16, 1, 2, 32], "the first of a size alone"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, expected, strict=True))


def counted(plain, computed):
    """``get_rel_pos`` that notes the lengths that it computes positions of."""

    def get_rel_pos(hidden_states, query_states=None, relative_pos=None):
        if relative_pos is None:
            computed.append(hidden_states.size(-2))
        return plain(hidden_states, query_states, relative_pos)

    return get_rel_pos


def test_afterwards_the_network_is_as_it_was():
    network = deberta()
    with positions_kept(network):
        assert network.encoder._forward_pre_hooks
    assert not network.encoder._forward_pre_hooks
