"""Our parameter names and Hugging Face's BERT names: what a BERT checkpoint becomes is a BertForMaskedLM."""

from transformers import BertConfig

from peer_scale.conversion.electra import Entry, dense_entries, encoder_entries, encoder_settings, without_padding
from peer_scale.models.config import ModelConfig


def masked_lm_entries(config: ModelConfig) -> list[Entry]:
    """The map to BertForMaskedLM; its output matrix is tied to the word embeddings, its bias stands in two places."""
    head = "cls.predictions"
    cut = without_padding(config.vocab_size)
    return [
        *encoder_entries(config, config.generator, "generator", "bert"),
        *dense_entries("mlm_head.dense", f"{head}.transform.dense"),
        *dense_entries("mlm_head.norm", f"{head}.transform.LayerNorm"),
        Entry("mlm_head.bias", (f"{head}.bias", f"{head}.decoder.bias"), lambda bias: cut(bias) * 2),
        Entry("embeddings.word.weight", (f"{head}.decoder.weight",), cut),
    ]


def bert_config(config: ModelConfig, pad_token_id: int) -> BertConfig:
    """Hugging Face's configuration; it has one size for embeddings and hidden states, so ours must be equal."""
    assert config.embedding_size == config.generator.hidden_size, "BertForMaskedLM has no projection"
    return BertConfig(**encoder_settings(config, config.generator, pad_token_id))
