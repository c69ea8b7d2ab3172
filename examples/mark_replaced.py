"""Ask an exported model which tokens of a sentence do not fit.

python examples/mark_replaced.py runs/mine/hf "The chef ate the meal that she had cooked."
"""

import sys

import torch
from transformers import AutoTokenizer, ElectraForPreTraining


@torch.no_grad()
def replaced_probabilities(folder: str, sentence: str) -> list[tuple[str, float]]:
    """Give each token of a sentence with the probability that it was replaced."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ElectraForPreTraining.from_pretrained(folder).eval()
    inputs = tokenizer(sentence, return_tensors="pt")
    probabilities = model(**inputs).logits[0].sigmoid().tolist()
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    return list(zip(tokens, probabilities, strict=True))[1:-1]  # without [CLS] and [SEP]


if __name__ == "__main__":
    for token, probability in replaced_probabilities(*sys.argv[1:]):
        print(f"{token:<16} {probability:6.1%}  {'#' * round(40 * probability)}")
