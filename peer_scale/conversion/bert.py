"""Our parameter names and Hugging Face's BERT names: a BERT checkpoint of ours is a BertForMaskedLM."""

from transformers import BertConfig

from peer_scale.conversion.electra import Entry, dense_entries, encoder_settings, without_padding
from peer_scale.models.config import ModelConfig

HEAD = "cls.predictions"
TIES = {
    f"{HEAD}.decoder.weight": "bert.embeddings.word_embeddings.weight",
    f"{HEAD}.decoder.bias": f"{HEAD}.bias",
}


def mlm_head_entries(config: ModelConfig) -> list[Entry]:
    """The head of BertForMaskedLM; its output matrix is the word embeddings (`TIES`)."""
    cut = without_padding(config.vocab_size)
    return [
        *dense_entries("mlm_head.dense", f"{HEAD}.transform.dense"),
        *dense_entries("mlm_head.norm", f"{HEAD}.transform.LayerNorm"),
        Entry("mlm_head.bias", (f"{HEAD}.bias",), cut, lambda t: cut(t[0])[0]),
    ]


def bert_config(config: ModelConfig, pad_token_id: int) -> BertConfig:
    """Hugging Face's configuration; it has one size for embeddings and hidden states, so ours must be equal."""
    assert config.embedding_size == config.generator.hidden_size, "BertForMaskedLM has no projection"
    return BertConfig(**encoder_settings(config, config.generator, pad_token_id))
