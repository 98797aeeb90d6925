"""What layers of the common form take from a config."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tepatch.errors import UnsupportedError
from tepatch.te.decoder import attention_options, window_of


def test_a_window_is_that_of_the_layers_type() -> None:
    config = SimpleNamespace(sliding_window=8, layer_types=["full_attention", "sliding_attention"])
    assert [window_of(config, layer) for layer in range(2)] == [None, 8]
    assert window_of(SimpleNamespace(sliding_window=8), 1) == 8
    assert window_of(SimpleNamespace(sliding_window=None, layer_types=None), 0) is None


def test_a_type_of_layer_that_is_not_known_is_refused() -> None:
    config = SimpleNamespace(sliding_window=8, layer_types=["chunked_attention"])
    with pytest.raises(UnsupportedError, match=r"layer_types\[0\]"):
        window_of(config, 0)


def test_a_head_dim_follows_from_the_sizes_where_the_config_has_none() -> None:
    fields = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": None, "rms_norm_eps": 1e-6}
    config = SimpleNamespace(**fields, attention_dropout=None, initializer_range=0.02)
    options = attention_options(config, 3)
    assert (options["head_dim"], options["num_kv_heads"], options["dropout"], options["layer_idx"]) == (12, 4, 0.0, 3)
    config.head_dim = 16
    assert attention_options(config, 0)["head_dim"] == 16
