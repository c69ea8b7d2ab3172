"""The README.md that goes with exported weights: what they are, how they were trained, how to use them."""

import dataclasses
import json

from peer_scale.conversion.checkpoint_reader import Checkpoint
from peer_scale.flops import paper_train_flops

_USE = {
    "ElectraForPreTraining": "Positive logits mark tokens that do not fit: logit = -(w.h) + xi_{K-1}.",
    "ElectraForMaskedLM": "This is the generator of the pre-training pair, kept to inspect it or to train further.",
    "BertForMaskedLM": "A masked language model.",
}


def model_card(checkpoint: Checkpoint, architecture: str) -> str:
    """Returns Markdown with the front matter that model hubs read; the licence is the publisher's to choose."""
    data, layout, progress = checkpoint.data, checkpoint.layout, checkpoint.progress
    flops = paper_train_flops(checkpoint.model, seq_length=data.seq_length, samples=progress.samples)
    facts = {
        "Model": checkpoint.provenance.model,
        "Step": progress.step,
        "Sequences seen": f"{progress.samples:,}",
        "Tokens seen": f"{progress.tokens:,}",
        "Training FLOPs (paper accounting)": f"{flops:.4g}",
        "Sequence length": data.seq_length,
        "Global batch size": data.global_batch_size,
        "Data": ", ".join(checkpoint.provenance.data_path),
        "Data fingerprint": data.fingerprint,
        "Tokenizer digest": data.tokenizer,
        "Seed": data.seed,
        "Objective": _objective(checkpoint),
        "Layout": f"ZeRO-{layout.zero_stage}, data parallel {layout.data_parallel}, {layout.precision}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
tags:
- {architecture}
---

# {checkpoint.provenance.model}, step {progress.step}

{_USE[architecture]} The weights are the fp32 masters of a checkpoint written by peer_scale.

```python
from transformers import {architecture}, AutoTokenizer

model = {architecture}.from_pretrained("THIS_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
logits = model(**tokenizer("The quick brown fox ate over the lazy dog.", return_tensors="pt")).logits
```

| | |
|---|---|
{table}

## Licence

None is given here: choose one before publishing, with the terms of the training text in mind.
"""


def _objective(checkpoint: Checkpoint) -> str:
    if checkpoint.model.ranker is None:
        names = ("mask_fraction", "mask_probability")
        return "masked language modelling, " + json.dumps({name: getattr(checkpoint.objective, name) for name in names})
    kind = (
        "ELECTRA (replaced-token detection)" if checkpoint.objective.num_levels == 2 else "PEER (token quality ranking)"
    )
    return f"{kind}, {json.dumps(dataclasses.asdict(checkpoint.objective))}"
