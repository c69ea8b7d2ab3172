"""What a layer costs in launches: a new operator in its way for GPUs shows here."""

from collections import defaultdict

from count_launches import Kernels, model_launches
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve

SIZES = ("--model", "bert-tiny", "--micro-batch-size", "2", "--global-batch-size", "2", "--seq-length", "32")
NO_DROPOUT = ("--hidden-dropout", "0", "--attention-dropout", "0")


def bert(num_layers):
    return resolve(build_parser().parse_args([*SIZES, *NO_DROPOUT, "--num-layers", str(num_layers)]), 1)


def added_by_a_layer(found=None):
    fewer, more = (model_launches(bert(num_layers), found).counts for num_layers in (1, 2))
    return [more[phase] - fewer[phase] for phase in ("forward", "backward")]


def test_a_layer():
    forward, backward = added_by_a_layer()
    assert forward == {"mm": 4, "add": 1, "_flash_attention_forward": 1, "norm_forward": 2, "gelu_forward": 1}
    assert backward["mm"] == 8 and backward["norm_backward"] == 2
    assert backward.total() <= 22


def test_a_compiled_layer_counts_what_was_found():
    width = bert(1).model.main_network.hidden_size
    found = defaultdict(lambda: Kernels(1, 0), {width: Kernels(6, 14)})
    forward, backward = added_by_a_layer(found)
    assert forward["compiled"] == 6 and forward["mm"] == 1
    assert backward["compiled"] == 14 and backward["mm"] == 2
